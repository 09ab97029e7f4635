"""The instructions of the CPU kernels are those that were committed, and a kernel that needs more of them is called."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parent.parent / "bench"
REWRITE = "to accept this, run: python bench/instructions.py --write"


@pytest.fixture(scope="module")
def instructions() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        yield importlib.import_module("instructions")


@pytest.fixture(scope="module")
def committed(instructions: ModuleType) -> dict:
    return json.loads(instructions.COMMITTED.read_text())


@pytest.mark.slow
def test_counts_are_as_committed(instructions: ModuleType, committed: dict) -> None:
    if reason := instructions.missing(committed):
        pytest.skip(reason)
    found = instructions.complaints(instructions.count(), committed["counts"])
    assert not found, "\n".join([*found, REWRITE])


def test_three_percent_more_is_called(instructions: ModuleType, committed: dict) -> None:
    counts = committed["counts"]
    assert instructions.complaints(counts, counts) == []
    for name, count in counts.items():
        assert instructions.complaints(counts | {name: round(1.01 * count)}, counts) == []
        (line,) = instructions.complaints(counts, counts | {name: round(count / 1.03)})
        assert line.startswith(f"{name}: ") and line.endswith(f"got {count:,}, +3.0%")


def test_a_call_that_is_new_or_gone_is_called(instructions: ModuleType) -> None:
    found = instructions.complaints({"avx2 new": 5}, {"avx2 old": 7})
    assert found == ["avx2 old: expected 7, got none", "avx2 new: expected none, got 5"]


def test_why_counts_cannot_be_compared(instructions: ModuleType, committed: dict, monkeypatch) -> None:
    monkeypatch.setattr(instructions.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "the committed counts are of Clang 1.0" in instructions.missing({"compiler": "Clang 1.0"})
    monkeypatch.setattr(instructions.shutil, "which", lambda name: None)
    assert instructions.missing(committed) == "valgrind is not on PATH"


def test_every_counted_call_has_a_benchmark(committed: dict) -> None:
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", BENCH / "test_native.py", "--benchmark-only", "-v"]
    # pytest-benchmark refuses to measure under pytest-xdist, and takes the process for one of its workers.
    alone = {name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"}
    done = subprocess.run([*command, "-p", "no:cacheprovider"], capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stdout + done.stderr
    calls = {name.partition(" ")[2] for name in committed["counts"]}
    assert set(re.findall(r"::test_native\[(.*)\] PASSED", done.stdout)) == calls
    for kernel in {call.split()[0] for call in calls}:
        assert f"benchmark '{kernel}'" in done.stdout
