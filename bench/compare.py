"""What changed between two runs of the benches: ``python bench/compare.py OLD.jsonl NEW.jsonl``.

Lines of the same measurement on the same machine are paired; of several, the last one counts. The machine itself drifts
from run to run: the median ratio of what is not ours (PyTorch, other libraries) is taken as that drift and divided out.
A ratio is uncertain by the standard errors of both medians, estimated from the quantiles of their rounds. Exit code 1:
something of ours is slower by more than ``--tolerance`` beyond that uncertainty.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What was measured, as far as a line says it; and on what.
IDENTITY = (
    "op",
    "provider",
    "mode",
    "rule",
    "gates",
    "shape",
    "dtype",
    "n_bits",
    "device",
    "stored_bits",
    "activation",
)
IDENTITY += ("batch", "threads", "network", "sweep")
MACHINE = ("cpu", "cores", "isa", "threads", "gpu")
OURS = ("csq", "single-pass", "separate")
# Between the 20th and 80th percentile of a normal distribution lie 1.683 deviations; the median of n values deviates by
# 1.253 / sqrt(n) of one. A ratio is judged at 95 %.
DEVIATIONS, MEDIAN, CONFIDENCE = 1.683, 1.253, 1.96

Row = dict[str, Any]
Key = tuple[str, ...]


@dataclass(frozen=True)
class Change:
    """New over old time, the drift of the machine divided out, and what it is uncertain by."""

    key: Key
    old: float
    new: float
    ratio: float
    uncertainty: float

    def slower(self, tolerance: float) -> bool:
        return self.ratio - self.uncertainty > 1 + tolerance

    def faster(self, tolerance: float) -> bool:
        return self.ratio + self.uncertainty < 1 / (1 + tolerance)


def read(path: Path) -> dict[Key, Row]:
    """The last line of each measurement."""
    rows = (json.loads(line) for line in path.read_text().splitlines())
    return {key_of(row): row for row in rows if row.get("seconds") and "machine" in row}


def key_of(row: Row) -> Key:
    machine = [json.dumps(row["machine"].get(name)) for name in MACHINE]
    return tuple([json.dumps(row.get(name)) for name in IDENTITY] + machine)


def is_ours(row: Row) -> bool:
    return row["provider"].startswith(OURS)


def relative_error(row: Row) -> float:
    """Standard error of the median, over the median."""
    spread = row["seconds"]
    deviation = (spread["p80"] - spread["p20"]) / DEVIATIONS
    return MEDIAN * deviation / math.sqrt(row["rounds"]) / spread["median"]


def changes(old: dict[Key, Row], new: dict[Key, Row]) -> tuple[list[Change], float]:
    """What became of each measurement that both have, and the drift of the machine."""
    common = [key for key in new if key in old]
    ratios = {key: new[key]["seconds"]["median"] / old[key]["seconds"]["median"] for key in common}
    foreign = [ratios[key] for key in common if not is_ours(new[key])]
    drift = statistics.median(foreign) if foreign else 1.0
    found = []
    for key in common:
        if is_ours(new[key]):
            ratio = ratios[key] / drift
            error = math.hypot(relative_error(old[key]), relative_error(new[key]))
            times = (old[key]["seconds"]["median"], new[key]["seconds"]["median"])
            found.append(Change(key, *times, ratio, CONFIDENCE * error * ratio))
    return found, drift


def show(found: Iterable[Change], tolerance: float) -> str:
    """A line for each change, the slowest first."""
    lines = []
    for change in sorted(found, key=lambda change: -change.ratio):
        verdict = "SLOWER" if change.slower(tolerance) else "faster" if change.faster(tolerance) else ""
        name = " ".join(value.strip('"') for value in change.key[: len(IDENTITY)] if value != "null")
        times = f"{1e3 * change.old:9.3f} -> {1e3 * change.new:9.3f} ms"
        lines.append(f"{times}  {change.ratio:6.3f} +- {change.uncertainty:.3f}  {verdict:6}  {name}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.05, help="a slowdown of less is let pass (default 0.05)")
    options = parser.parse_args()
    found, drift = changes(read(options.old), read(options.new))
    if not found:
        print("expected two files with measurements of ours in common, got none")
        return 2
    print(show(found, options.tolerance))
    slower = sum(change.slower(options.tolerance) for change in found)
    print(f"{len(found)} measurements, {slower} slower; the machine's drift is {drift:.3f}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
