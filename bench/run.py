"""Throughput of ops and layers against plain PyTorch and others: ``python bench/run.py OP``; see README.md."""

import argparse
import sys
from pathlib import Path

from harness import append_lines
from suites import bitserial, layers, reconstruct, step

from csq_kernels import _native

RESULTS = Path(__file__).parent / "results"
OPS = {"reconstruct": reconstruct, "step": step, "bitserial": bitserial, **layers.SUITES}
ISAS = ("avx2", "avx512")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    ops = parser.add_subparsers(dest="op", required=True)
    for name, suite in OPS.items():
        op = ops.add_parser(name, description=suite.__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        suite.add_options(op)
        op.add_argument("--isa", choices=ISAS, help="restrict csq, and what else can be, to this instruction set")
        op.add_argument("--out", type=Path, default=RESULTS / f"{name}.jsonl", help="JSON lines are appended here")
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.isa is not None:
        _native.module.set_isa(options.isa)
    all_right = True
    for rows, right in OPS[options.op].run(options):
        all_right &= right
        append_lines(options.out, rows)
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
