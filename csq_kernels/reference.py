"""Equations (1) to (7), and the products with packed weights, in plain PyTorch: exact enough in float64 to judge the
rest.

The order of the arithmetic is part of the contract: the powers of two multiply first and the step ``s / (2^n - 1)``
last, so that a weight whose bits are all decided equals ``hard_weight`` bit for bit.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from csq_kernels import bitplanes

# Columns of a packed linear layer that share one step of the quantized input, and how many of them a table serves.
BLOCK, GROUP = 128, 4
# Largest magnitude of a quantized input, and of the sum over a group before rounding, by precision.
INPUT_LIMITS = {"int8": (127, 253), "high": (32639, 65533)}
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


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


def quantize(values: Tensor, precision: str, grouped: bool) -> tuple[Tensor, Tensor]:
    """The integers and the step of an input as ``int8`` and ``high`` define them, whichever kernel computes.

    One step for the last axis: ``max(max |x| / limit, max over groups of 4 of sum |x| / group limit)``, the second only
    where ``grouped``; with it the sums over any part of a group fit 8 (16) bits. ``q = round(x / step)``, half to even.
    A slice whose step is below the normal numbers is 0; one with an infinity or a NaN has step NaN.

    Args:
        values: float32 ``(..., length)``; ``length`` a multiple of 4 where ``grouped``.
        precision: ``int8`` or ``high``.

    Returns:
        q, float32 with integer values, of the shape of ``values``; the step ``(..., 1)``.
    """
    limit, group_limit = INPUT_LIMITS[precision]
    size = values.abs()
    step = size.amax(-1, keepdim=True) / limit
    if grouped:
        # In pairs: sums of two do not depend on who adds.
        groups = size.unflatten(-1, (-1, GROUP // 2, 2)).sum(-1).sum(-1)
        step = torch.maximum(step, groups.amax(-1, keepdim=True) / group_limit)
    step = torch.where(size.isfinite().all(-1, keepdim=True), step, torch.nan)
    step = torch.where(step < _SMALLEST_NORMAL, 0.0, step)
    usable = step > 0
    return torch.where(usable, (values * (1 / torch.where(usable, step, 1.0))).round(), 0.0), step


def _dequantized(values: Tensor, precision: str, grouped: bool) -> Tensor:
    """What the kernels multiply with: the quantized input, back in its unit, in float64."""
    codes, step = quantize(values.float(), precision, grouped)
    return codes.double() * step.double()


def _with_bias(output: Tensor, bias: Tensor | None, trailing_axes: int, dtype: torch.dtype) -> Tensor:
    if bias is not None:
        output = output + bias.to(output.dtype).view(-1, *[1] * trailing_axes)
    return output.to(dtype)


def bitserial_linear(
    input: Tensor,
    planes: Tensor,
    step: Tensor,
    bias: Tensor | None,
    coefficients: Sequence[int],
    weight_shape: Sequence[int],
    precision: str,
) -> Tensor:
    """``input @ W.T + bias`` with ``W = step * z``; planes in canonical order, the rest as in ``_ops``.

    ``exact`` is PyTorch's own product in the dtype of the input, or float32 if that is narrower. Otherwise the input is
    quantized in blocks of 128 columns (``quantize``), and only float64 roundings come after that.
    """
    if precision == "exact":
        dtype = _working_dtype(input.dtype)
        weight = bitserial_weight(planes, step, coefficients, weight_shape, 0).to(dtype)
        return _with_bias(F.linear(input.to(dtype), weight), bias, 0, input.dtype)
    rows, columns = weight_shape
    blocks = F.pad(input, (0, -columns % BLOCK)).unflatten(-1, (-1, BLOCK))
    quantized = _dequantized(blocks, precision, grouped=True).flatten(-2)[..., :columns]
    codes = bitplanes.decode(planes, coefficients, weight_shape)
    return _with_bias(F.linear(quantized, codes.double()) * step.double(), bias, 0, input.dtype)


def bitserial_conv2d(
    input: Tensor,
    planes: Tensor,
    step: Tensor,
    bias: Tensor | None,
    coefficients: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: str,
) -> Tensor:
    """``conv2d`` with ``W = step * z``, zeros around the input; as ``bitserial_linear``, with one step per sample."""
    options = (None, list(stride), list(padding), list(dilation), groups)
    if precision == "exact":
        dtype = _working_dtype(input.dtype)
        weight = bitserial_weight(planes, step, coefficients, weight_shape, 0).to(dtype)
        return _with_bias(F.conv2d(input.to(dtype), weight, *options), bias, 2, input.dtype)
    quantized = _dequantized(input.flatten(1), precision, grouped=False).view(input.shape)
    codes = bitplanes.decode(planes, coefficients, weight_shape)
    output = F.conv2d(quantized, codes.double(), *options) * along_channel(step.double(), 3, 0)
    return _with_bias(output, bias, 2, input.dtype)


def bitserial_weight(
    planes: Tensor, step: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int], channel_axis: int
) -> Tensor:
    """Equation (7): ``W = step * z``, float32, one rounding a weight."""
    codes = bitplanes.decode(planes, coefficients, weight_shape)
    return codes.to(step.dtype) * along_channel(step, len(weight_shape), channel_axis)
