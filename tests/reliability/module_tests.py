"""PyTorch's module tests on every layer, and ``opcheck`` on every op: ``python tests/reliability/module_tests.py``."""

import sys
from collections import Counter
from pathlib import Path

import pytest
import record

TESTS = Path(__file__).parents[1]
CHOSEN = "test_module_info or opcheck"


class Outcomes:
    """A plugin of pytest that counts, once for each test."""

    def __init__(self) -> None:
        self.counts = Counter[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1


def main() -> int:
    outcomes = Outcomes()
    files = [str(TESTS / name) for name in ("test_module_info.py", "test_ops.py", "test_bitserial.py")]
    code = pytest.main(["-q", "-rs", "-k", CHOSEN, *files], plugins=[outcomes])
    counts = outcomes.counts
    tried = f"{counts['passed'] + counts['failed']} tests, {counts['skipped']} more skipped for a reason that they give"
    print(tried)
    record.record("module tests", tried, counts["failed"])
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
