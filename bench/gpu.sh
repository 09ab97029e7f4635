#!/usr/bin/env bash
# bash bench/gpu.sh [PART...]: build for the GPU of this machine, run every test that needs it, and measure; or only the
# parts named, and what they need. Needs no network; stays under ${LIMIT:-530} seconds.
# Logs and results go to ${OUT:-bench/out}. A part that fails does not stop the next; the exit status says if any did.
# Run again with the same OUT, it goes on: parts that a clean commit has finished on this GPU are not repeated.
# `python bench/merge.py OUT` then takes the results over into bench/results.
set -u
cd "$(dirname "$0")/.." || exit 1
root=$PWD
out=${OUT:-bench/out}
mkdir -p "$out"
out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
failed=()
deadline=$((SECONDS + ${LIMIT:-530}))
wanted=("$@")
commit=${CSQ_COMMIT:-$(git describe --always --dirty --exclude='*' 2>/dev/null || echo unknown)}
gpu=$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)

# finished NAME: whether this commit, without changes, has finished a part on this GPU, and its results are still there.
finished() {
    case $commit in *-dirty | unknown) return 1 ;; esac
    grep -qxF "$commit	$gpu	$1" "$out/finished" 2>/dev/null || return 1
    case $1 in
        bench_*) grep -qF "\"commit\": \"$commit\"" "$out/${1#bench_}.jsonl" 2>/dev/null ;;
    esac
}

# part NAME SECONDS COMMAND...: run the command, if it is wanted, show its end, keep all of it in NAME.log.
part() {
    [ ${#wanted[@]} -eq 0 ] || [[ " ${wanted[*]} " == *" $1 "* ]] || return 0
    run "$@"
}

run() {
    local name=$1 seconds=$2 left=$((deadline - SECONDS)) status
    shift 2
    if finished "$name"; then
        echo "== $name: done before at commit $commit on $gpu"
        return
    fi
    echo "== $name"
    if [ "$left" -lt 5 ]; then
        echo "== $name: not run, no time is left"
        failed+=("$name")
        return
    fi
    # Interrupted, pytest still tells what has failed.
    timeout -s INT -k 5 "$((seconds < left ? seconds : left))" "$@" >"$out/$name.log" 2>&1
    status=$?
    tail -n 40 "$out/$name.log"
    echo "== $name: exit status $status, $SECONDS s since the start"
    if [ "$status" -eq 0 ]; then
        printf '%s\t%s\t%s\n' "$commit" "$gpu" "$name" >>"$out/finished"
    else
        failed+=("$name")
    fi
}

# always NAME SECONDS COMMAND...: a part that each run needs anew.
always() {
    [ ! -e "$out/finished" ] || sed -i "/\t$1\$/d" "$out/finished"
    run "$@"
}

environment() {
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    nvcc --version | tail -n 2
    "$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)'
}
export -f environment
export python

tests() { part "$1" "$2" "$python" -m pytest -q -p no:cacheprovider "${@:3}" "$root/tests"; }
# bench NAME SECONDS SUITE OPTION...
bench() {
    part "bench_$1" "$2" "$python" "$root/bench/run.py" "$3" --device cuda --rounds 20 --out "$out/$1.jsonl" "${@:4}"
}

# with TOOL PART SECONDS COMMAND...: a part that needs a tool, which not every machine has.
with() {
    if ! command -v "$1" >/dev/null; then
        echo "== $2: skipped, $1 is not on PATH"
        return
    fi
    part "${@:2}"
}

# sanitize TOOL: the smallest tests of every kernel under one of compute-sanitizer's tools.
sanitize() {
    # Without PyTorch's cache every tensor is an allocation of its own, whose ends and whose first use are seen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 with compute-sanitizer "$1" 60 compute-sanitizer --tool "$1" --error-exitcode 9 \
        "$python" -m pytest -q -p no:cacheprovider -m gpu -k 'not_aligned and cuda' "$root/tests/test_gpu.py"
}

# The hardware's counters of each kernel; clocks are left as they are.
counters() {
    local sections=()
    for name in SpeedOfLight MemoryWorkloadAnalysis WarpStateStats SchedulerStats Occupancy LaunchStats; do
        sections+=(--section "$name")
    done
    with ncu counters 60 ncu --clock-control none --profile-from-start off "${sections[@]}" \
        "$python" "$root/bench/counters.py"
    with ncu bench_counters 10 "$python" "$root/bench/counters.py" --read "$out/counters.log" --out "$out/counters.jsonl"
}

capability='import torch; major, minor = torch.cuda.get_device_capability(); print(f"{major}{minor}" + "a" * (major == 9))'
CSQ_CUDA_ARCHS=$("$python" -c "$capability") || exit 1
export CSQ_CUDA=1 CSQ_CUDA_ARCHS
# Installed into a folder of its own and used from elsewhere: from the root, the sources would hide the built package.
export PYTHONPATH=$site
always environment 20 bash -c environment
always build 120 "$python" -m pip install --no-build-isolation --no-deps --no-index --target "$site" "$root"
cd "$site" || exit 1
always info 20 "$python" -c 'import csq_kernels, pprint; pprint.pprint(csq_kernels.info())'
workers=()
"$python" -c 'import xdist' 2>/dev/null && workers=(-n 12)
# One thread each: what they compute on the processor would fight for its cores. Triton compiles for most of its time.
OMP_NUM_THREADS=1 tests tests 100 -m 'gpu and not slow' -k 'not triton' "${workers[@]}"
OMP_NUM_THREADS=1 tests tests_triton 140 -m 'gpu and not slow' -k triton "${workers[@]}"
tests large 40 -m 'gpu and slow'
bench reconstruct_launch 15 reconstruct_launch
bench reconstruct 60 reconstruct --providers eager,compiled,csq --shapes 1024x1024,4096x4096,8192x8192
bench reconstruct_bfloat16 60 reconstruct --dtype bfloat16 --providers eager,compiled,csq --shapes 4096x4096,8192x28672
bench reconstruct_3_bits 20 reconstruct --n-bits 3 --providers csq --shapes 4096x4096,8192x8192
bench step 30 step --providers single-pass,separate --shapes 4096x4096
bench csq_linear 20 csq_linear --dtype bfloat16 --shapes 8192x4096x4096,2048x4096x14336
bench csq_conv2d 20 csq_conv2d --dtype bfloat16 --shapes 64x64x64x56x3,64x512x512x7x3
part bench_bitserial_cuda 60 "$python" "$root/bench/suites/bitserial_cuda.py" --out "$out/bitserial_cuda.jsonl"
bench model 60 model --rounds 10
bench scaling 40 scaling --rounds 5 --exponents 12,16,20,24,26 --bits 1,2,4,8,16 --thread-counts 1 --batches 1,16,256
counters
for tool in memcheck racecheck initcheck; do sanitize "$tool"; done
always status 15 "$python" "$root/bench/status.py" --gpu "$gpu" "$out"

[ ${#failed[@]} -eq 0 ] || { echo "failed: ${failed[*]}"; exit 1; }
