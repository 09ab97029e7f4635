"""Time and memory against the number of weights, the bits, the threads and the batch, one of them at a time."""

import argparse
import functools
import math
import os
from typing import Any

import torch
import torch.nn.functional as F
from accuracy import Norms, Verdict, twice
from harness import Case, fits, integers, interleave, names, peak_bytes, report_caught
from peers import csq
from suites import step
from torch import Tensor
from trust import Entry

from csq_kernels import reference

Result = tuple[list[dict[str, Any]], bool]
SWEEPS = ("weights", "bits", "threads", "batch")
OPERATIONS = ("step", "product")
# Where the other axes stand while one is swept: 2^20 weights of a step, 2^22 of a product; 8 and 4 bits.
STEP_WEIGHTS, STEP_BITS = 20, 8
PRODUCT_WEIGHTS, PRODUCT_BITS = 22, 4
BATCHES = (1, 2, 4, 16, 64, 256)
STEP_PROVIDERS = ("eager", "separate", "single-pass", "single-pass-narrow")
# Bytes a weight of a product: codes, and the weight in float64 and float32, whatever the bits.
PRODUCT_CHECK_BYTES = 32


def shape_of(exponent: int) -> tuple[int, int]:
    """A weight of ``2^exponent`` elements, square or twice as high."""
    return 1 << (exponent + 1) // 2, 1 << exponent // 2


def measure_step(sweep: str, weights: int, bits: int, threads: int, options: argparse.Namespace) -> Result:
    """A training step of one weight, SGD, gates moving; as the suite ``step`` measures it."""
    torch.set_num_threads(threads)
    own = argparse.Namespace(**vars(options) | {"providers": options.step_providers, "n_bits": bits})
    rows, right = step.measure(shape_of(weights), "sgd", "moving", own)
    return [row | {"op": "scaling", "mode": "step", "sweep": sweep, "threads": threads} for row in rows], right


def judge(layer: csq.PackedLinear, x: Tensor, weight: Tensor, exact_weight: Tensor) -> Verdict:
    """May err twice as much as a float32 product of the same input, which is rounded first if the precision says so."""
    given = x.double()
    if layer.precision != "exact":
        integers, steps = reference.quantize_rows(x, layer.precision)
        given = (integers.double() * steps.double()).flatten(1)[:, : x.shape[1]]
    exact = F.linear(given, exact_weight)
    found, plain = (Norms().add(y.double() - exact) for y in (layer(x), F.linear(given.float(), weight)))
    return twice("the product", found, plain, Norms().add(exact))


def measure_product(
    sweep: str, weights: int, bits: int, threads: int, batch: int, options: argparse.Namespace
) -> Result:
    """A packed linear layer in each precision, and ``F.linear`` with the same weight in float32."""
    label = f"product of 2^{weights} weights, {bits} bits, batch {batch}"
    if not fits(label, (PRODUCT_CHECK_BYTES + bits) << weights, options.device):
        return [], True
    torch.set_num_threads(threads)
    shape = shape_of(weights)
    x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(0)).to(options.device)
    layers = {f"csq {p}": csq.another(csq.packed(shape, bits), p).to(options.device) for p in csq.PRECISIONS}
    csq.packed.cache_clear()
    with torch.inference_mode():
        codes, scale, n_bits = csq.random_codes(shape, bits).to(options.device), csq.SCALE, csq.n_bits_of(bits)
        weight = reference.hard_weight(codes, scale.to(options.device), n_bits, 0)
        exact_weight = reference.hard_weight(codes, scale.to(options.device).double(), n_bits, 0)
        verdicts = {name: judge(layer, x, weight, exact_weight) for name, layer in layers.items()}
        del codes, exact_weight

    def linear() -> Tensor:
        with torch.inference_mode():
            return F.linear(x, weight)

    def packed(layer: torch.nn.Module) -> Tensor:
        with torch.inference_mode():
            return layer(x)

    entries = {"torch fp32": Entry(linear, inputs=(x,))}
    entries |= {n: Entry(functools.partial(packed, layer), inputs=(x,)) for n, layer in layers.items()}
    red = {name: verdict.where for name, verdict in verdicts.items() if not verdict.error <= 1}
    entries = {name: entry for name, entry in entries.items() if name not in red}
    peaks = {name: peak_bytes(entry, options.device) for name, entry in entries.items()}
    timing = interleave(entries, options.rounds, options.device, lambda name: "torch fp32")
    report_caught(red | timing.caught, label)
    held = {name: layer.planes.nbytes + layer.scale.nbytes for name, layer in layers.items()} | {
        "torch fp32": weight.nbytes
    }
    rows = [
        {
            "op": "scaling",
            "provider": name,
            "mode": "product",
            "sweep": sweep,
            "shape": list(shape),
            "dtype": "float32",
            "stored_bits": bits,
            "batch": batch,
            "threads": threads,
            "device": options.device,
            "rounds": options.rounds,
            "seconds": {"median": spread.median, "p20": spread.p20, "p80": spread.p80},
            "weight_bytes": held[name],
            "peak_bytes": peaks[name],
            # A copy reads and writes, and a product reads: the floor is no lower than this.
            "floor_seconds": held[name] / timing.bandwidth,
            "copy_bytes_per_second": timing.bandwidth,
            "speedup_over": {"fp32": timing.spreads["torch fp32"].median / spread.median},
            "error_over_allowed": verdicts[name].error if name in verdicts else None,
        }
        for name, spread in timing.spreads.items()
    ]
    return rows, not red and not timing.caught


