"""Which claims about speed on a GPU hold: ``python bench/status.py [--gpu H100] [FOLDER]``, default ``results``.

For each claim: its target, the worst value over the shapes and dtypes of the newest commit that measured it on the
claim's GPU, and whether it holds. A claim without such lines is open.
"""

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Find = Callable[..., Row | None]  # the line of the same shape and run that differs in the given fields only


@dataclass(frozen=True)
class Claim:
    """``value`` of every line that ``lines`` selects keeps to ``target``; None where a line says nothing about it."""

    text: str
    target: float
    lines: dict[str, Any]
    value: Callable[[Row, Find], float | None]
    at_least: bool = True
    gpu: str = "H100"
    fewest_weights: int = 0

    def selects(self, row: Row) -> bool:
        return (
            self.gpu in (row["machine"].get("gpu") or "")
            and all(row.get(key) == value for key, value in self.lines.items())
            and math.prod(row["shape"]) >= self.fewest_weights
        )

    def holds(self, value: float) -> bool:
        return value >= self.target if self.at_least else value <= self.target


def seconds(row: Row) -> float:
    return row["seconds"]["median"]


def backward_share(row: Row, find: Find) -> float | None:
    """The backward pass is what forward+backward takes beyond forward."""
    forward = find(mode="forward")
    if forward is None:
        return None
    return (row["floor_seconds"] - forward["floor_seconds"]) / (seconds(row) - seconds(forward))


def over(baseline: str) -> Callable[[Row, Find], float | None]:
    return lambda row, find: row["speedup_over"].get(baseline)


def time_of_three_planes(row: Row, find: Find) -> float | None:
    every = find(n_bits=8)
    return None if every is None else seconds(row) / seconds(every) / (3 / 8)


def microseconds(row: Row, find: Find) -> float | None:
    return None if row["seconds"] is None else 1e6 * seconds(row)


def over_batch_1(row: Row, find: Find) -> float | None:
    one = find(batch=1)
    return None if one is None or None in (row["seconds"], one["seconds"]) else seconds(row) / seconds(one)


def share_of_cublas(row: Row, find: Find) -> float | None:
    return None if row["seconds"] is None else row["cublas_fp16_seconds"]["median"] / seconds(row)


FORWARD = {"op": "reconstruct", "provider": "csq", "mode": "forward", "n_bits": 8}
BOTH = {**FORWARD, "mode": "forward+backward"}
STEP = {"op": "csq_linear", "provider": "csq", "shape": [8192, 4096, 4096], "dtype": "bfloat16"}
LAUNCH = {"op": "reconstruct_launch", "provider": "csq"}
PACKED = {"op": "bitserial_linear", "provider": "cuda", "shape": [8192, 8192], "dtype": "float16"}
PACKED_MICROSECONDS = {1: 6.0, 2: 9.0, 3: 11.5, 4: 14.5, 6: 20.0, 8: 26.0}
SINGLE_PASS = {"op": "step", "provider": "single-pass", "shape": [4096, 4096], "n_bits": 8}
LARGE = 16 << 20

