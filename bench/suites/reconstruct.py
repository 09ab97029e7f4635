"""Reconstruction of the weight, equation (3), against plain PyTorch."""

import argparse
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._inductor.config
from accuracy import Norms, Verdict, twice
from harness import DTYPES, Case, fits, interleave, peak_bytes, present, report_caught, shape_list
from torch import Tensor
from trust import Entry

from csq_kernels import functional, reference

PROVIDERS = ("reference", "reference-compiled", "eager", "compiled", "csq")
BASELINES = PROVIDERS[:-1]
MODES = ("forward", "forward+backward")
TEMPERATURE = 30.0
BYTES = 60  # that a case takes at most, a weight and bit
SIMD_BITS = {"avx2": 256, "avx512": 512}


def per_bit(
    planes: list[Tensor], gate_logits: Tensor, scale: Tensor, temperature: Tensor, hard_gates: bool = False
) -> Tensor:
    """Equation (3) as one writes it without this library: a tensor, and a parameter, per bit."""
    n_bits = len(planes) // 2
    gates = (gate_logits > 0).to(scale.dtype) if hard_gates else torch.sigmoid(temperature * gate_logits)
    total = torch.zeros_like(planes[0])
    for b in range(n_bits):
        digit = torch.sigmoid(temperature * planes[b]) - torch.sigmoid(temperature * planes[n_bits + b])
        total = total + 2.0**b * gates[b] * digit
    return scale / (2.0**n_bits - 1) * total