def print_rows(rows: list[dict[str, Any]]) -> None:
    """A line for each provider: what was swept, the time, the bytes a weight that are held and taken at most."""
    for row in rows:
        weights = math.prod(row["shape"])
        step_row = row["mode"] == "step"
        held = row["state_bytes_per_weight"] if step_row else row["weight_bytes"] / weights
        peak = row["peak_bytes_per_weight"] if step_row else row["peak_bytes"] / weights
        bits = row["n_bits"] if step_row else row["stored_bits"]
        print(
            f"{row['mode']:7} 2^{round(math.log2(weights)):<2} weights {bits:2} bits batch {row.get('batch', '-'):>3}",
            f"{row['threads']} threads  {row['provider']:18} {1e3 * row['seconds']['median']:10.4f} ms",
            f"{held:7.2f} bytes a weight, {peak:8.2f} at most",
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    cores = os.cpu_count() or 1
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--operations", type=names, default=",".join(OPERATIONS))
    parser.add_argument("--sweeps", type=names, default=",".join(SWEEPS))
    every = ",".join(map(str, range(12, 29, 2)))
    parser.add_argument("--exponents", type=integers, default=every, help="of 2, the weights; what memory allows")
    parser.add_argument("--bits", type=integers, default=",".join(map(str, range(1, 17))))
    parser.add_argument("--thread-counts", type=integers, default=",".join(map(str, range(1, cores + 1))))
    parser.add_argument("--batches", type=integers, default=",".join(map(str, BATCHES)))
    parser.add_argument("--step-providers", type=names, default=",".join(STEP_PROVIDERS), help="eager always runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)


def cases(options: argparse.Namespace) -> list[Case]:
    """One for each value of each sweep, the cheapest first; no case twice."""
    options.step_providers = [p for p in step.PROVIDERS if p in {"eager", *options.step_providers}]
    found: dict[tuple[str, int, int, int, int], Case] = {}
    for operation in options.operations:
        weights, bits = (STEP_WEIGHTS, STEP_BITS) if operation == "step" else (PRODUCT_WEIGHTS, PRODUCT_BITS)
        usual = {"weights": weights, "bits": bits, "threads": options.threads, "batch": 1}
        values = {
            "weights": options.exponents,
            "bits": options.bits,
            "threads": options.thread_counts,
            "batch": options.batches if operation == "product" else [],
        }
        for sweep in options.sweeps:
            for value in values[sweep]:
                at = usual | {sweep: value}
                if operation == "step":
                    del at["batch"]
                run = measure_step if operation == "step" else measure_product
                label = f"{operation}, {', '.join(f'{name} {each}' for name, each in at.items())}".replace(
                    "weights ", "weights 2^"
                )
                cost = at["bits"] * 2 ** at["weights"] * (40 if operation == "step" else 1 + at["batch"] / 8)
                case = Case(label, cost, functools.partial(run, sweep, *at.values(), options))
                found.setdefault((operation, *at.values()), case)
    return sorted(found.values(), key=lambda case: case.cost)
