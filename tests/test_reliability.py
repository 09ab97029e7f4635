"""A short run of each script in ``tests/reliability``; ``docs/reliability.md`` shows the long ones."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("sklearn")

import concurrency
import distributions
import extremes
import fuzz_arguments
import fuzz_checkpoints
import fuzz_packed
import long_run
import record
import threads

from csq_kernels import _native


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


def test_the_sdist_holds_what_it_needs(tmp_path):
    files = distributions.tracked()
    source = tmp_path / "source"
    for name in files:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(distributions.ROOT / name, source / name)
    program = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, tmp_path], cwd=source, check=True, capture_output=True)
    [sdist] = tmp_path.glob("*.tar.gz")
    assert distributions.check_sdist(sdist, files) > 100
    with pytest.raises(AssertionError, match=r"lacks \['csrc/new.h'\] and holds nothing by accident"):
        distributions.check_sdist(sdist, files | {"csrc/new.h"})


def test_a_wheel_with_tests_or_without_its_module_is_found(tmp_path):
    wheel, files = tmp_path / "csq_kernels.whl", {"csq_kernels/__init__.py", "tests/test_ops.py"}

    def check(*names):
        with zipfile.ZipFile(wheel, "w") as archive:
            for name in names:
                archive.writestr(name, "")
        return distributions.check_wheel(wheel, files)

    right = ("csq_kernels/__init__.py", "csq_kernels/_C.cpython-311.so", "csq_kernels-0.1.dist-info/METADATA")
    assert check(*right) == 2
    with pytest.raises(AssertionError, match="by accident"):
        check(*right, "tests/test_ops.py")
    with pytest.raises(AssertionError, match="one native module"):
        check(right[0])


def test_mutated_checkpoints_load_or_are_refused():
    counts = fuzz_checkpoints.run(300, seed=1000, show=False)
    assert counts["refused"] > 150 and counts["loaded"] > 0


@pytest.mark.skipif(_native.module is None, reason=str(_native.reason))
def test_spoiled_arguments_are_refused_or_make_no_difference():
    counts = fuzz_arguments.run_in_processes(500, seed=1000, processes=1)
    assert counts["computed"] > 100 and counts.total() - counts["computed"] > 100


@pytest.mark.skipif(_native.module is None, reason=str(_native.reason))
def test_threads_that_share_inputs_get_what_one_gets():
    assert threads.run(1) > 0


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
