"""A short run of each script in ``tests/reliability``; ``docs/reliability.md`` shows the long ones."""

import fuzz_packed
import pytest
import record


@pytest.mark.parametrize("seed", range(2))
def test_mutated_packed_files_load_or_are_refused(seed):
    counts = fuzz_packed.run(1000, seed=1000 + seed, show=False)
    assert counts["refused"] > 800 and counts["loaded"] > 0


def test_the_page_shows_the_records():
    text = record.PAGE.read_text()
    assert text == record.page(text), "run python tests/reliability/record.py"
    assert all(line["failures"] == 0 for line in record.read())
