"""The benches on small shapes, the script for a GPU with every tool replaced, and what the claims make of results."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def status() -> ModuleType:
    spec = importlib.util.spec_from_file_location("status", BENCH / "status.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["status"] = module  # for dataclasses
    spec.loader.exec_module(module)
    yield module
    del sys.modules["status"]


@pytest.mark.parametrize(
    ("op", "shape", "dtype", "providers"),
    [
        ("reconstruct", "16x24", "bfloat16", ["eager", "csq"]),
        ("csq_linear", "4x16x24", "bfloat16", ["float", "csq", "csq-weight"]),
        ("csq_conv2d", "2x8x4x5x3", "float32", ["float", "csq", "csq-weight"]),
    ],
)
def test_lines_of_a_bench(tmp_path: Path, op: str, shape: str, dtype: str, providers: list[str]) -> None:
    out = tmp_path / "lines.jsonl"
    options = ["--shapes", shape, "--dtype", dtype, "--rounds", "2", "--out", out]
    options += ["--providers", "eager,csq"] if op == "reconstruct" else []
    subprocess.run([sys.executable, BENCH / "run.py", op, *options], check=True, capture_output=True)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert list(dict.fromkeys(row["provider"] for row in rows)) == providers
    for row in rows:
        assert row["op"] == op and row["dtype"] == dtype and row["shape"] == [*map(int, shape.split("x"))]
        assert 0 < row["seconds"]["p20"] <= row["seconds"]["median"] <= row["seconds"]["p80"]
        assert row["machine"] and row["versions"] and row["time"]


def test_lines_and_plot_of_the_step(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    options = ["--shapes", "16x24", "--rules", "adamw", "--gates", "moving", "--rounds", "2", "--out", out]
    options += ["--providers", "separate,single-pass,single-pass-narrow"]
    subprocess.run([sys.executable, BENCH / "run.py", "step", *options], check=True, capture_output=True)
    rows = {row["provider"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["eager", "separate", "single-pass", "single-pass-narrow"]
    for row in rows.values():
        assert row["error_over_allowed"] <= 1 and row["share_of_floor"] > 0
        assert row["peak_bytes_per_weight"] >= row["state_bytes_per_weight"]
    # Logits, their gradient and two momenta of 16 planes, and dL/dW; or logits, two momenta, W and dL/dW.
    held = {name: row["state_bytes_per_weight"] for name, row in rows.items()}
    assert held["separate"] == pytest.approx(4 * 64 + 4, rel=0.01)
    assert held["single-pass"] == pytest.approx(3 * 64 + 8, rel=0.01)
    assert held["single-pass-narrow"] == pytest.approx(32 + 2 * 16 + 2 * 32 * 4 / 384 + 8, rel=0.02)
    assert rows["single-pass"]["peak_bytes_per_weight"] < 3 * 64 + 16, "a gradient for every bit was in memory"
    plot = [sys.executable, BENCH / "plot.py", "step", "--results", out, "--out", tmp_path]
    subprocess.run(plot, check=True, capture_output=True)
    assert {path.suffix for path in tmp_path.glob("step-16x24.*")} == {".png", ".svg"}


# Notes how it was called; a bench leaves a line of results.
TOOL = """#!/usr/bin/env bash
echo "$(basename "$0") $*" >>"$CALLS"
case "$*" in
    *get_device_capability*) echo 90a ;;
    *"query-gpu=name --"*) echo "$GPU" ;;
    describe*) [ -n "$COMMIT" ] && echo "$COMMIT" ;;
    *"$FAILS"*) exit 3 ;;
