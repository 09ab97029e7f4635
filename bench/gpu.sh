#!/usr/bin/env bash
# Build for the GPU of this machine, run every test that needs it, and measure. Needs no network; stays under 9 minutes.
# Logs and results go to ${OUT:-bench/out}. A part that fails does not stop the next; the exit status says if any did.
set -u
cd "$(dirname "$0")/.."
root=$PWD
out=${OUT:-bench/out}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
failed=()

# part NAME SECONDS COMMAND...: run the command, show its end, keep all of it in NAME.log.
part() {
    local name=$1 seconds=$2 status
    shift 2
    echo "== $name"
    timeout -k 10 "$seconds" "$@" >"$out/$name.log" 2>&1
    status=$?
    tail -n 40 "$out/$name.log"
    echo "== $name: exit status $status"
    [ "$status" -eq 0 ] || failed+=("$name")
}

environment() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    nvcc --version | tail -n 2
    "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
}
export -f environment
export python

capability='import torch; major, minor = torch.cuda.get_device_capability(); print(f"{major}{minor}" + "a" * (major == 9))'
CSQ_CUDA_ARCHS=$("$python" -c "$capability") || exit 1
export CSQ_CUDA=1 CSQ_CUDA_ARCHS
# Installed into a folder of its own and used from elsewhere: from the root, the sources would hide the built package.
export PYTHONPATH=$site
part environment 30 bash -c environment
part build 150 "$python" -m pip install --no-build-isolation --no-deps --no-index --target "$site" "$root"
cd "$site" || exit 1
part info 30 "$python" -c 'import csq_kernels, pprint; pprint.pprint(csq_kernels.info())'
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 6)
part tests 200 "$python" -m pytest -m gpu -q -p no:cacheprovider "${workers[@]}" "$root/tests"
part reconstruct 110 "$python" "$root/bench/run.py" reconstruct --device cuda --out "$out/reconstruct.jsonl"
part bitserial 90 "$python" "$root/bench/suites/bitserial_cuda.py" --out "$out/bitserial_cuda.jsonl"

[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
