"""Linear layers of packed bit-planes against those of other libraries; the weights come from memory."""

import argparse
import functools
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from harness import Case, Spread, integers, names, shape_list, steady_seconds, without
from peers import COLD_BYTES, FAMILIES, Shape
from peers.csq import PRECISIONS
from workers import Ready, Worker

from csq_kernels import _native

SETTLE_SECONDS = 0.01  # longer than OpenMP threads spin after a parallel region
FLOAT = ("torch fp32", 32)  # the yardstick, which always runs
AVX2_ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


class ReadCeiling:
    """The bandwidth at which so many threads read as much as a walk stores, measured between the walks.

    A pass also evicts the weights of the walk that follows.
    """

    def __init__(self, threads: int) -> None:
        self.buffer = np.ones(COLD_BYTES, np.uint8)
        self.threads = threads
        self.seconds: list[float] = []

    def read(self) -> None:
        _native.module.read_bandwidth_pass(self.buffer.ctypes.data, self.buffer.nbytes, self.threads)

    def measure(self) -> None:
        self.seconds.append(steady_seconds(self.read))

    def bytes_per_second(self) -> float:
        return self.buffer.nbytes / statistics.median(self.seconds)


Key = tuple[str, int]  # name, bits


def interleave(walks: list[tuple[Worker, Key]], rounds: int, threads: int) -> tuple[dict[Key, Spread], float]:
    """Time all walks in turn, ``rounds`` times after one that does not count, each after a read pass.

    Returns:
        The spread of the seconds a layer of each walk, and the read ceiling in bytes per second.
    """
    ceiling = ReadCeiling(threads)
    times: dict[Key, list[float]] = {key: [] for _, key in walks}
    for _ in range(1 + rounds):
        for worker, key in walks:
            time.sleep(SETTLE_SECONDS)
            ceiling.measure()
            time.sleep(SETTLE_SECONDS)
            worker.ask("time", key)
            times[key].append(worker.answer())
    return {key: Spread.of(t[1:]) for key, t in times.items()}, ceiling.bytes_per_second()


