"""A short run of each script in ``tests/reliability``; ``docs/reliability.md`` shows the long ones."""

import shutil
import subprocess
import sys
import zipfile

import distributions
import fuzz_arguments
import fuzz_checkpoints
import fuzz_packed
import pytest
import record
import threads

from csq_kernels import _native


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


def test_the_page_shows_the_records():
    text = record.PAGE.read_text()
    assert text == record.page(text), "run python tests/reliability/record.py"
    assert all(line["failures"] == 0 for line in record.read())
