"""What the tests share: cases as data, their inputs, the float64 answer, and the rule that judges an error."""

import random
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from csq_kernels import reference
from csq_kernels.nn import CSQLayer

FLOAT32, FLOAT64, BFLOAT16, FLOAT16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


class Arguments(NamedTuple):
    """The arguments of ``csq::reconstruct``, in its order."""

    bit_logits: Tensor
    gate_logits: Tensor
    scale: Tensor
    temperature: Tensor
    bits: list[int]
    n_bits: int
    channel_axis: int = 0
    hard_gates: bool = False

    def to(self, target: torch.dtype | str) -> "Arguments":
        """The same values with every tensor in a dtype, or on a device."""
        return self._replace(**{name: getattr(self, name).to(target) for name in TENSORS})


TENSORS = ("bit_logits", "gate_logits", "scale", "temperature")
OUTPUTS = ("weight", "grad_bit_logits", "grad_gate_logits", "grad_scale")


@dataclass(frozen=True)
class Case:
    """One combination of everything that an implementation of ``reconstruct`` may treat differently."""

    shape: tuple[int, ...]
    bits: tuple[int, ...] = (0, 1, 2, 3)
    n_bits: int = 4
    temperature: float = 30.0
    gates_per_channel: bool = False
    scale_per_channel: bool = False
    channel_axis: int = 0
    dtype: torch.dtype = FLOAT32
    vector_dtype: torch.dtype | None = None  # of gate_logits and scale; default: the working dtype
    hard_gates: bool = False
    layout: str = "compact"  # or "permuted", "strided": how bit_logits and grad_weight lie in memory

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)) or "scalar", f"n{self.n_bits}", f"beta{self.temperature:g}"]
        if self.bits != tuple(range(self.n_bits)):
            words.append("bits" + ".".join(map(str, self.bits)))
        words += [f"gates@{self.channel_axis}"] * self.gates_per_channel
        words += [f"scale@{self.channel_axis}"] * self.scale_per_channel
        words += [str(d).removeprefix("torch.") for d in (self.dtype, self.vector_dtype) if d not in (None, FLOAT32)]
        words += ["hard"] * self.hard_gates
        words += [self.layout] * (self.layout != "compact")
        return "-".join(words)

    def arguments(self, seed: int = 0) -> Arguments:
        """Inputs in which half of the logits are undecided at this temperature and half are spread around 0."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=FLOAT64)

        logits = normal(2, len(self.bits), *self.shape)
        undecided = torch.rand(logits.shape, generator=generator) < 0.5
        logits = torch.where(undecided, 2 * logits / self.temperature, 0.5 * logits).to(self.dtype)
        channels = [self.shape[self.channel_axis]] if self.gates_per_channel or self.scale_per_channel else []
        vector_dtype = self.vector_dtype or torch.promote_types(self.dtype, FLOAT32)
        gates = 1.5 * normal(len(self.bits), *channels * self.gates_per_channel) / self.temperature
        scale = 0.5 + normal(*channels * self.scale_per_channel).abs()
        return Arguments(
            lay_out(logits, self.layout),
            gates.to(vector_dtype),
            scale.to(vector_dtype),
            torch.tensor(self.temperature, dtype=torch.promote_types(vector_dtype, FLOAT32)),
            list(self.bits),
            self.n_bits,
            self.channel_axis,
            self.hard_gates,
        )

    def grad_weight(self, seed: int = 0) -> Tensor:
        """A ``dL/dW`` for this case, off centre so that the sums (5), (6) do not vanish."""
        generator = torch.Generator().manual_seed(seed + 1)
        grad = 0.5 + torch.randn(self.shape, generator=generator, dtype=FLOAT64)
        return lay_out(grad.to(self.dtype), self.layout)


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same values and shape: compact, with the axes in reverse order in memory, or as every second element."""
    if layout == "permuted":
        backwards = list(range(values.ndim))[::-1]
        return values.permute(backwards).contiguous().permute(backwards)
    if layout == "strided" and values.ndim > 0:
        wide = torch.full((*values.shape, 2), torch.nan, dtype=values.dtype)
        wide[..., 0] = values
        return wide[..., 0]
    return values


