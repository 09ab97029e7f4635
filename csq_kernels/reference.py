"""Equations (1) to (7) in plain PyTorch with one tensor per bit, any floating dtype, exact enough in float64 to judge
the rest.

The order of the arithmetic is part of the contract: the powers of two multiply first and the step ``s / (2^n - 1)``
last, so that a weight whose bits are all decided equals ``hard_weight`` bit for bit.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def along_channel(values: Tensor, weight_ndim: int, channel_axis: int) -> Tensor:
    """View ``values`` of shape ``()`` or ``(C,)`` so that it broadcasts against a weight along ``channel_axis``."""
    if values.ndim == 0:
        return values
    shape = [1] * weight_ndim
    shape[channel_axis] = values.shape[0]
    return values.view(shape)


def gates(gate_logits: Tensor, temperature: Tensor, hard_gates: bool) -> Tensor:
    """Equation (2), or the gate part of (7): ``G = sig(beta * u)`` or ``[u > 0]``; shape of ``gate_logits``."""
    if hard_gates:
        return (gate_logits > 0).to(gate_logits.dtype)
    return torch.sigmoid(temperature * gate_logits)


def _soft_bits(logits: Tensor, gate: Tensor, temperature: Tensor, channel_axis: int) -> Tensor:
    """Equation (1) for one plane; where the gate is 0 the logits, even NaN, have no say."""
    closed = along_channel(gate == 0, logits.ndim, channel_axis)
    return torch.sigmoid(temperature * torch.where(closed, 0.0, logits.to(gate.dtype)))


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def reconstruct(
    bit_logits: Tensor,
    gate_logits: Tensor,
    scale: Tensor,
    temperature: Tensor,
    bits: Sequence[int],
    n_bits: int,
    channel_axis: int,
    hard_gates: bool,
) -> Tensor:
    """Equation (3): ``W = s / (2^n - 1) * sum_b 2^b G_b (P_b - N_b)``; arguments as in ``_ops``."""
    dtype = _working_dtype(bit_logits.dtype)
    weight_shape = bit_logits.shape[2:]
    scale, temperature = scale.to(dtype), temperature.to(dtype)
    gate = gates(gate_logits.to(dtype), temperature, hard_gates)
    total = torch.zeros(weight_shape, dtype=dtype, device=bit_logits.device)
    for plane, bit in enumerate(bits):
        positive = _soft_bits(bit_logits[0, plane], gate[plane], temperature, channel_axis)
        negative = _soft_bits(bit_logits[1, plane], gate[plane], temperature, channel_axis)
        total = total + 2.0**bit * along_channel(gate[plane], len(weight_shape), channel_axis) * (positive - negative)
    step = along_channel(scale / (2.0**n_bits - 1), len(weight_shape), channel_axis)
    return (step * total).to(bit_logits.dtype)


def reconstruct_backward(
    grad_weight: Tensor,
    bit_logits: Tensor,
    gate_logits: Tensor,
    scale: Tensor,
    temperature: Tensor,
    bits: Sequence[int],
    n_bits: int,
    channel_axis: int,
    hard_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Equations (4), (5), (6), written out: gradients of logits, gates and scale, each in its own dtype."""
    dtype = _working_dtype(bit_logits.dtype)
    weight_ndim = bit_logits.ndim - 2
    grad = grad_weight.to(dtype)
    beta = temperature.to(dtype)
    gate = gates(gate_logits.to(dtype), beta, hard_gates)
    step = scale.to(dtype) / (2.0**n_bits - 1)
    step_grad = along_channel(step, weight_ndim, channel_axis) * grad

    def reduce_to(values: Tensor, ndim: int) -> Tensor:
        other_axes = [axis for axis in range(weight_ndim) if ndim == 0 or axis != channel_axis]
        return values.sum(other_axes) if other_axes else values

    grad_bits = torch.zeros_like(bit_logits, memory_format=torch.contiguous_format)
    grad_gates = torch.zeros_like(gate, memory_format=torch.contiguous_format)
    codes = torch.zeros_like(grad)
    for plane, bit in enumerate(bits):
        power = 2.0**bit * along_channel(gate[plane], weight_ndim, channel_axis)
        positive = _soft_bits(bit_logits[0, plane], gate[plane], beta, channel_axis)
        negative = _soft_bits(bit_logits[1, plane], gate[plane], beta, channel_axis)
        grad_bits[0, plane] = step_grad * power * beta * positive * (1 - positive)
        grad_bits[1, plane] = step_grad * power * beta * -negative * (1 - negative)
        codes = codes + power * (positive - negative)
        if not hard_gates:
            slope = beta * gate[plane] * (1 - gate[plane]) * 2.0**bit
            grad_gates[plane] = slope * reduce_to(step_grad * (positive - negative), gate.ndim - 1)
    grad_scale = reduce_to(grad * codes, scale.ndim) / (2.0**n_bits - 1)
    return grad_bits, grad_gates.to(gate_logits.dtype), grad_scale.to(scale.dtype)


def integer_codes(bit_logits: Tensor, gate_logits: Tensor, bits: Sequence[int], channel_axis: int) -> Tensor:
    """Equation (7): ``z = sum over active b of 2^b ([p_b > 0] - [q_b > 0])``, int32, shape of the weight."""
    weight_shape = bit_logits.shape[2:]
    codes = torch.zeros(weight_shape, dtype=torch.int32, device=bit_logits.device)
    for plane, bit in enumerate(bits):
        digit = (bit_logits[0, plane] > 0).to(torch.int32) - (bit_logits[1, plane] > 0).to(torch.int32)
        active = along_channel((gate_logits[plane] > 0).to(torch.int32), len(weight_shape), channel_axis)
        codes += active * (digit << bit)
    return codes


def hard_weight(codes: Tensor, scale: Tensor, n_bits: int, channel_axis: int) -> Tensor:
    """Equation (7): ``W = s z / (2^n - 1)``, one rounding for the step and one for the product; dtype of ``scale``."""
    step = along_channel(scale / (2.0**n_bits - 1), codes.ndim, channel_axis)
    return codes.to(scale.dtype) * step