esac
while [ $# -gt 1 ]; do
    [ "$1" != --out ] || echo "{\\"commit\\": \\"${COMMIT:-$CSQ_COMMIT}\\"}" >>"$2"
    shift
done
"""


def run_gpu_script(
    folder: Path,
    tools: list[str],
    *parts: str,
    fails: str = "nothing",
    commit: str = "abc1234",
    gpu: str = "NVIDIA H100",
) -> tuple[int, str, list[str]]:
    """Exit status and output of gpu.sh where ``tools`` only note how they were called, and those calls."""
    binaries = folder / "bin"
    binaries.mkdir(exist_ok=True)
    for tool in tools:
        (binaries / tool).write_text(TOOL)
        (binaries / tool).chmod(0o755)
    calls = folder / "calls"
    environment = {"PATH": f"{binaries}:/usr/bin:/bin", "PYTHON": str(binaries / "python3"), "OUT": str(folder / "out")}
    environment |= {"CALLS": str(calls), "FAILS": fails, "TMPDIR": str(folder), "COMMIT": commit, "GPU": gpu}
    calls.unlink(missing_ok=True)
    done = subprocess.run(["bash", BENCH / "gpu.sh", *parts], env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr, calls.read_text().splitlines()


TOOLS = ["python3", "git", "nvidia-smi", "nvcc", "ncu", "compute-sanitizer"]
BENCHES = ["reconstruct_launch", "reconstruct", "reconstruct_bfloat16", "reconstruct_3_bits", "step", "csq_linear"]
BENCHES += ["csq_conv2d", "bitserial_cuda", "model", "scaling"]
PARTS = ["environment", "build", "info", "tests", "tests_triton", "large", *(f"bench_{name}" for name in BENCHES)]
PARTS += ["counters", "bench_counters", "memcheck", "racecheck", "initcheck", "status"]


def ran(output: str) -> list[str]:
    """The parts that were run, and ended well."""
    return [line.split()[1].rstrip(":") for line in output.splitlines() if ": exit status 0" in line]


@pytest.mark.skipif(os.name != "posix", reason="runs bash")
def test_gpu_script_runs_every_part(tmp_path: Path) -> None:
    status, output, calls = run_gpu_script(tmp_path, TOOLS)
    assert status == 0, output
    assert "command not found" not in output and "unbound" not in output, output
    assert ran(output) == PARTS
    assert all((tmp_path / "out" / f"{part}.log").exists() for part in PARTS)
    assert sum(call.startswith("compute-sanitizer") for call in calls) == 3
    benches = [call for call in calls if "bench/run.py" in call]
    assert all("--device cuda" in call and f"--out {tmp_path}/out/" in call for call in benches) and len(benches) == 9
    assert not list(tmp_path.glob("tmp.*"))


@pytest.mark.skipif(os.name != "posix", reason="runs bash")
def test_gpu_script_goes_on_after_a_failure_and_without_the_sanitizer(tmp_path: Path) -> None:
    status, output, calls = run_gpu_script(tmp_path, TOOLS[:-1], fails="reconstruct_bfloat16.jsonl")
    assert status == 1
    assert output.splitlines()[-1] == "failed: bench_reconstruct_bfloat16"
    assert "memcheck: skipped, compute-sanitizer is not on PATH" in output
    assert "status.py" in calls[-1]


@pytest.mark.skipif(os.name != "posix", reason="runs bash")
def test_gpu_script_goes_on_where_it_was(tmp_path: Path) -> None:
    again = ["environment", "build", "info", "status"]
    assert run_gpu_script(tmp_path, TOOLS, fails="racecheck")[0] == 1
    status, output, calls = run_gpu_script(tmp_path, TOOLS)
    assert status == 0 and ran(output) == [*again[:-1], "racecheck", "status"], output
    assert "bench_step: done before at commit abc1234 on NVIDIA H100" in output
    assert ran(run_gpu_script(tmp_path, TOOLS)[1]) == again
    # One part alone has what it needs: the build.
    alone = run_gpu_script(tmp_path, TOOLS, "bench_step", "initcheck", commit="fed8765")
    assert ran(alone[1]) == [*again[:-1], "bench_step", "initcheck", "status"]
    # Results that are gone are measured again, as is everything on another GPU, at another commit, or of changed files.
    (tmp_path / "out" / "step.jsonl").unlink()
    assert ran(run_gpu_script(tmp_path, TOOLS)[1]) == [*again[:-1], "bench_step", "status"]
    assert ran(run_gpu_script(tmp_path, TOOLS, gpu="NVIDIA A100")[1]) == PARTS
    assert ran(run_gpu_script(tmp_path, TOOLS, commit="def5678")[1]) == PARTS
    for _ in range(2):
        assert ran(run_gpu_script(tmp_path, TOOLS, commit="def5678-dirty")[1]) == PARTS


def test_results_are_merged_by_commit(tmp_path: Path) -> None:
    def row(op: str, commit: str | None, time: str) -> dict[str, Any]:
        return {"op": op, "commit": commit, "time": time, "value": 1.5}

    older, newer = row("step", "old", "2026-01-01"), row("step", "new", "2026-01-02")
    latest, model = row("step", "old", "2026-01-03"), row("model", "new", "2026-01-02")
    for folder, rows in (("a", [newer, latest, older]), ("b", [older, row("step", "old-dirty", "2026-01-04"), model])):
        (tmp_path / folder).mkdir()
        lines = [json.dumps(each) + "\n" for each in [*rows, row("step", None, "2026-01-05")]]
        (tmp_path / folder / "lines.jsonl").write_text("".join(lines) + '{"op": "st')
    results = tmp_path / "results"
    results.mkdir()
    (results / "step.jsonl").write_text(json.dumps(row("step", "before", "2025-12-01")) + "\n")
    command = [sys.executable, BENCH / "merge.py", "--results", results, tmp_path / "a", tmp_path / "b"]
    for expected in ("4 lines merged", "0 lines merged"):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == expected and done.stderr.count("a line that is not whole") == 2
    merged = [json.loads(line) for line in (results / "step.jsonl").read_text().splitlines()]
    assert [each["commit"] for each in merged] == ["before", "old", "old", "new"]
    assert [each["time"] for each in merged[1:3]] == ["2026-01-01", "2026-01-03"]
    assert json.loads((results / "model.jsonl").read_text()) == model
    missing = subprocess.run([*command, tmp_path / "none"], check=False, capture_output=True, text=True)
    assert missing.returncode == 2 and "expected a folder with results" in missing.stderr


def line(**changes: Any) -> dict[str, Any]:
    row = {
        "op": "reconstruct",
        "provider": "csq",
        "mode": "forward",
        "shape": [4096, 4096],
        "dtype": "float32",
        "n_bits": 8,
        "device": "cuda",
        "seconds": {"median": 1.0, "p20": 1.0, "p80": 1.0},
        "floor_seconds": 0.95,
        "share_of_floor": 0.95,
        "speedup_over": {"eager": 8.0},
        "extra_memory_over_logits": 0.0,
        "machine": {"gpu": "NVIDIA H100 80GB HBM3"},
        "commit": "abc",
        "time": "2026-01-01T00:00:00Z",
    }
    return row | changes


def test_a_claim_is_judged_by_its_worst_line(status: ModuleType) -> None:
    rows = [line(), line(dtype="bfloat16", share_of_floor=0.5), line(shape=[64, 64], share_of_floor=0.01)]
    (claim,) = (claim for claim in status.CLAIMS if claim.text.startswith("forward, share"))
    assert status.standing(claim, []).word == "OPEN: never measured"
    assert status.standing(claim, rows[:1]).word == "holds"
    missed = status.standing(claim, rows)
    assert (missed.word, missed.value, missed.row) == ("OPEN: missed", 0.5, rows[1])
    elsewhere = line(machine={"gpu": "NVIDIA A100"}), line(machine={"gpu": None})
    assert status.standing(claim, elsewhere).value is None
    later = line(commit="def", time="2026-02-01T00:00:00Z", share_of_floor=0.91)
    assert status.standing(claim, [*rows, later]).row == later


def test_every_committed_line_can_be_judged() -> None:
    done = subprocess.run([sys.executable, BENCH / "status.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].endswith("claims are open")


def test_claims_that_compare_lines(status: ModuleType) -> None:
    both = line(
        mode="forward+backward",
        seconds={"median": 3.0, "p20": 3.0, "p80": 3.0},
        floor_seconds=2.75,
        speedup_over={"eager": 6.0, "compiled": 2.0},
    )
    three = line(n_bits=3, seconds={"median": 0.45, "p20": 0.4, "p80": 0.5})
    step = line(op="csq_linear", mode="forward+backward", shape=[8192, 4096, 4096], dtype="bfloat16", times_float=1.25)
    launch = line(op="reconstruct_launch", shape=[64, 64], seconds_beyond_empty=2e-6)
    single = line(op="step", provider="single-pass", share_of_floor=0.8, speedup_over={"separate": 2.5})
    rows = [line(), both, three, step, launch, single]
    values = {c.text: status.standing(c, rows) for c in status.CLAIMS if not c.text.startswith("packed")}
    words = {text: (each.word, each.value and round(each.value, 3)) for text, each in values.items()}
    assert words == {
        "forward, share of copy bandwidth, 16 M weights and more": ("holds", 0.95),
        "backward, share of copy bandwidth, 16 M weights and more": ("holds", 0.9),
        "small weight, microseconds beyond an empty launch": ("holds", 2.0),
        "forward, times faster than eager PyTorch per bit": ("holds", 8.0),
        "forward+backward, times faster than eager PyTorch per bit": ("OPEN: missed", 6.0),
        "forward, times faster than torch.compile of it": ("OPEN: never measured", None),
        "forward+backward, times faster than torch.compile of it": ("holds", 2.0),
        "extra memory over that of the logits": ("holds", 0.0),
        "3 planes of 8, forward: time over 3/8 of the whole": ("OPEN: missed", 1.2),
        "CSQLinear step over nn.Linear's, 8192 tokens, 4096x4096, bf16": ("holds", 1.25),
        "single-pass step, share of copy bandwidth, 4096x4096": ("OPEN: missed", 0.8),
        "single-pass step, times faster than separate kernels and fused SGD, 4096x4096": ("holds", 2.5),
    }


def packed_line(bits: int, batch: int, microseconds: float | None) -> dict[str, Any]:
    seconds = None if microseconds is None else {"median": 1e-6 * microseconds}
    row = line(op="bitserial_linear", provider="cuda", shape=[8192, 8192], dtype="float16", bits=bits, batch=batch)
    return row | {"seconds": seconds, "cublas_fp16_seconds": {"median": 60e-6}}


def test_claims_about_packed_products(status: ModuleType) -> None:
    rows = [packed_line(1, 1, 5.0), packed_line(2, 1, 10.0), packed_line(3, 1, None)]
    rows += [packed_line(1, 16, 6.0), packed_line(2, 16, 12.5), packed_line(3, 16, 1.0), packed_line(2, 512, 80.0)]
    values = {c.text: status.standing(c, rows) for c in status.CLAIMS if c.text.startswith("packed")}
    words = {text.removeprefix("packed 8192x8192, fp16, "): each.word for text, each in values.items()}
    assert words == {
        "batch 1, 1 bits, microseconds": "holds",
        "batch 1, 2 bits, microseconds": "OPEN: missed",
        **{f"batch 1, {bits} bits, microseconds": "OPEN: never measured" for bits in (3, 4, 6, 8)},
        "batch 16 over batch 1": "holds",
        "batch 512, share of cuBLAS fp16": "OPEN: missed",
    }


def test_report_names_commit_and_what_is_open(tmp_path: Path) -> None:
    (tmp_path / "lines.jsonl").write_text(json.dumps(line()) + "\n")
    done = subprocess.run([sys.executable, BENCH / "status.py", tmp_path], check=True, capture_output=True, text=True)
    first, *_, last = done.stdout.splitlines()
    assert "holds: 0.95 at commit abc, 4096x4096 float32, 2026-01-01" in first
    assert done.stdout.count("OPEN: never measured") == 18
    assert last == "18 of 20 claims are open"
