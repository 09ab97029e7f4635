"""A whole training step of one weight, given the loss's gradient in it: weight, bit gradients, optimizer."""

import argparse
import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch._inductor.config
from accuracy import Norms, Verdict, twice
from harness import Case, Memory, fits, interleave, memory, present, report_caught, shape_list
from suites.reconstruct import SIMD_BITS, per_bit
from torch import Tensor
from trust import Entry

from csq_kernels import functional, optim, reference
from csq_kernels.nn import CSQLinear
from csq_kernels.step import MOMENTUM_BLOCK

PROVIDERS = ("reference", "reference-compiled", "eager", "compiled", "separate", "single-pass", "single-pass-narrow")
BASELINES = PROVIDERS[:-2]
RULES = {"sgd": ("SGD", {"momentum": 0.9}), "adamw": ("AdamW", {"weight_decay": 0.0})}
GATES = ("moving", "fixed")
TEMPERATURE = 30.0
LOGIT_RATE = 1e-3
# Gradients of gates and scale are sums over the weight, whose size Adam alone takes out.
VECTOR_RATES = {"sgd": 1e-6, "adamw": 1e-3}
# Bytes a weight and bit: of a provider, without what it takes within a step, and of that with the float64 check.
BYTES = {name: 17 if name.startswith("single-pass") else 25 for name in PROVIDERS}
CHECK_BYTES = 60
CHECKED_STEPS = 2  # the second one needs the momenta of the first

Outputs = dict[str, list[Tensor]]


class Problem:
    """Where a weight begins and how it is stepped: per-layer gates and scale."""

    def __init__(self, shape: tuple[int, ...], n_bits: int, device: str, rule: str, gates: str) -> None:
        generator = torch.Generator(device).manual_seed(0)
        logits = torch.randn(2, n_bits, *shape, generator=generator, device=device).mul_(2 / TEMPERATURE)
        # Narrow logits begin at the same place.
        self.bit_logits = logits.to(torch.bfloat16).float()
        self.grad_weight = 0.5 + torch.randn(shape, generator=generator, device=device)
        self.gate_logits = torch.randn(n_bits, generator=generator, device=device) / TEMPERATURE
        self.hard_gates = gates == "fixed"
        if self.hard_gates:
            self.gate_logits.abs_()
        self.scale = torch.tensor(0.7, device=device)
        self.temperature = torch.tensor(TEMPERATURE, device=device)
        self.constants = (list(range(n_bits)), n_bits, 0, self.hard_gates)
        self.rule = rule

    def optimizer(self, logits: list[Tensor], vectors: list[Tensor], **options: bool) -> torch.optim.Optimizer:
        """The stock optimizer of this rule."""
        name, arguments = RULES[self.rule]
        groups = [{"params": logits}, {"params": vectors, "lr": VECTOR_RATES[self.rule]}]
        return getattr(torch.optim, name)(groups, lr=LOGIT_RATE, **arguments, **options)

    def provider(self, name: str) -> "Separate | SinglePass":
        """Parameters, gradient and optimizer of their own, before the first step."""
        if name.startswith("single-pass"):
            return SinglePass(self, narrow=name.endswith("narrow"))
        vectors = (self.gate_logits.clone(), self.scale.clone(), self.temperature)
        if name in ("separate", "reference", "reference-compiled"):
            logits = [self.bit_logits.clone()]
            weight = {"separate": functional.reconstruct, "reference": reference.reconstruct}.get(name)
            if weight is None:
                weight = torch.compile(reference.reconstruct, fullgraph=True, dynamic=False)
            constants = dict(zip(("bits", "n_bits", "channel_axis", "hard_gates"), self.constants, strict=True))
            return Separate(self, logits, vectors, lambda: weight(*logits, *vectors, **constants), name == "reference")
        # Leaves of their own: slices of one parameter would charge PyTorch for a full gradient per slice.
        planes = [plane.clone() for plane in self.bit_logits.flatten(0, 1)]
        if name == "eager":
            weight = lambda: per_bit(planes, *vectors, self.hard_gates)  # noqa: E731
            return Separate(self, planes, vectors, weight, foreach=True)
        compiled = torch.compile(per_bit, fullgraph=True, dynamic=False)
        return Separate(self, planes, vectors, lambda: compiled(planes, *vectors, self.hard_gates))


