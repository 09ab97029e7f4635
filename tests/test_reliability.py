"""A short run of each script in ``tests/reliability``; ``docs/reliability.md`` shows the long ones."""

import os
import subprocess
import sys
from pathlib import Path

import concurrency
import extremes
import fuzz_packed
import long_run
import pytest
import record

from csq_kernels import _native

pytest.importorskip("pydantic")
pytest.importorskip("sklearn")


def in_a_new_process(program: str) -> str:
    """The output of a program that forks: behind it there must be no pool of threads."""
    path = os.pathsep.join([str(Path(record.__file__).parent), os.environ["PYTHONPATH"]])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()[-1]


@pytest.mark.parametrize("seed", range(2))
def test_mutated_packed_files_load_or_are_refused(seed):
    counts = fuzz_packed.run(1000, seed=1000 + seed, show=False)
    assert counts["refused"] > 800 and counts["loaded"] > 0


def test_killed_runs_resume_to_the_same_bits_and_leave_no_files():
    program = "import kills; print(kills.run(6, 0, seed=1, variants=('single pass', 'narrow')))"
    assert in_a_new_process(program) == "(6, [])"


def test_faults_are_one_line_and_leave_a_run_to_resume():
    names = [
        "files of 100000 bytes",
        "read-only run",
        "removed folder",
        "data not finite",
        "memory for the model",
        "packing",
    ]
    assert in_a_new_process(f"import faults; print(faults.run({names}))") == "[]"


def test_threads_that_share_a_network_get_the_bits_of_one():
    passes, failures = concurrency.share(1.0, threads=4)
    assert passes > 12 and failures == []


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_compute_after_their_parent_did(method):
    assert concurrency.processes(method) == []


def test_a_sub_interpreter_is_refused():
    assert concurrency.interpreters() == []


@pytest.mark.skipif(_native.module is None, reason="the native module is not built")
def test_extreme_values():
    counts, failures = extremes.run(5, seed=10_000)
    assert failures == [] and counts["reconstruct: right"] == 5 * len(_native.module.supported_isas())


def test_whole_runs_one_after_the_other_keep_memory_and_files():
    _, samples = long_run.run(0.0, show=False)
    assert samples[-1].files == samples[0].files
    assert samples[-1].resident - samples[0].resident < len(samples) * (4 << 20)


def test_the_page_shows_the_records():
    text = record.PAGE.read_text()
    assert text == record.page(text), "run python tests/reliability/record.py"
    assert all(line["failures"] == 0 for line in record.read())