CLAIMS = [
    Claim("forward, share of copy bandwidth, 16 M weights and more", 0.90, FORWARD,
          lambda row, _: row["share_of_floor"], fewest_weights=LARGE),
    Claim("backward, share of copy bandwidth, 16 M weights and more", 0.85, BOTH, backward_share, fewest_weights=LARGE),
    Claim("small weight, microseconds beyond an empty launch", 3.0, LAUNCH,
          lambda row, _: 1e6 * row["seconds_beyond_empty"], at_least=False),
    Claim("forward, times faster than eager PyTorch per bit", 7.0, FORWARD, over("eager")),
    Claim("forward+backward, times faster than eager PyTorch per bit", 7.0, BOTH, over("eager")),
    Claim("forward, times faster than torch.compile of it", 1.0, FORWARD, over("compiled")),
    Claim("forward+backward, times faster than torch.compile of it", 1.3, BOTH, over("compiled")),
    Claim("extra memory over that of the logits", 0.01, BOTH, lambda row, _: row["extra_memory_over_logits"],
          at_least=False),
    Claim("3 planes of 8, forward: time over 3/8 of the whole", 1.15, {**FORWARD, "n_bits": 3}, time_of_three_planes,
          at_least=False, fewest_weights=LARGE),
    Claim("CSQLinear step over nn.Linear's, 8192 tokens, 4096x4096, bf16", 1.5, STEP, lambda row, _: row["times_float"],
          at_least=False),
    Claim("single-pass step, share of copy bandwidth, 4096x4096", 0.85, SINGLE_PASS,
          lambda row, _: row["share_of_floor"]),
    Claim("single-pass step, times faster than separate kernels and fused SGD, 4096x4096", 2.0, SINGLE_PASS,
          over("separate")),
    *(Claim(f"packed 8192x8192, fp16, batch 1, {bits} bits, microseconds", target,
            {**PACKED, "bits": bits, "batch": 1}, microseconds, at_least=False)
      for bits, target in PACKED_MICROSECONDS.items()),
    Claim("packed 8192x8192, fp16, batch 16 over batch 1", 1.3, {**PACKED, "batch": 16}, over_batch_1, at_least=False),
    Claim("packed 8192x8192, fp16, batch 512, share of cuBLAS fp16", 0.8, {**PACKED, "batch": 512}, share_of_cublas),
]  # fmt: skip


@dataclass(frozen=True)
class Standing:
    """The worst value of a claim at the newest commit that measured it; None if nothing did."""

    claim: Claim
    value: float | None = None
    row: Row | None = None

    @property
    def word(self) -> str:
        if self.value is None:
            return "OPEN: never measured"
        return "holds" if self.claim.holds(self.value) else "OPEN: missed"


def standing(claim: Claim, rows: Iterable[Row]) -> Standing:
    """Judge one claim by the lines of the newest commit."""
    by_commit: dict[str | None, list[Row]] = defaultdict(list)
    for row in rows:
        by_commit[row["commit"]].append(row)
    measured: dict[str | None, list[tuple[float, Row]]] = defaultdict(list)
    for commit, own in by_commit.items():

        def find(row: Row, own: list[Row] = own, **changes: Any) -> Row | None:
            fields = ("op", "provider", "mode", "shape", "dtype", "n_bits", "device", "bits", "batch")
            wanted = {**{key: row.get(key) for key in fields}, **changes}
            same = [other for other in own if all(other.get(key) == value for key, value in wanted.items())]
            same = [other for other in same if other["machine"] == row["machine"]]
            return max(same, key=lambda other: other["time"], default=None)

        for row in filter(claim.selects, own):
            value = claim.value(row, lambda row=row, find=find, **changes: find(row, **changes))
            if value is not None:
                measured[commit].append((value, row))
    if not measured:
        return Standing(claim)
    newest = max(measured.values(), key=lambda found: max(row["time"] for _, row in found))
    worst = (min if claim.at_least else max)(newest, key=lambda found: found[0])
    return Standing(claim, *worst)


def read(folder: Path) -> list[Row]:
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=RESULTS, help="holds JSON lines as run.py writes them")
    parser.add_argument("--gpu", default="H100", help="which lines to judge: part of a name as PyTorch gives it")
    options = parser.parse_args()
    rows = read(options.folder)
    standings = [standing(replace(claim, gpu=options.gpu), rows) for claim in CLAIMS]
    width = max(len(claim.text) for claim in CLAIMS)
    for each in standings:
        claim = each.claim
        line = f"{claim.gpu}  {claim.text:{width}}  {'>=' if claim.at_least else '<='} {claim.target:<4g}  {each.word}"
        if each.row is not None:
            where = f"{'x'.join(map(str, each.row['shape']))} {each.row['dtype']}"
            line += f": {each.value:.3g} at commit {each.row['commit']}, {where}, {each.row['time']}"
        print(line)
    still_open = sum(each.word != "holds" for each in standings)
    print(f"{still_open} of {len(standings)} claims are open")
    return 0


if __name__ == "__main__":
    sys.exit(main())