_ALL8 = tuple(range(8))

CASES = [
    Case(()),
    Case((), _ALL8, 8, 200.0, hard_gates=True),
    Case((1,)),
    Case((1,), (0,), 1, 1.0, scale_per_channel=True),
    *(Case((size,), (0, 1, 2), 3) for size in (2, 3, 5, 7, 8, 9, 13, 15, 16, 17, 31)),
    *(Case((size,), _ALL8, 8, 200.0) for size in (4095, 4096, 4097)),
    *(Case((37, 29), tuple(range(n)), n, 30.0) for n in range(1, 17)),
    *(Case((37, 29), _ALL8, 8, temperature) for temperature in (1.0, 200.0, 5000.0)),
    # Pruned planes leave gaps; no plane at all is a weight of zeros.
    Case((17, 31), (0, 3, 7), 8),
    Case((17, 31), (15,), 16, 200.0),
    Case((17, 31), (2, 3, 9), 11, scale_per_channel=True, gates_per_channel=True),
    Case((17, 31), (), 4),
    Case((17, 31), (), 4, gates_per_channel=True, scale_per_channel=True),
    # The channel first, last and in the middle; gates and scale per channel or per layer.
    *(
        Case((7, 31), _ALL8, 8, gates_per_channel=gates, scale_per_channel=scale, channel_axis=axis)
        for gates, scale in ((True, False), (False, True), (True, True))
        for axis in (0, 1)
    ),
    Case((1031,), (0, 1), 2, gates_per_channel=True, scale_per_channel=True),
    Case((1, 1031), (0, 1), 2, gates_per_channel=True, scale_per_channel=True),
    Case((1031, 1), (0, 1), 2, gates_per_channel=True, scale_per_channel=True, channel_axis=1),
    Case((3, 5, 7), _ALL8, 8, gates_per_channel=True, scale_per_channel=True, channel_axis=2),
    Case((67, 1, 3, 3), _ALL8, 8, 200.0, scale_per_channel=True),
    Case((67, 1, 3, 3), _ALL8, 8, gates_per_channel=True, scale_per_channel=True),
    Case((13, 19, 3, 3), _ALL8, 8, 200.0, scale_per_channel=True, channel_axis=1),
    Case((4, 6, 5, 5), (0, 1, 2, 3, 4), 5, gates_per_channel=True, hard_gates=True),
    Case((4, 6, 5, 5), (0, 1, 2, 3, 4), 5, hard_gates=True),
    # Nothing to compute, but every output must have its shape and sums must be 0.
    Case((0, 5)),
    Case((0, 5), gates_per_channel=True, scale_per_channel=True, channel_axis=1),
    Case((0, 5), gates_per_channel=True, scale_per_channel=True, channel_axis=0),
    *(
        Case((19, 23), _ALL8, 8, scale_per_channel=scale, layout=layout, channel_axis=axis)
        for layout in ("permuted", "strided")
        for scale, axis in ((False, 0), (True, 1))
    ),
    Case((11, 5, 3, 3), (0, 2, 5), 6, gates_per_channel=True, layout="permuted"),
    *(
        Case((37, 29), _ALL8, 8, 200.0, dtype=dtype, scale_per_channel=scale, gates_per_channel=gates)
        for dtype in (BFLOAT16, FLOAT16)
        for scale, gates in ((False, False), (True, True))
    ),
    Case((4097,), _ALL8, 8, dtype=BFLOAT16),
    Case((4097,), _ALL8, 8, dtype=FLOAT16),
    Case((37, 29), _ALL8, 8, dtype=BFLOAT16, vector_dtype=BFLOAT16, scale_per_channel=True, gates_per_channel=True),
    Case((37, 29), _ALL8, 8, dtype=FLOAT16, vector_dtype=FLOAT16),
    Case((37, 29), _ALL8, 8, dtype=BFLOAT16, layout="permuted"),
    Case((37, 29), _ALL8, 8, dtype=FLOAT32, vector_dtype=FLOAT64, gates_per_channel=True),
]