class Separate:
    """A weight computed from parameters, its backward pass, and a stock optimizer."""

    def __init__(
        self,
        problem: Problem,
        logits: list[Tensor],
        vectors: tuple[Tensor, Tensor, Tensor],
        weight: Callable[[], Tensor],
        foreach: bool = False,
    ) -> None:
        self.logits, self.weight = logits, weight
        self.gate_logits, self.scale, _ = vectors
        self.grad_weight = problem.grad_weight.clone()
        trained = [self.scale] if problem.hard_gates else [self.gate_logits, self.scale]
        for leaf in (*logits, *trained):
            leaf.requires_grad_()
        self.optimizer = problem.optimizer(logits, trained, **({"foreach": True} if foreach else {"fused": True}))

    def step(self) -> None:
        self.weight().backward(self.grad_weight)
        self.optimizer.step()

    def clear(self) -> None:
        self.optimizer.zero_grad()

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.grad_weight,)

    @torch.no_grad()
    def weight_now(self, _: None = None) -> list[Tensor]:
        return [self.weight()]

    @torch.no_grad()
    def outputs(self) -> Outputs:
        planes = self.logits if len(self.logits) > 1 else list(self.logits[0].flatten(0, 1))
        vectors = torch.cat([self.gate_logits, self.scale[None]])
        return {"weight": [self.weight()], "bit_logits": planes, "vectors": [vectors]}


class SinglePass:
    """A layer whose weight is the leaf, with its gradient set, and the optimizer that knows the logits."""

    def __init__(self, problem: Problem, narrow: bool) -> None:
        outputs, inputs = problem.grad_weight.shape
        n_bits, device = problem.bit_logits.shape[1], problem.grad_weight.device
        options = {"n_bits": n_bits, "scale_granularity": "layer", "device": device}
        self.layer = CSQLinear(inputs, outputs, bias=False, **options)
        if problem.hard_gates:
            self.layer.fix_scheme_(self.layer.bits)
        with torch.no_grad():
            for name in ("bit_logits", "gate_logits", "scale", "temperature"):
                getattr(self.layer, name).copy_(getattr(problem, name))
        name, arguments = RULES[problem.rule]
        rates = dict.fromkeys(("gate_lr", "scale_lr"), VECTOR_RATES[problem.rule])
        self.optimizer = getattr(optim, name)(self.layer, lr=LOGIT_RATE, **rates, **arguments, narrow=narrow)
        self.layer.weight.grad = problem.grad_weight.clone()

    def step(self) -> None:
        self.optimizer.step()

    def clear(self) -> None:
        """Nothing: the gradient that is given stays, and there is no other."""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.layer.weight.grad,)

    def weight_now(self, _: None = None) -> list[Tensor]:
        return [self.layer.weight]

    @torch.no_grad()
    def outputs(self) -> Outputs:
        planes = list(self.layer.bit_logits.flatten(0, 1))
        vectors = torch.cat([self.layer.gate_logits, self.layer.scale[None]])
        return {"weight": [self.layer.weight], "bit_logits": planes, "vectors": [vectors]}


