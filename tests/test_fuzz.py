"""A short run of each fuzzer; ``docs/reliability.md`` says how to run them for longer."""

import fuzz_packed
import pytest


@pytest.mark.parametrize("seed", range(2))
def test_mutated_packed_files_load_or_are_refused(seed):
    counts = fuzz_packed.run(1000, seed=1000 + seed, show=False)
    assert counts["refused"] > 800 and counts["loaded"] > 0
