"""Layers in a single-pass step, drawn from a case, and what one step makes of them."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from helpers import BFLOAT16, FLOAT32, FLOAT64, Case, assert_within, pool
from torch import Tensor

from csq_kernels import reference, reference_step
from csq_kernels.step import MOMENTUM_BLOCK, NARROW, Rule, StepLayer, Vectors, check_step, mix, momentum_scale_shape

RULES = {
    "plain": Rule.sgd(1, 0.05, 0.0, 0.0, False, False),
    "sgd": Rule.sgd(3, 0.05, 0.9, 0.1, False, True),
    "nesterov": Rule.sgd(3, 0.05, 0.9, 0.0, True, False),
    "adam": Rule.adam(7, 0.01, (0.9, 0.99), 1e-8, False),
}


@dataclass(frozen=True)
class StepCase:
    """A weight and how it is stepped."""

    weight: Case
    rule: str = "sgd"
    narrow: bool = False  # momenta in float8
    weight_dtype: torch.dtype = FLOAT32

    def __str__(self) -> str:
        words = [str(self.weight), self.rule, *["narrow"] * self.narrow]
        return "-".join([*words, *["bf16_weight"] * (self.weight_dtype == BFLOAT16)])

    def layer(self, seed: int = 0, device: str = "cpu") -> StepLayer:
        """The layer between backward pass and update: its weight belongs to the vectors before the step."""
        arguments = self.weight.arguments(seed)
        logits = arguments.bit_logits.contiguous()
        before = Vectors(*arguments[1:4])
        generator = torch.Generator().manual_seed(seed + 2)

        def near(values: Tensor, spread: float) -> Tensor:
            noise = torch.randn(values.shape, generator=generator, dtype=FLOAT64)
            return (values + spread * noise).to(values.dtype)

        after = Vectors(
            near(before.gate_logits, 0.1 / self.weight.temperature), near(before.scale, 0.05), 1.25 * before.temperature
        )
        rule = RULES[self.rule]
        momenta = [near(torch.zeros(logits.shape), 0.3) for _ in range(rule.momenta)]
        if rule.momenta == 2:
            momenta[1] = momenta[1].square()
        scales = []
        if self.narrow:
            for i, momentum in enumerate(momenta):
                random = reference_step.random_words(logits.shape, seed, momentum.device)
                codes, scale = reference_step.narrow(momentum, random, root=i == 1)
                momenta[i] = codes.contiguous()
                scales.append(scale)
        gradient = self.weight.grad_weight(seed).to(self.weight_dtype)
        layer = StepLayer(
            weight=reference.reconstruct(logits.float(), *before, *arguments[4:]).to(self.weight_dtype),
            grad_weight=gradient,
            bit_logits=logits,
            before=before,
            after=after,
            bits=self.weight.bits,
            n_bits=self.weight.n_bits,
            channel_axis=self.weight.channel_axis,
            hard_gates=self.weight.hard_gates,
            rule=rule,
            momenta=tuple(momenta),
            momentum_scales=tuple(scales),
            key=mix(seed, 3),
        )
        check_step(layer)
        return changed(layer, lambda tensor: tensor.to(device))


def changed(layer: StepLayer, change: Callable[[Tensor], Tensor]) -> StepLayer:
    """The layer with every tensor changed."""

    def apply(value: object) -> object:
        if isinstance(value, Tensor):
            return change(value)
        if isinstance(value, Vectors):
            return Vectors(*map(change, value))
        return tuple(map(change, value)) if value and isinstance(value, tuple) else value

    fields = {field.name: getattr(layer, field.name) for field in dataclasses.fields(layer)}
    return dataclasses.replace(layer, **{n: v if n == "bits" else apply(v) for n, v in fields.items()})


def copy(layer: StepLayer) -> StepLayer:
    return changed(layer, torch.Tensor.clone)


def exact(layer: StepLayer) -> StepLayer:
    """The same values in float64, where nothing is rounded stochastically."""
    momenta = layer.momenta
    if layer.momentum_scales:
        narrow = zip(momenta, layer.momentum_scales, (False, True), strict=False)
        momenta = tuple(reference_step.widen(*arguments) for arguments in narrow)
    wide = dataclasses.replace(layer, momenta=momenta, momentum_scales=())
    return changed(wide, lambda tensor: tensor.to(FLOAT64))


class Stepped(NamedTuple):
    """What a step computes."""

    grad_gates: Tensor
    grad_scale: Tensor
    bit_logits: Tensor
    weight: Tensor
    momenta: tuple[Tensor, ...]
    momentum_scales: tuple[Tensor, ...]

    def flat(self) -> tuple[Tensor, ...]:
        return (*self[:4], *self.momenta, *self.momentum_scales)


class Backend(NamedTuple):
    """The functions of ``step.STEP_OPS``, and the reconstruction that belongs to them."""

    step_sums: Callable[[StepLayer], tuple[Tensor, Tensor]]
    step_update: Callable[[Sequence[StepLayer]], None]
    reconstruct: Callable[..., Tensor]

    def step(self, layers: Sequence[StepLayer]) -> list[Stepped]:
        """One step of copies of the layers, all at once."""
        copies = [copy(layer) for layer in layers]
        sums = [self.step_sums(layer) for layer in copies]
        self.step_update(copies)
        return [
            Stepped(*found, layer.bit_logits, layer.weight, layer.momenta, layer.momentum_scales)
            for found, layer in zip(sums, copies, strict=True)
        ]


REFERENCE = Backend(reference_step.step_sums, reference_step.step_update, reference.reconstruct)


def assert_step(backend: Backend, case: StepCase, seeds: int, device: str = "cpu") -> None:
    """Fail unless a step is within twice the error of PyTorch, and its weight is what its logits make, bit for bit.

    Sums are few numbers, so they are drawn several times: the error of one is luck.
    """
    layers = [case.layer(seed, device) for seed in range(seeds)]
    actual = backend.step(layers)
    eager = REFERENCE.step(layers)
    wanted = REFERENCE.step([exact(layer) for layer in layers])
    for name in Stepped._fields[:4]:
        every = (pool([(getattr(stepped, name),) for stepped in steps])[0] for steps in (actual, wanted, eager))
        assert_within(*every, name=name)
    for i in range(len(actual[0].momenta)):
        assert_momentum(i, actual, wanted, eager)
    for layer, own in zip(layers, actual, strict=True):
        logits = own.bit_logits.to(FLOAT32) if layer.weight.dtype == FLOAT32 else own.bit_logits
        if logits.dtype == layer.weight.dtype:
            assert torch.equal(own.weight, backend.reconstruct(logits, *layer.after, **layer.constants()))


def assert_momentum(i: int, actual: list[Stepped], exact: list[Stepped], eager: list[Stepped]) -> None:
    """A momentum, or the scales of a narrow one, keep to the rule; few of its codes differ, and by one."""
    own, wanted, other = (torch.stack([stepped.momenta[i] for stepped in steps]) for steps in (actual, exact, eager))
    if not actual[0].momentum_scales:
        assert_within(own, wanted, other, name=f"momentum {i}")
        return
    assert own.dtype == NARROW
    shape = momentum_scale_shape(own[0])
    scales, other_scales = (torch.stack([stepped.momentum_scales[i] for stepped in steps]) for steps in (actual, eager))
    assert scales.shape[1:] == shape
    flat = (wanted if i == 0 else wanted.sqrt()).reshape(*wanted.shape[:3], -1)
    padded = torch.nn.functional.pad(flat, (0, shape[2] * MOMENTUM_BLOCK - flat.shape[3]))
    largest = padded.unflatten(3, (shape[2], MOMENTUM_BLOCK)).abs().amax(-1)
    assert_within(scales, largest / torch.finfo(NARROW).max, other_scales, name=f"scales of momentum {i}")
    codes = [(c.view(torch.uint8) & 0x7F).int() * torch.where(c.float() < 0, -1, 1) for c in (own, other)]
    distance = (codes[0] - codes[1]).abs()
    assert distance.max() <= 1
    assert distance.count_nonzero() <= 2 + 1e-4 * distance.numel()


def small_scales(scale_per_channel: bool, inner: int) -> list[StepLayer]:
    """Layers with fixed gates whose scales are too small to divide by, the first four if there is one a channel."""
    case = StepCase(Case((9, inner), (0, 1, 3), 4, scale_per_channel=scale_per_channel, hard_gates=True))
    layers = []
    for seed in range(8):
        layer = case.layer(seed)
        layer.before.scale.view(-1)[:4] = torch.tensor([0.0, 1e-30, -1e-42, -0.0])[: layer.before.scale.numel()]
        layer.weight[: 4 if scale_per_channel else None] = 0.0
        layers.append(layer)
    return layers


def closed_plane() -> StepLayer:
    """A layer with a plane behind a closed gate, in which two logits of one weight are NaN."""
    layer = StepCase(Case((7, 100), (0, 1), 2)).layer()
    for vectors in (layer.before, layer.after):
        vectors.gate_logits[1] = -torch.inf
    layer.bit_logits[:, 1, 3, 7] = torch.nan
    return layer
