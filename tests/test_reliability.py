"""A short run of each script in ``tests/reliability``; ``docs/reliability.md`` shows the long ones."""

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
