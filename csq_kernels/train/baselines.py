"""What CSQ is measured against: one precision for every layer, rounded after training or learnt in training.

Both use ``bits`` of two's complement and one step for each output channel, and end as packed layers of the same file
format, so that bytes and accuracies compare.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from csq_kernels.nn.activation import learnt_step_quantize
from csq_kernels.nn.layer import Config
from csq_kernels.nn.layers import CSQ_CLASSES
from csq_kernels.nn.pack import summary
from csq_kernels.nn.packed import PACKED_CLASSES, PackedLayer
from csq_kernels.nn.prepare import rule_for
from csq_kernels.reference import along_channel
from csq_kernels.report import LayerReport, Report

_STEP_CANDIDATES = 80


def _range(bits: int) -> tuple[int, int]:
    """Least and largest code."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def _other_axes(weight: Tensor, channel_axis: int) -> list[int]:
    return [axis for axis in range(weight.ndim) if axis != channel_axis]


class LearntStepWeight(nn.Module):
    """The weight of LSQ (Esser et al. 2020), as a parametrization: ``step * round(clamp(w / step))``.

    The step of each output channel starts at ``2 mean|w| / sqrt(high)`` and is learnt.
    """

    low: Tensor
    high: Tensor

    def __init__(self, weight: Tensor, bits: int, channel_axis: int):
        super().__init__()
        low, high = _range(bits)
        self.register_buffer("low", torch.tensor(float(low), device=weight.device), persistent=False)
        self.register_buffer("high", torch.tensor(float(high), device=weight.device), persistent=False)
        self.channel_axis = channel_axis
        start = 2 * weight.detach().abs().mean(_other_axes(weight, channel_axis)) / math.sqrt(high)
        self.step = nn.Parameter(torch.where(start > 0, start, torch.ones_like(start)))

    def positive_step(self) -> Tensor:
        """A learnt step that crosses 0 would turn the quantizer over; its magnitude is what counts."""
        return self.step.abs() + torch.finfo(self.step.dtype).tiny

    def forward(self, weight: Tensor) -> Tensor:
        step = along_channel(self.positive_step(), weight.ndim, self.channel_axis)
        slope = torch.rsqrt(weight.numel() / self.step.numel() * self.high)
        return learnt_step_quantize(weight, step, self.low, self.high, slope)

    @torch.no_grad()
    def codes(self, weight: Tensor) -> Tensor:
        """The integers that the quantized weight is the step times of."""
        step = along_channel(self.positive_step(), weight.ndim, self.channel_axis)
        return (weight / step).clamp(self.low, self.high).round().to(torch.int16)


def _layers(model: nn.Module, config: Config) -> dict[str, nn.Module]:
    """The layers that ``prepare_`` would swap; ``ValueError`` where two of them share a weight."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if type(module) in CSQ_CLASSES and rule_for(config, name)[1] is not None
    }
    if not layers:
        raise ValueError("expected model with a layer to quantize, got none")
    if len({id(layer._parameters["weight"]) for layer in layers.values()}) < len(layers):
        raise ValueError("expected layers that share no weight, got tied ones; use method=csq")
    return layers


def learn_steps_(model: nn.Module, bits: int, config: Config) -> None:
    """Train from now on with the quantized weights of LSQ in every layer that ``prepare_`` would swap.

    Raises:
        ValueError: there is no such layer, or two share a weight.
    """
    for layer in _layers(model, config).values():
        axis = CSQ_CLASSES[type(layer)].channel_axis
        assert isinstance(layer.weight, Tensor)
        parametrize.register_parametrization(layer, "weight", LearntStepWeight(layer.weight, bits, axis))


@torch.no_grad()
def pack_learnt_(model: nn.Module, bits: int) -> None:
    """Turn the layers of ``learn_steps_`` into packed ones: its codes, its steps."""
    for module in list(model.modules()):
        if not parametrize.is_parametrized(module, "weight"):
            continue
        parametrization: Any = module.parametrizations["weight"]  # type: ignore[index]
        quantizer: LearntStepWeight = parametrization[0]
        codes, step = quantizer.codes(parametrization.original), quantizer.positive_step().detach()
        parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
        _pack_layer_(module, codes, step, bits)


@torch.no_grad()
def round_(model: nn.Module, bits: int, config: Config) -> None:
    """Turn the layers that ``prepare_`` would swap into packed ones, rounded to the step with the least squared error.

    Raises:
        ValueError: there is no such layer, or two share a weight.
    """
    for layer in _layers(model, config).values():
        axis = CSQ_CLASSES[type(layer)].channel_axis
        weight = layer.weight
        assert isinstance(weight, Tensor)
        step = best_step(weight, bits, axis)
        low, high = _range(bits)
        codes = (weight / along_channel(step, weight.ndim, axis)).round().clamp(low, high).to(torch.int16)
        _pack_layer_(layer, codes, step, bits)


def scheme(model: nn.Module, file_bytes: int) -> Report:
    """The layers of a packed model, as ``report`` describes those of a CSQ model."""
    rows = [
        LayerReport(
            row.name, row.shape, row.paper_bits, row.stored_bits, row.active, row.bytes, row.float_bytes, 0.0, 0.0
        )
        for row in summary(model).layers
    ]
    return Report(rows, file_bytes - sum(row.bytes for row in rows))


def best_step(weight: Tensor, bits: int, channel_axis: int) -> Tensor:
    """Step ``(C,)`` that minimises the squared rounding error of each channel, among shares of the largest step."""
    low, high = _range(bits)
    axes = _other_axes(weight, channel_axis)
    largest = weight.abs().amax(axes) / -low
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    best, least = largest, torch.full_like(largest, math.inf)
    for candidate in range(_STEP_CANDIDATES):
        step = largest * (1.2 - candidate / _STEP_CANDIDATES)
        wide = along_channel(step, weight.ndim, channel_axis)
        error = ((weight / wide).round().clamp(low, high) * wide - weight).square().sum(axes)
        better = error < least
        best, least = torch.where(better, step, best), torch.where(better, error, least)
    return best


def _pack_layer_(layer: nn.Module, codes: Tensor, step: Tensor, bits: int) -> None:
    """Swap the class of a float layer for its packed sister, with the weight ``step * codes``."""
    weight = layer._parameters.pop("weight")
    assert weight is not None
    layer.__class__ = PACKED_CLASSES[type(layer)]
    assert isinstance(layer, PackedLayer)
    # Digits at so many exponents span -(2^(bits-1) - 1) .. 2^(bits-1) - 1, and their two's complement one code more.
    exponents = range(bits - 1)
    layer.adopt_codes_(codes, step * (2.0 ** (bits - 1) - 1), bits - 1, exponents, weight.dtype)