class Reconstruct:
    """One weight to reconstruct, with per-layer gates and scale, for every provider."""

    def __init__(self, shape: tuple[int, ...], n_bits: int, device: str, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator(device).manual_seed(0)
        logits = torch.randn(2, n_bits, *shape, generator=generator, device=device).mul_(2 / TEMPERATURE).to(dtype)
        self.device = device
        self.grad_weight = (0.5 + torch.randn(shape, generator=generator, device=device)).to(dtype)
        gate_logits = torch.randn(n_bits, generator=generator, device=device) / TEMPERATURE
        self.gate_logits = gate_logits.requires_grad_()
        self.scale = torch.tensor(0.7, device=device, requires_grad=True)
        self.temperature = torch.tensor(TEMPERATURE, device=device)
        self.bit_logits = logits.requires_grad_()
        # Leaves of their own: slices of one parameter would charge PyTorch for a full gradient per slice.
        self.planes = [plane.detach().clone().requires_grad_() for plane in self.bit_logits.flatten(0, 1)]

    def providers(self) -> dict[str, Callable[[], Tensor]]:
        """The weight, as a function of nothing, by provider."""
        vectors = (self.gate_logits, self.scale, self.temperature)
        constants = (list(range(len(self.planes) // 2)), len(self.planes) // 2, 0, False)
        compiled = torch.compile(per_bit, fullgraph=True, dynamic=False)
        compiled_reference = torch.compile(reference.reconstruct, fullgraph=True, dynamic=False)
        return {
            "reference": lambda: reference.reconstruct(self.bit_logits, *vectors, *constants),
            "reference-compiled": lambda: compiled_reference(self.bit_logits, *vectors, *constants),
            "eager": lambda: per_bit(self.planes, *vectors),
            "compiled": lambda: compiled(self.planes, *vectors),
            "csq": lambda: functional.reconstruct(self.bit_logits, *vectors),
        }

    def clear(self) -> None:
        """Free every gradient, so that each call makes its own."""
        for leaf in (*self.planes, self.bit_logits, self.gate_logits, self.scale):
            leaf.grad = None

    def entry(self, provider: Callable[[], Tensor], mode: str) -> Entry:
        def forward() -> Tensor:
            with torch.no_grad():
                return provider()

        def forward_backward() -> Tensor:
            weight = provider()
            weight.backward(self.grad_weight)
            return weight.detach()

        # Both copies of the logits, since a yardstick reads the other one.
        inputs = (*self.planes, self.bit_logits, self.gate_logits, self.grad_weight)
        run = forward if mode == "forward" else forward_backward
        return Entry(run, self.clear, inputs, lambda weight: [t for ts in self.computed(weight).values() for t in ts])

    def computed(self, weight: Tensor) -> dict[str, list[Tensor]]:
        """The weight that a call returned, the gradient of each plane, and those that are sums, as one tensor."""
        planes = [plane.grad for plane in self.planes if plane.grad is not None]
        if self.bit_logits.grad is not None:
            planes = list(self.bit_logits.grad.flatten(0, 1))
        sums = [leaf.grad.reshape(-1) for leaf in (self.gate_logits, self.scale) if leaf.grad is not None]
        return {"weight": [weight], "grad_bit_logits": planes, "sums": [torch.cat(sums)] if sums else []}

    def outputs(self, entry: Entry) -> dict[str, list[Tensor]]:
        """What one call computes."""
        entry.prepare()
        outputs = self.computed(entry.run())
        entry.prepare()
        return outputs

    def exact(self) -> Iterator[tuple[slice, dict[str, list[Tensor]]]]:
        """``outputs`` in float64, a block of rows at a time to save memory; the last block brings the sums."""
        n_bits = len(self.planes) // 2
        vectors = [t.detach().double() for t in (self.gate_logits, self.scale, self.temperature)]
        constants = (list(range(n_bits)), n_bits, 0, False)
        shape = self.grad_weight.shape
        rows = max(1, (1 << 20) // math.prod(shape[1:]))
        total = torch.zeros(n_bits + 1, dtype=torch.float64, device=self.grad_weight.device)
        for start in range(0, shape[0], rows):
            block = slice(start, start + rows)
            logits = self.bit_logits.detach()[:, :, block].double()
            grad_weight = self.grad_weight[block].double()
            weight = reference.reconstruct(logits, *vectors, *constants)
            grads = reference.reconstruct_backward(grad_weight, logits, *vectors, *constants)
            total += torch.cat([grads[1], grads[2][None]])
            yield block, {"weight": [weight], "grad_bit_logits": list(grads[0].flatten(0, 1))}
        yield slice(None), {"sums": [total]}


Key = tuple[str, str]  # provider, mode


def judge(problem: Reconstruct, entries: dict[Key, Entry]) -> dict[Key, Verdict]:
    """Run every entry once; it may err twice as much as the eager one does against float64, plus one rounding."""
    outputs = {key: problem.outputs(entry) for key, entry in entries.items()}
    errors: dict[tuple[Key, str], Norms] = defaultdict(Norms)
    sizes: dict[str, Norms] = defaultdict(Norms)
    for block, exact in problem.exact():
        for name, tensors in exact.items():
            for i, tensor in enumerate(tensors):
                sizes[name].add(tensor)
                for key, found in outputs.items():
                    if found[name]:
                        errors[key, name].add(found[name][i][block].double() - tensor)
    verdicts: dict[Key, Verdict] = {}
    for (key, name), norms in errors.items():
        dtype = outputs[key][name][0].dtype
        verdict = twice(name, norms, errors[("eager", key[1]), name], sizes[name], dtype)
        if verdict.worse(verdicts.get(key)):
            verdicts[key] = verdict
    return verdicts


def measure(shape: tuple[int, ...], options: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """Check, then time one shape; return its rows, and whether everything was right."""
    label = f"reconstruct {'x'.join(map(str, shape))}"
    if not fits(label, BYTES * options.n_bits * math.prod(shape), options.device):
        return [], True
    torch._dynamo.reset()
    problem = Reconstruct(shape, options.n_bits, options.device, DTYPES[options.dtype])
    providers = problem.providers()
    entries = {(p, mode): problem.entry(providers[p], mode) for mode in MODES for p in options.providers}
    verdicts = judge(problem, entries)
    # A baseline may err more than eager and still be the one to beat; ours may not.
    red = {key: v for key, v in verdicts.items() if key[0] == "csq" and not v.error <= 1}
    entries = {key: entry for key, entry in entries.items() if key not in red}
    memory = {key: peak_bytes(entry, options.device) for key, entry in entries.items()}
    timing = interleave(entries, options.rounds, options.device, lambda key: ("eager", key[1]), ahead=True)
    times, bandwidth = timing.spreads, timing.bandwidth

    weight_bytes = problem.grad_weight.nbytes
    logit_bytes = problem.bit_logits.nbytes
    forward_floor = logit_bytes + weight_bytes
    floors = {"forward": forward_floor, "forward+backward": 2 * forward_floor + logit_bytes}
    outputs = {"forward": weight_bytes, "forward+backward": weight_bytes + logit_bytes}
    rows = []
    for (provider, mode), spread in times.items():
        floor = floors[mode] / bandwidth
        rows.append(
            {
                "op": "reconstruct",
                "provider": provider,
                "mode": mode,
                "shape": list(shape),
                "dtype": options.dtype,
                "n_bits": options.n_bits,
                "device": options.device,
                "rounds": options.rounds,
                "seconds": {"median": spread.median, "p20": spread.p20, "p80": spread.p80},
                "floor_bytes": floors[mode],
                "floor_seconds": floor,
                "copy_bytes_per_second": bandwidth,
                "share_of_floor": floor / spread.median,
                "speedup_over": {
                    other: times[other, mode].median / spread.median
                    for other in BASELINES
                    if (other, mode) in times and other != provider
                },
                "extra_memory_over_logits": max(0, memory[provider, mode] - outputs[mode]) / logit_bytes,
                "error_over_allowed": verdicts[provider, mode].error,
            }
        )
    caught = {key: verdict.where for key, verdict in red.items()} | timing.caught
    report_caught(caught, str(shape))
    return rows, not caught


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table of README.md."""
    print(f"\nreconstruct, copy {rows[0]['copy_bytes_per_second'] / 1e9:.1f} GB/s beside the calls")
    columns = "{:>11} {:16} {:18} {:>11} {:>19} {:>9} {:>6} {:>12} {:>21} {:>9} {:>11} {:>7} {:>6}"
    heads = (
        f"shape mode provider median p20..p80 floor share {' '.join('vs_' + name for name in BASELINES)} memory error"
    )
    print(columns.format(*heads.split()))
    for row in rows:
        ratios = {other: f"{ratio:.2f}x" for other, ratio in row["speedup_over"].items()}
        ms = {name: 1e3 * value for name, value in row["seconds"].items()}
        print(
            columns.format(
                "x".join(map(str, row["shape"])),
                row["mode"],
                row["provider"],
                f"{ms['median']:.2f} ms",
                f"{ms['p20']:.2f}..{ms['p80']:.2f}",
                f"{1e3 * row['floor_seconds']:.2f} ms",
                f"{row['share_of_floor']:.0%}",
                *(ratios.get(name, "") for name in BASELINES),
                f"{row['extra_memory_over_logits']:.2f}",
                f"{row['error_over_allowed']:.2f}",
            )
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--shapes", type=shape_list, default="1024x1024,4096x4096", help="of the weight, comma-separated"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the logits")
    parser.add_argument("--n-bits", type=int, default=8)
    parser.add_argument("--providers", default=",".join(PROVIDERS), help="eager is the yardstick and always runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)


def cases(options: argparse.Namespace) -> list[Case]:
    """One for each shape."""
    providers = [p for p in PROVIDERS if p in {"eager", *options.providers.split(",")}]
    options.providers = present(providers, options.device)
    torch.set_num_threads(options.threads)
    if options.isa is not None:
        torch._inductor.config.cpp.simdlen = SIMD_BITS[options.isa]
    return [
        Case("x".join(map(str, shape)), math.prod(shape), functools.partial(measure, shape, options))
        for shape in options.shapes
    ]
