"""From a float weight to logits: the inverse of equation (3) at a given temperature.

A plane with gate ``G_b`` whose digit is decided with logits of magnitude ``m / beta`` contributes ``2^b G_b a`` steps,
with ``a = sig(m) - sig(-m) = tanh(m / 2)``. Digits are chosen from the top plane down, each to the nearest of -1, 0, 1,
so that dropping low planes later rounds instead of truncating. The lowest plane takes the remainder as a soft digit:
where the planes span the weight's range, the soft weight equals the given one up to float rounding, at any temperature
and without batch norm to help.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from csq_kernels.reference import along_channel

# beta times the logit of a decided bit: far enough from 0 to be a digit, near enough to keep a gradient.
MARGIN = 2.0
_CLIP_CANDIDATES = 24
_CLIP_PLANES = 5


def _reduced_axes(weight_ndim: int, channel_axis: int, per_channel: bool) -> list[int]:
    return [axis for axis in range(weight_ndim) if not (per_channel and axis == channel_axis)]


def digit_amplitude(temperature: float) -> float:
    """What a decided digit is worth at ``temperature``, its logits encoded at temperature 1: ``tanh(beta m / 2)``."""
    return math.tanh(temperature * MARGIN / 2)


def _basis(
    bits: Sequence[int], gates: Tensor, weight_ndim: int, channel_axis: int, margins: Sequence[float] | None = None
) -> list[Tensor]:
    """Contribution of digit 1 in each plane, in steps of ``s / (2^n - 1)``; broadcasts against the weight."""
    amplitudes = [math.tanh(margin / 2) for margin in margins or [MARGIN] * len(bits)]
    return [
        2.0**bit * amplitude * along_channel(gates[i], weight_ndim, channel_axis)
        for i, (bit, amplitude) in enumerate(zip(bits, amplitudes, strict=True))
    ]


def _nearest_digit(remainder: Tensor, unit: Tensor) -> Tensor:
    """``round(remainder / unit)`` clamped to -1..1, and 0 where the plane is off (``unit`` is 0)."""
    off = unit == 0
    return (remainder / unit.masked_fill(off, 1.0)).round().clamp(-1, 1).masked_fill(off, 0.0)


def _rounding_error(steps: Tensor, basis: list[Tensor]) -> Tensor:
    """Remainder after every plane took its nearest digit: what is lost when the bits are decided."""
    remainder = steps
    for unit in reversed(basis):
        remainder = remainder - _nearest_digit(remainder, unit) * unit
    return remainder


def full_scale(
    weight: Tensor, bits: Sequence[int], gates: Tensor, n_bits: int, channel_axis: int, per_channel: bool
) -> Tensor:
    """Scale ``()`` or ``(C,)`` at which the planes just reach the largest magnitude, of the tensor or each channel."""
    basis = _basis(bits, gates, weight.ndim, channel_axis)
    if not basis or weight.numel() == 0:
        return weight.new_ones(weight.shape[channel_axis] if per_channel else ())
    axes = _reduced_axes(weight.ndim, channel_axis, per_channel)
    largest = weight.abs().amax(axes) if axes else weight.abs()
    # A channel that is all zero gets the scale of the whole tensor, and stays trainable.
    overall = weight.abs().amax()
    largest = torch.where(largest > 0, largest, torch.where(overall > 0, overall, torch.ones_like(overall)))
    span = sum(basis, start=weight.new_zeros(()))
    span = span.reshape(-1) if span.ndim and per_channel else span.max()
    return largest / torch.where(span > 0, span, torch.ones_like(span)) * (2.0**n_bits - 1)


def best_scale(
    weight: Tensor, bits: Sequence[int], gates: Tensor, n_bits: int, channel_axis: int, per_channel: bool
) -> Tensor:
    """Scale ``()`` or ``(C,)`` that minimises the squared rounding error, among clip ratios of ``full_scale``.

    With many planes nothing is gained by clipping; with few, cutting outliers pays.
    """
    full = full_scale(weight, bits, gates, n_bits, channel_axis, per_channel)
    if not bits or len(bits) > _CLIP_PLANES or weight.numel() == 0:
        return full
    axes = _reduced_axes(weight.ndim, channel_axis, per_channel)
    basis = _basis(bits, gates, weight.ndim, channel_axis)
    best, best_error = full, torch.full_like(full, math.inf)
    for candidate in range(_CLIP_CANDIDATES):
        scale = full * (1 - candidate / _CLIP_CANDIDATES)
        step = along_channel(scale / (2.0**n_bits - 1), weight.ndim, channel_axis)
        squares = (_rounding_error(weight / step, basis) * step).square()
        error = squares.sum(axes) if axes else squares
        # By more than rounding: what does not depend on the scale must not choose it.
        better = error < (1 - 1e-5) * best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best


def encode(
    weight: Tensor,
    scale: Tensor,
    bits: Sequence[int],
    gates: Tensor,
    temperature: Tensor,
    n_bits: int,
    channel_axis: int,
    margins: Sequence[float] | None = None,
) -> Tensor:
    """Bit logits ``(2, k, *weight.shape)`` for which equation (3) gives ``weight``, as closely as the planes allow.

    Args:
        weight: any shape, float32 or float64.
        scale: ``()`` or ``(C,)``.
        bits: increasing exponents of the ``k`` planes.
        gates: G of equation (2), ``(k,)`` or ``(k, C)``; a plane with gate 0 gets digit 0.
        temperature: ``()``.
        margins: beta times the logit of a decided bit in each plane; default ``MARGIN``.
    """
    margins = margins or [MARGIN] * len(bits)
    basis = _basis(bits, gates, weight.ndim, channel_axis, margins)
    logits = weight.new_empty((2, len(bits), *weight.shape))
    remainder = weight / along_channel(scale / (2.0**n_bits - 1), weight.ndim, channel_axis)
    lower_plane_on = [sum(basis[:i], start=weight.new_zeros(())) > 0 for i in range(len(basis))]
    for plane in reversed(range(len(bits))):
        unit, margin = basis[plane], margins[plane]
        soft = (remainder / unit.masked_fill(unit == 0, 1.0)).clamp(-1, 1).masked_fill(unit == 0, 0.0)
        digit = torch.where(lower_plane_on[plane], _nearest_digit(remainder, unit), soft)
        remainder = remainder - digit * unit
        # The off side of a digit stays off and the on side carries it, so that 0 lies between -1 and 1 for training.
        # As far from 0 as the margin allows, where rounding would make the logit of 0 or 1 infinite.
        probability = math.exp(-margin) / (1 + math.exp(-margin)) + math.tanh(margin / 2) * digit.abs()
        on_logit = torch.logit(probability).clamp(-margin, margin)
        off_logit = torch.full_like(on_logit, -margin)
        logits[0, plane] = torch.where(digit > 0, on_logit, off_logit)
        logits[1, plane] = torch.where(digit < 0, on_logit, off_logit)
    return logits / temperature