def make_case(seed: int) -> Case:
    """A random case: what nobody thought of writing down above."""
    draw = random.Random(seed)
    shape = tuple(draw.choice((1, 2, 3, 7, 8, 9, 16, 17, 31, 64, 65)) for _ in range(draw.randint(1, 3)))
    n_bits = draw.randint(1, 16)
    return Case(
        shape,
        tuple(sorted(draw.sample(range(n_bits), draw.randint(1, n_bits)))),
        n_bits,
        draw.choice((1.0, 30.0, 200.0, 5000.0)),
        draw.random() < 0.4,
        draw.random() < 0.4,
        draw.randrange(len(shape)),
        draw.choice((FLOAT32, FLOAT32, BFLOAT16, FLOAT16)),
        None,
        draw.random() < 0.3,
        draw.choice(("compact", "permuted", "strided")),
    )


def autograd_of_reference(arguments: Arguments, grad_weight: Tensor) -> tuple[Tensor, ...]:
    """``OUTPUTS`` by PyTorch's autograd of ``reference.reconstruct``: exact in float64, eager in any other dtype."""
    leaves = [t.detach().clone().requires_grad_() for t in arguments[:3]]
    weight = reference.reconstruct(*leaves, *arguments[3:])
    if weight.requires_grad:
        weight.backward(grad_weight)
    grads = (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)
    return (weight.detach(), *grads)


def exact_outputs(arguments: Arguments, grad_weight: Tensor) -> tuple[Tensor, ...]:
    """``OUTPUTS`` in float64, for the values that the given tensors hold."""
    return autograd_of_reference(arguments.to(FLOAT64), grad_weight.to(FLOAT64))


def pool(outputs: list[tuple[Tensor, ...]]) -> list[Tensor]:
    """Stack the outputs of several seeds: the error of one scalar is luck, that of several is a measure."""
    return [torch.stack(values) for values in zip(*outputs, strict=True)]


def assert_within(actual: Tensor, exact: Tensor, eager: Tensor, factor: float = 2, name: str = "result") -> None:
    """Fail unless the error is at most ``factor`` times that of plain PyTorch plus one rounding.

    Both the largest error and the root mean square are judged, so that neither an outlier nor a bias can hide.

    Args:
        actual: what is judged.
        exact: the same in float64.
        eager: the same from plain PyTorch in the dtype of ``actual``.
        factor: what counts as equally good.
        name: what to call the result in a message.
    """
    assert actual.shape == exact.shape == eager.shape, f"{name}: {actual.shape}, {exact.shape}, {eager.shape}"
    assert actual.dtype == eager.dtype, f"{name}: {actual.dtype} instead of {eager.dtype}"
    assert exact.dtype == FLOAT64, f"{name}: judged against {exact.dtype}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: {(~torch.isfinite(actual)).sum()} elements are not finite"
    # Half an epsilon bounds one rounding. flash-attention takes x + 0.3 - 0.3 - x instead, which is 0 for a lucky x and
    # hundreds of roundings for a small one.
    rounding = exact * torch.finfo(actual.dtype).eps / 2
    errors = {"actual": actual.double() - exact, "eager": eager.double() - exact, "rounding": rounding}
    norms = {"largest": lambda e: e.abs().max().item(), "root mean square": lambda e: e.square().mean().sqrt().item()}
    for norm, measure in norms.items():
        error, allowed, one = (measure(e) for e in errors.values())
        assert error <= factor * (allowed + one), (
            f"{name}: {norm} error {error:.3e} exceeds {factor} x (eager {allowed:.3e} + rounding {one:.3e})"
        )


def harden(layer: CSQLayer, active: Collection[int], seed: int = 0) -> CSQLayer:
    """Random digits at the active exponents and a random scale, hard; gates per channel close at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.bit_logits.copy_(torch.randn(layer.bit_logits.shape, generator=generator))
        gates = torch.tensor([1.0 if bit in active else -1.0 for bit in range(layer.n_bits)])
        if layer.gate_logits.ndim == 2:
            open_gates = torch.rand(layer.gate_logits.shape, generator=generator) < 0.7
            gates = torch.where(open_gates, gates[:, None], -1.0)
        layer.gate_logits.copy_(gates)
        layer.scale.copy_(0.5 + torch.rand(layer.scale.shape, generator=generator))
    layer.harden_()
    return layer.eval()
