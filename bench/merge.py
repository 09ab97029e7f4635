"""Take measurements over from other folders: ``python bench/merge.py OUT...``, such as those of ``gpu.sh``.

Each line goes to the end of ``results/OP.jsonl``, in the order of commits and time, unless it is there already. Lines
of a tree with changes are left out: nobody could measure them again.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness import append_lines

RESULTS = Path(__file__).parent / "results"


def read(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Every measurement in these folders; a last line that was cut off is none."""
    rows = []
    for path in sorted(path for folder in folders for path in folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                print(f"{path}: left out a line that is not whole", file=sys.stderr)
    return rows


def of_a_commit(row: dict[str, Any]) -> bool:
    return bool(row.get("commit")) and not row["commit"].endswith("-dirty") and row["commit"] != "unknown"


def merge(folders: Iterable[Path], results: Path) -> Counter[tuple[str, str]]:
    """Append what is new; return how many lines of each commit and op that were."""
    rows = [row for row in read(folders) if of_a_commit(row)]
    first: dict[str, str] = {}
    for row in sorted(rows, key=lambda row: row["time"]):
        first.setdefault(row["commit"], row["time"])
    known = {json.dumps(row, sort_keys=True) for row in read([results])}
    merged: Counter[tuple[str, str]] = Counter()
    for row in sorted(rows, key=lambda row: (first[row["commit"]], row["time"])):
        line = json.dumps(row, sort_keys=True)
        if line not in known:
            known.add(line)
            append_lines(results / f"{row['op']}.jsonl", [row])
            merged[row["commit"], row["op"]] += 1
    return merged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="hold JSON lines as run.py writes them")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    for folder in options.folders:
        if not folder.is_dir():
            parser.error(f"expected a folder with results, got {folder}")
    merged = merge(options.folders, options.results)
    for (commit, op), count in merged.items():
        print(f"{commit}: {count} lines of {op}")
    print(f"{merged.total()} lines merged")
    return 0


if __name__ == "__main__":
    sys.exit(main())
