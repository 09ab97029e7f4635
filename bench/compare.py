"""What changed between two runs of the benches: ``python bench/compare.py OLD NEW``, files of lines or folders of them.

Lines of the same measurement on the same machine are paired. Of several of the latest commit the fastest counts: other
tenants of a machine only slow it, so repeated runs see more. What is not ours (PyTorch, other libraries, the copies
beside the calls) did not change, and says what the machine did: the median of its ratios is the drift, which is divided
out, and what of its largest deviation its own rounds do not explain is how far two runs of the same thing come apart.
A ratio is uncertain by that and by the standard errors of both medians. Exit code 1: something of ours is slower by
more than ``--tolerance`` beyond that.
"""

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What was measured, as far as a line says it; and on what.
IDENTITY = tuple(
    "op provider mode rule gates shape dtype n_bits device stored_bits activation batch threads network sweep".split()
)
MACHINE = ("cpu", "cores", "isa", "threads", "gpu")
# One group has one drift.
GROUP = ("op", "mode")
OURS = ("csq", "single-pass")
# Our kernels with PyTorch's optimizer and memory: says nothing of either alone. ``reconstruct`` judges the kernels.
MIXED = "separate"
BANDWIDTHS = ("copy_bytes_per_second", "read_bytes_per_second")
# Between the 20th and 80th percentile of a normal distribution lie 1.683 deviations; the median of n values deviates by
# 1.253 / sqrt(n) of one. A ratio is judged at 95 %.
DEVIATIONS, MEDIAN, CONFIDENCE = 1.683, 1.253, 1.96

Row = dict[str, Any]
Key = tuple[str, ...]


@dataclass(frozen=True)
class Machine:
    """What became of the time of that which is not ours: ``drift`` as a ratio, ``scatter`` of logarithms around it."""

    drift: float
    scatter: float


@dataclass(frozen=True)
class Change:
    """New over old time, the drift of the machine divided out, and the factor that it is uncertain by."""

    key: Key
    old: float
    new: float
    ratio: float
    uncertainty: float

    def slower(self, tolerance: float) -> bool:
        return self.ratio / self.uncertainty > 1 + tolerance

    def faster(self, tolerance: float) -> bool:
        return self.ratio * self.uncertainty < 1 / (1 + tolerance)


def read(path: Path) -> dict[Key, Row]:
    """The fastest line of each measurement, of those of the commit that was measured last."""
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    found: dict[Key, list[Row]] = defaultdict(list)
    for row in (json.loads(line) for file in files for line in file.read_text().splitlines()):
        if row.get("seconds") and "machine" in row:
            found[key_of(row)].append(row)
    latest = {key: [row for row in rows if row.get("commit") == rows[-1].get("commit")] for key, rows in found.items()}
    return {key: min(rows, key=lambda row: row["seconds"]["median"]) for key, rows in latest.items()}


def key_of(row: Row) -> Key:
    machine = [json.dumps(row["machine"].get(name)) for name in MACHINE]
    return tuple([json.dumps(row.get(name)) for name in IDENTITY] + machine)


def group_of(key: Key) -> Key:
    return tuple(key[IDENTITY.index(name)] for name in GROUP)


def is_ours(row: Row) -> bool:
    return row["provider"].startswith(OURS)


def relative_error(row: Row) -> float:
    """Standard error of the median, over the median."""
    spread = row["seconds"]
    deviation = (spread["p80"] - spread["p20"]) / DEVIATIONS
    return MEDIAN * deviation / math.sqrt(row["rounds"]) / spread["median"]


def bandwidth(row: Row) -> float | None:
    return next((row[name] for name in BANDWIDTHS if name in row), None)


def error_of(old: Row, new: Row) -> float:
    """What the logarithm of the ratio of two medians is uncertain by, as far as their rounds tell."""
    return CONFIDENCE * math.hypot(relative_error(old), relative_error(new))


def ratio_of(old: Row, new: Row) -> float:
    return new["seconds"]["median"] / old["seconds"]["median"]


def machine_of(pairs: list[tuple[Row, Row]]) -> Machine:
    """What the machine did between the runs, by what is not ours."""
    foreign = [(old, new) for old, new in pairs if not is_ours(new) and new["provider"] != MIXED]
    others = [(math.log(ratio_of(old, new)), error_of(old, new)) for old, new in foreign]
    bandwidths = [(bandwidth(old), bandwidth(new)) for old, new in pairs]
    copies = [(math.log(before / after), 0.0) for before, after in bandwidths if before and after]
    drift = statistics.median([ratio for ratio, _ in others or copies] or [0.0])
    scatter = max((abs(ratio - drift) - error for ratio, error in others + copies), default=0.0)
    return Machine(math.exp(drift), max(0.0, scatter))


def changes(old: dict[Key, Row], new: dict[Key, Row]) -> tuple[list[Change], dict[Key, Machine]]:
    """What became of each measurement that both have, and what the machine did in each group of them."""
    groups: dict[Key, list[Key]] = defaultdict(list)
    for key in new:
        if key in old:
            groups[group_of(key)].append(key)
    machines: dict[Key, Machine] = {}
    found = []
    for group, keys in groups.items():
        machine = machines[group] = machine_of([(old[key], new[key]) for key in keys])
        for key in keys:
            if is_ours(new[key]):
                times = (old[key]["seconds"]["median"], new[key]["seconds"]["median"])
                uncertainty = math.exp(error_of(old[key], new[key]) + machine.scatter)
                found.append(Change(key, *times, ratio_of(old[key], new[key]) / machine.drift, uncertainty))
    return found, machines


def words(key: Key) -> str:
    return " ".join(value.strip('"') for value in key if value != "null")


def show(found: Iterable[Change], tolerance: float) -> str:
    """A line for each change, the slowest first."""
    lines = []
    for change in sorted(found, key=lambda change: -change.ratio):
        verdict = "SLOWER" if change.slower(tolerance) else "faster" if change.faster(tolerance) else ""
        times = f"{1e3 * change.old:9.3f} -> {1e3 * change.new:9.3f} ms"
        uncertainty = f"{change.ratio:6.3f} */ {change.uncertainty:.3f}"
        lines.append(f"{times}  {uncertainty}  {verdict:6}  {words(change.key[: len(IDENTITY)])}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.05, help="a slowdown of less is let pass (default 0.05)")
    options = parser.parse_args()
    found, machines = changes(read(options.old), read(options.new))
    if not found:
        print("expected two files or folders with measurements of ours in common, got none")
        return 2
    print(show(found, options.tolerance))
    for group, machine in machines.items():
        print(
            f"{words(group)}: the machine's drift is {machine.drift:.3f}, two runs come apart by {machine.scatter:.0%}"
        )
    slower = sum(change.slower(options.tolerance) for change in found)
    print(f"{len(found)} measurements, {slower} slower")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