class Exact:
    """The same steps in float64 by the reference and the stock optimizer, a block of rows at a time to save memory."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.vectors = [vector.double() for vector in (problem.gate_logits, problem.scale, problem.temperature)]
        self.vector_optimizer = problem.optimizer([], self.vectors[problem.hard_gates : 2])
        shape = problem.grad_weight.shape
        rows = max(1, (1 << 20) // math.prod(shape[1:]))
        self.blocks = []
        for start in range(0, shape[0], rows):
            block = slice(start, start + rows)
            logits = problem.bit_logits[:, :, block].double()
            self.blocks.append((block, logits, problem.optimizer([logits], [])))

    def step(self) -> None:
        gates, scale, _ = self.vectors
        gates.grad, scale.grad = torch.zeros_like(gates), torch.zeros_like(scale)
        for block, logits, optimizer in self.blocks:
            grad_weight = self.problem.grad_weight[block].double()
            grads = reference.reconstruct_backward(grad_weight, logits, *self.vectors, *self.problem.constants)
            logits.grad = grads[0]
            optimizer.step()
            logits.grad = None
            gates.grad += grads[1]
            scale.grad += grads[2]
        self.vector_optimizer.step()

    def forget_momenta(self) -> None:
        """Free what further steps would need."""
        for _, _, optimizer in self.blocks:
            optimizer.state.clear()

    def outputs(self) -> Iterator[tuple[slice, Outputs]]:
        """Of each block; the last one brings gates and scale."""
        for block, logits, _ in self.blocks:
            weight = reference.reconstruct(logits, *self.vectors, *self.problem.constants)
            yield block, {"weight": [weight], "bit_logits": list(logits.flatten(0, 1))}
        yield slice(None), {"vectors": [torch.cat([self.vectors[0], self.vectors[1][None]])]}


def build(problem: Problem, name: str, device: str) -> tuple[Separate | SinglePass, Memory]:
    """Make a provider and let it take ``CHECKED_STEPS`` steps.

    Returns:
        The provider, and its bytes: what it holds when a step has ended, gradients included, and the most within one.
    """
    provider, made = memory(lambda: problem.provider(name), device)
    state = made
    for _ in range(CHECKED_STEPS):
        held = state.held + memory(provider.clear, device)[1].held
        _, step = memory(provider.step, device)
        state = Memory(held + step.held, held + step.peak)
    return provider, state


def errors_of(provider: Separate | SinglePass, exact: Exact) -> dict[str, Norms]:
    found = provider.outputs()
    errors: dict[str, Norms] = defaultdict(Norms)
    for block, outputs in exact.outputs():
        for name, tensors in outputs.items():
            for tensor, mine in zip(tensors, found[name], strict=True):
                errors[name].add(mine[block].double() - tensor)
    return errors


def judge(name: str, errors: dict[str, Norms], baseline: dict[str, Norms], sizes: dict[str, Norms]) -> Verdict:
    """Twice the error of eager is allowed; narrow state is also rounded, by up to a whole step, at each step."""
    narrow = (torch.bfloat16, CHECKED_STEPS) if name.endswith("narrow") else (torch.float32, 1)
    worst: Verdict | None = None
    for output, norms in errors.items():
        verdict = twice(output, norms, baseline[output], sizes[output], *narrow)
        if verdict.worse(worst):
            worst = verdict
    assert worst is not None
    return worst


def floor_bytes(rule: str, gates: str, n_bits: int, narrow: bool) -> float:
    """Bytes a weight that a step must move, all in one pass but for the sums, which come before."""
    logits = 2 * n_bits * (2 if narrow else 4)
    momenta = 2 * n_bits * (1 + 4 / MOMENTUM_BLOCK if narrow else 4) * (1 if rule == "sgd" else 2)
    grad_weight = weight = 4
    sums = grad_weight + (weight if gates == "fixed" else logits)
    return sums + grad_weight + 2 * (logits + momenta) + weight


def measure(
    shape: tuple[int, ...], rule: str, gates: str, options: argparse.Namespace
) -> tuple[list[dict[str, Any]], bool]:
    """Check and weigh, then time one shape; return its rows, and whether everything was right."""
    needed = CHECK_BYTES + sum(BYTES[name] for name in options.providers)
    label = f"step {'x'.join(map(str, shape))}"
    if not fits(label, needed * options.n_bits * math.prod(shape), options.device):
        return [], True
    torch._dynamo.reset()
    problem = Problem(shape, options.n_bits, options.device, rule, gates)
    exact = Exact(problem)
    for _ in range(CHECKED_STEPS):
        exact.step()
    exact.forget_momenta()
    sizes: dict[str, Norms] = defaultdict(Norms)
    for _, outputs in exact.outputs():
        for name, tensors in outputs.items():
            for tensor in tensors:
                sizes[name].add(tensor)
    entries, verdicts, state = {}, {}, {}
    baseline: dict[str, Norms] = {}
    for name in options.providers:
        provider, state[name] = build(problem, name, options.device)
        errors = errors_of(provider, exact)
        baseline = baseline or errors
        verdicts[name] = judge(name, errors, baseline, sizes)
        # Of the logits not all are looked at: the weight says enough.
        entries[name] = Entry(provider.step, provider.clear, provider.inputs, provider.weight_now)
    del exact
    # A baseline may err more than eager and still be the one to beat; ours may not.
    red = {name: v for name, v in verdicts.items() if name not in BASELINES and not v.error <= 1}
    entries = {name: entry for name, entry in entries.items() if name not in red}
    timing = interleave(entries, options.rounds, options.device, lambda name: "eager", ahead=True)
    times, bandwidth = timing.spreads, timing.bandwidth
    weights = math.prod(shape)
    rows = []
    for name, spread in times.items():
        floor = floor_bytes(rule, gates, options.n_bits, name.endswith("narrow"))
        rows.append(
            {
                "op": "step",
                "provider": name,
                "rule": rule,
                "gates": gates,
                "shape": list(shape),
                "dtype": "float32",
                "n_bits": options.n_bits,
                "device": options.device,
                "rounds": options.rounds,
                "seconds": {"median": spread.median, "p20": spread.p20, "p80": spread.p80},
                "floor_bytes_per_weight": floor,
                "floor_seconds": floor * weights / bandwidth,
                "copy_bytes_per_second": bandwidth,
                "share_of_floor": floor * weights / bandwidth / spread.median,
                "speedup_over": {
                    other: times[other].median / spread.median
                    for other in BASELINES
                    if other in times and other != name
                },
                "state_bytes_per_weight": state[name].held / weights,
                "peak_bytes_per_weight": state[name].peak / weights,
                "error_over_allowed": verdicts[name].error,
            }
        )
    caught = {name: verdict.where for name, verdict in red.items()} | timing.caught
    report_caught(caught, f"{rule} {gates} {shape}")
    return rows, not caught


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The table of README.md."""
    print(f"\nstep, copy {rows[0]['copy_bytes_per_second'] / 1e9:.1f} GB/s beside the calls")
    columns = "{:>11} {:5} {:6} {:18} {:>11} {:>19} {:>9} {:>6}" + " {:>11}" * len(BASELINES) + " {:>6} {:>6} {:>6}"
    against = [f"vs_{name}".replace("reference", "ref") for name in BASELINES]
    heads = ["shape", "rule", "gates", "provider", "median", "p20..p80", "floor", "share", *against, "state", "peak"]
    print(columns.format(*heads, "error"))
    for row in rows:
        ratios = {other: f"{ratio:.2f}x" for other, ratio in row["speedup_over"].items()}
        ms = {name: 1e3 * value for name, value in row["seconds"].items()}
        print(
            columns.format(
                "x".join(map(str, row["shape"])),
                row["rule"],
                row["gates"],
                row["provider"],
                f"{ms['median']:.2f} ms",
                f"{ms['p20']:.2f}..{ms['p80']:.2f}",
                f"{1e3 * row['floor_seconds']:.2f} ms",
                f"{row['share_of_floor']:.0%}",
                *(ratios.get(name, "") for name in BASELINES),
                f"{row['state_bytes_per_weight']:.1f}",
                f"{row['peak_bytes_per_weight']:.1f}",
                f"{row['error_over_allowed']:.2f}",
            )
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--shapes", type=shape_list, default="1024x1024,4096x4096", help="of the weight, comma-separated"
    )
    parser.add_argument("--rules", default=",".join(RULES), help="of the optimizer")
    parser.add_argument("--gates", default=",".join(GATES), help="moving as while searching, fixed as in finetuning")
    parser.add_argument("--n-bits", type=int, default=8)
    parser.add_argument("--providers", default=",".join(PROVIDERS), help="eager is the yardstick and always runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)


def cases(options: argparse.Namespace) -> list[Case]:
    """One for each shape, rule and kind of gates."""
    providers = [p for p in PROVIDERS if p in {"eager", *options.providers.split(",")}]
    options.providers = present(providers, options.device)
    torch.set_num_threads(options.threads)
    if options.isa is not None:
        torch._inductor.config.cpp.simdlen = SIMD_BITS[options.isa]
    return [
        Case(
            f"{'x'.join(map(str, shape))} {rule} {gates}",
            math.prod(shape),
            functools.partial(measure, shape, rule, gates, options),
        )
        for shape, rule, gates in itertools.product(options.shapes, options.rules.split(","), options.gates.split(","))
    ]
