"""Throughput of ops and whole networks against PyTorch and others: ``python bench/run.py SUITE``; see README.md.

``python bench/run.py all --minutes 10`` takes every suite that this machine can run in turn, with every provider, and
as many shapes as the minutes allow; it says what it left out. The exit code is 0 if nothing went wrong.
"""

import argparse
import statistics
import sys
import time
import traceback
from pathlib import Path

from harness import announce, append_lines, circumstances
from suites import bitserial, layers, model, reconstruct, scaling, step

from csq_kernels import _native

RESULTS = Path(__file__).parent / "results"
SUITES = {
    "reconstruct": reconstruct,
    "step": step,
    "bitserial": bitserial,
    "model": model,
    "scaling": scaling,
    **layers.SUITES,
}
ISAS = ("avx2", "avx512")
# What ``all`` asks of each suite on a processor: small cases first, of which the first one always runs. The suite whose
# cases take longest comes last and has what the others left.
ALL = {
    "reconstruct": "--rounds 3 --shapes 256x256,1024x1024,4096x4096",
    "step": "--rounds 3 --shapes 256x256,1024x1024,4096x4096",
    "model": "--rounds 3",
    "scaling": "--rounds 3",
    "csq_linear": "--rounds 3",
    "csq_conv2d": "--rounds 3",
    "bitserial": "--peers --rounds 3",
}


def arguments(parser: argparse.ArgumentParser, name: str) -> argparse.ArgumentParser:
    """Give a parser the options of a suite, and those of every suite."""
    SUITES[name].add_options(parser)
    parser.add_argument("--isa", choices=ISAS, help="restrict csq, and what else can be, to this instruction set")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.jsonl", help="JSON lines are appended here")
    return parser


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chosen = parser.add_subparsers(dest="suite", required=True)
    for name, suite in SUITES.items():
        shown = {"description": suite.__doc__, "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
        arguments(chosen.add_parser(name, **shown), name)
    every = chosen.add_parser("all", description="Every suite in turn, within some minutes.")
    every.add_argument("--minutes", type=float, default=10.0, help="all in all, as nearly as the cases allow")
    every.add_argument("--out", type=Path, default=RESULTS, help="folder; JSON lines are appended to its SUITE.jsonl")
    return parser.parse_args()


def expected(cost: float, costs: list[float], times: list[float]) -> float:
    """Seconds of a case: part of what others took, such as compiling, is the same for all, the rest goes with cost."""
    if len(set(costs)) == 1:
        return statistics.mean(times)
    slope, intercept = statistics.linear_regression(costs, times)
    return max(0.0, intercept + slope * cost)


def run(name: str, options: argparse.Namespace, seconds: float | None = None) -> bool:
    """Measure the cases of a suite, print and append their rows; return whether everything was right.

    With ``seconds``, the first case runs, and each further one that fits, by what those before it took.
    """
    suite = SUITES[name]
    if options.isa is not None:
        _native.module.set_isa(options.isa)
    cases = suite.cases(options)
    context = circumstances(getattr(options, "device", "cpu"))
    announce(context)
    all_right = True
    costs: list[float] = []
    times: list[float] = []
    left_out = []
    for case in cases:
        if seconds is not None and times and sum(times) + expected(case.cost, costs, times) > seconds:
            left_out.append(case.label)
            continue
        started = time.monotonic()
        rows, right = case.measure()
        if rows:
            suite.print_rows(rows)
        versions = [{"versions": context["versions"] | row.get("versions", {})} for row in rows]
        append_lines(options.out, [row | context | each for row, each in zip(rows, versions, strict=True)])
        all_right &= right
        costs.append(case.cost)
        times.append(time.monotonic() - started)
    if left_out:
        print(f"{name}: left out for lack of time: {'; '.join(left_out)}")
    return all_right


def run_all(minutes: float, out: Path) -> int:
    """Every suite of ``ALL``; what one of them does not use of its share, the others have."""
    deadline = time.monotonic() + 60 * minutes
    failed = []
    for done, (name, words) in enumerate(ALL.items()):
        print(f"\n=== {name}", flush=True)
        options = arguments(argparse.ArgumentParser(), name).parse_args(
            [*words.split(), "--out", str(out / f"{name}.jsonl")]
        )
        try:
            right = run(name, options, max(0.0, deadline - time.monotonic()) / (len(ALL) - done))
        except Exception:
            traceback.print_exc()
            right = False
        if not right:
            failed.append(name)
    missing = [name for name in SUITES if name not in ALL]
    print(f"\nnot for a processor: {', '.join(missing)}")
    print(f"failed: {', '.join(failed)}" if failed else f"all right: {', '.join(ALL)}")
    return 1 if failed else 0


def main() -> int:
    options = parse()
    if options.suite == "all":
        return run_all(options.minutes, options.out)
    return 0 if run(options.suite, options) else 1


if __name__ == "__main__":
    sys.exit(main())
