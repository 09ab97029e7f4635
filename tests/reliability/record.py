"""What long checks came to: ``record`` keeps a line of each; this script puts them into docs/reliability.md."""

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "docs" / "reliability.jsonl"
PAGE = ROOT / "docs" / "reliability.md"
# The order of the table.
CHECKS = (
    "packed files",
    "checkpoints",
    "native arguments",
    "address and undefined behaviour",
    "threads",
    "kills",
    "faults",
    "concurrency",
    "long run",
    "extremes",
    "module tests",
    "distributions",
)
# After the name of a check that ran under AddressSanitizer, which is a line of its own.
SANITIZED = ", sanitized"
BEGIN, END = "<!-- table -->\n", "<!-- end of the table -->\n"
_STARTED = time.monotonic()


def _commit() -> str:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


# Of the sources when the check began; it may take hours.
_COMMIT = _commit()


def sanitized() -> bool:
    """Whether ``sanitize.py address`` runs this process."""
    return "asan" in os.environ.get("LD_PRELOAD", "")


def _place(line: dict[str, Any]) -> tuple[int, str]:
    return CHECKS.index(line["check"].removesuffix(SANITIZED)), line["check"]


def record(check: str, tried: str, failures: int) -> None:
    """Keep what a script tried and how many times it failed, in the place of an earlier run of the same check."""
    if check not in CHECKS:
        raise ValueError(f"expected check as one of {', '.join(CHECKS)}, got {check}")
    arguments = ["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]
    if sanitized():
        check += SANITIZED
        arguments = ["python", "tests/reliability/sanitize.py", "address", "--", *arguments]
    line = {
        "check": check,
        "command": " ".join(arguments),
        "tried": tried,
        "failures": failures,
        "seconds": round(time.monotonic() - _STARTED),
        "machine": f"{os.cpu_count()} cores, {_cpu()}",
        "commit": _COMMIT,
    }
    kept = [old for old in read() if old["check"] != check] + [line]
    kept.sort(key=_place)
    RECORDS.write_text("".join(json.dumps(old) + "\n" for old in kept))


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RECORDS.read_text().splitlines()] if RECORDS.exists() else []


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def table() -> str:
    lines = ["| check | tried | failures | minutes | command |", "| --- | --- | --- | --- | --- |"]
    lines += [
        f"| {line['check']} | {line['tried']} | {line['failures']} | {line['seconds'] / 60:.0f} | `{line['command']}` |"
        for line in read()
    ]
    machines = sorted({f"{line['machine']}" for line in read()})
    commits = sorted({line["commit"] for line in read()})
    return "\n".join([*lines, "", f"Machine: {'; '.join(machines)}. Commits: {', '.join(commits)}.", ""])


def page(text: str) -> str:
    """The text with its table made new."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))