def measure(
    workers: list[Worker], shape: Shape, batch: int, threads: int, rounds: int
) -> tuple[list[dict[str, Any]], bool]:
    """Check, then time one shape, batch and number of threads; return its rows, and whether everything was right."""
    for worker in workers:
        worker.ask("prepare", shape, batch, threads)
    prepared = [(worker, ready) for worker in workers for ready in worker.answer()]
    where = f"{shape[0]}x{shape[1]}, batch {batch}, {threads} threads"
    right = True
    timed: list[tuple[Worker, Ready]] = []
    for worker, ready in prepared:
        if ready.missing is not None:
            without(f"{ready.name}, {where}", ready.missing)
        elif ready.verdict is not None and not ready.verdict.error <= 1:
            right = False
            print(
                f"RED {ready.name} {ready.bits} bits, {where}: {ready.verdict.where}; no time is given", file=sys.stderr
            )
        else:
            timed.append((worker, ready))
    times, ceiling = interleave([(worker, ready.key) for worker, ready in timed], rounds, threads)

    peers = {ready.key: times[ready.key].median for worker, ready in timed if worker.family != "csq"}
    rows = []
    for worker, ready in timed:
        spread = times[ready.key]
        layer_bytes = ready.weight_bytes / ready.layers
        speedup_over = {"fp32": times[FLOAT].median / spread.median}
        wide = [key for key in peers if key[1] >= ready.bits]
        best = min(wide, key=lambda key: peers[key])
        if worker.family == "csq":
            speedup_over["best_peer"] = peers[best] / spread.median
        rows.append(
            {
                "op": "bitserial",
                "provider": ready.name,
                "family": worker.family,
                "stored_bits": ready.bits,
                "activation": ready.activation,
                "shape": list(shape),
                "batch": batch,
                "threads": threads,
                "rounds": rounds,
                "layers": ready.layers,
                "seconds": {"median": spread.median, "p20": spread.p20, "p80": spread.p80},
                "weight_bytes": layer_bytes,
                "weight_bytes_per_second": layer_bytes / spread.median,
                "read_bytes_per_second": ceiling,
                "share_of_read_ceiling": layer_bytes / spread.median / ceiling,
                "speedup_over": speedup_over,
                "best_peer": best[0] if worker.family == "csq" else None,
                "error_over_allowed": ready.verdict.error if ready.verdict is not None else None,
            }
        )
    return sorted(rows, key=lambda row: (row["stored_bits"], row["family"] != "csq", row["provider"])), right


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table of README.md."""
    first = rows[0]
    where = f"{first['shape'][0]}x{first['shape'][1]}, batch {first['batch']}, {first['threads']} threads"
    print(f"\n{where}, read ceiling {first['read_bytes_per_second'] / 1e9:.1f} GB/s")
    columns = "{:>4} {:20} {:>10} {:>10} {:>19} {:>6} {:>7} {:>7} {:>8} {:20} {:>5}"
    print(
        columns.format(*"bits provider activation median p20..p80 GB/s ceiling vs_fp32 vs_peer best_peer error".split())
    )
    for row in rows:
        ms = {name: 1e3 * value for name, value in row["seconds"].items()}
        ratios = {other: f"{ratio:.2f}x" for other, ratio in row["speedup_over"].items()}
        error = row["error_over_allowed"]
        print(
            columns.format(
                row["stored_bits"],
                row["provider"],
                row["activation"],
                f"{ms['median']:.3f} ms",
                f"{ms['p20']:.3f}..{ms['p80']:.3f}",
                f"{row['weight_bytes_per_second'] / 1e9:.1f}",
                f"{row['share_of_read_ceiling']:.0%}",
                ratios["fp32"],
                ratios.get("best_peer", ""),
                row["best_peer"] or "",
                "" if error is None else f"{error:.2f}",
            )
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", action="store_true", help="compare with every library that is installed")
    parser.add_argument("--providers", type=names, help=f"of {','.join(FAMILIES)}; torch fp32 always runs")
    parser.add_argument("--precisions", type=names, default=",".join(PRECISIONS), help="of csq")
    parser.add_argument(
        "--shapes", type=shape_list, default="4096x4096,11008x4096", help="of the weight, with its transpose"
    )
    parser.add_argument("--bits", type=integers, default="1,2,3,4,5,6,7,8", help="stored bits; peers with more run too")
    parser.add_argument("--batches", type=integers, default="1,8,64")
    parser.add_argument("--threads", type=integers, default="1,2")
    parser.add_argument("--rounds", type=int, default=7)


def start(options: argparse.Namespace) -> list[Worker]:
    """A worker for each family that is wanted and there; says which is not, and why."""
    families = options.providers or (list(FAMILIES) if options.peers else ["csq"])
    every_width = range(min(options.bits), FLOAT[1] + 1)
    wanted: dict[str, tuple[Collection[int], Collection[str]]] = {
        "csq": (options.bits, [f"csq {precision}" for precision in options.precisions]),
        "torch": (every_width, [] if "torch" in families else [FLOAT[0]]),
        "onnxruntime": (every_width, []),
        "ggml": (every_width, []),
    }
    workers = []
    for family in dict.fromkeys([*families, "torch"]):
        worker = Worker(family, *wanted[family], options.isa)
        if worker.missing is None:
            workers.append(worker)
        else:
            without(family, worker.missing)
            worker.stop()
    return workers


class Workers:
    """Those of the shape at hand: another shape has workers of its own, whose memory is not yet in pieces."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.shape: Shape | None = None
        self.workers: list[Worker] = []

    def measure(self, shape: Shape, batch: int, threads: int) -> tuple[list[dict[str, Any]], bool]:
        if shape != self.shape:
            self.stop()
            self.shape, self.workers = shape, start(self.options)
        rows, right = measure(self.workers, shape, batch, threads, self.options.rounds)
        versions = {name: version for worker in self.workers for name, version in worker.version.items()}
        return [{**row, "versions": versions} for row in rows], right

    def stop(self) -> None:
        for worker in self.workers:
            worker.stop()


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """One for each shape, batch and number of threads; no process outlives the last of them."""
    if options.isa == "avx2":
        os.environ.update(AVX2_ENVIRONMENT)
        print("avx2: csq and torch keep to it; onnxruntime and ggml cannot be told to and use what the processor has")
    workers = Workers(options)
    try:
        for shape, batch, threads in itertools.product(options.shapes, options.batches, options.threads):
            label = f"{shape[0]}x{shape[1]} batch {batch}, {threads} threads"
            # Some of the time goes with the bytes of the weights, some with the products.
            cost = math.prod(shape) * (8 + batch)
            yield Case(label, cost, functools.partial(workers.measure, shape, batch, threads))
    finally:
        workers.stop()
