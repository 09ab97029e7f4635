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
from csq_kernels._ops import conv2d_shape

# Columns of a packed linear layer that share one step of the quantized input: of products, and of int8 tables, whose
# groups are limited; and how many of them a table serves.
BLOCK, TABLE_BLOCK, GROUP = 128, 64, 4
# Up to so many rows of input, tables serve on the processor.
TABLE_BATCH = 2
# Largest magnitude of a quantized input, and of the sum over a group before rounding, by precision.
ELEMENT_LIMIT = {"int8": 127, "high": 32639}
GROUP_LIMIT = {"int8": 253, "high": 65533}
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


def quantize(values: Tensor, element_limit: int | None, group_limit: int | None = None) -> tuple[Tensor, Tensor]:
    """The integers and the step of an input: what ``int8`` and ``high`` mean, whichever kernel computes.

    One step for the last axis: ``max(max |x| / element_limit, max over groups of 4 of sum |x| / group_limit)``, without
    the part that is ``None``; ``q = round(x / step)``, half to even. A group limit makes the sums over any part of a
    group fit 8 (16) bits, with two left for rounding. A slice whose step is below the normal numbers is 0; one with an
    infinity or a NaN has step NaN.

    Args:
        values: float32 ``(..., length)``; ``length`` a multiple of 4 where there is a group limit.

    Returns:
        q, float32 with integer values, of the shape of ``values``; the step ``(..., 1)``.
    """
    size = values.abs()
    step = torch.zeros_like(size[..., :1])
    # Divided by a number, PyTorch multiplies by its inverse on a GPU, and rounds otherwise than on the processor.
    if element_limit is not None:
        step = size.amax(-1, keepdim=True) / torch.full_like(step, element_limit)
    if group_limit is not None:
        # In pairs: sums of two do not depend on who adds.
        groups = size.unflatten(-1, (-1, GROUP // 2, 2)).sum(-1).sum(-1)
        step = torch.maximum(step, groups.amax(-1, keepdim=True) / torch.full_like(step, group_limit))
    step = torch.where(size.isfinite().all(-1, keepdim=True), step, torch.nan)
    step = torch.where(step < _SMALLEST_NORMAL, 0.0, step)
    usable = step > 0
    return torch.where(usable, (values * (1 / torch.where(usable, step, 1.0))).round(), 0.0), step


def quantize_rows(values: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """``quantize`` as a packed linear layer does: float32 ``(rows, columns)`` in blocks of 128 columns, of 64 for int8
    tables, the last one filled up with zeros.

    On the processor up to 2 rows meet tables: then the groups limit an int8 step, and both limits a high one. All else
    meets products and has the elements' limit.

    Returns:
        q ``(rows, blocks, columns of a block)``, the steps ``(rows, blocks, 1)``.
    """
    tables = values.shape[0] <= TABLE_BATCH and values.device.type == "cpu"
    element_limit = None if tables and precision == "int8" else ELEMENT_LIMIT[precision]
    block = TABLE_BLOCK if tables and precision == "int8" else BLOCK
    blocks = F.pad(values, (0, -values.shape[-1] % block)).unflatten(-1, (-1, block))
    return quantize(blocks, element_limit, GROUP_LIMIT[precision] if tables else None)


def with_bias(output: Tensor, bias: Tensor | None, trailing_axes: int, dtype: torch.dtype) -> Tensor:
    """``output + bias`` along the channels, which ``trailing_axes`` axes follow, in ``dtype``."""
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
    quantized (``quantize_rows``), and only float64 roundings come after that.
    """
    if not coefficients:
        return input.new_zeros(*input.shape[:-1], weight_shape[0]) + (0 if bias is None else bias.to(input.dtype))
    if precision == "exact":
        dtype = _working_dtype(input.dtype)
        weight = bitserial_weight(planes, step, coefficients, weight_shape, 0).to(dtype)
        return with_bias(F.linear(input.to(dtype), weight), bias, 0, input.dtype)
    rows, columns = weight_shape
    if columns == 0:
        return with_bias(input.new_zeros((*input.shape[:-1], rows)), bias, 0, input.dtype)
    integers, steps = quantize_rows(input.reshape(-1, columns).float(), precision)
    quantized = (integers.double() * steps.double()).flatten(1)[:, :columns]
    codes = bitplanes.decode(planes, coefficients, weight_shape)
    output = F.linear(quantized, codes.double()) * step.double()
    return with_bias(output, bias, 0, input.dtype).view(*input.shape[:-1], rows)


def always_exact(weight_shape: Sequence[int], groups: int) -> bool:
    """Whether a convolution ignores its precision: with groups or fewer than 4 input channels, as depth-wise and first
    layers, it computes too little for a quantized input to pay.
    """
    return groups > 1 or weight_shape[1] < GROUP


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
    if not coefficients:
        shape = conv2d_shape(input, weight_shape, stride, padding, dilation)
        return input.new_zeros(shape) + (0 if bias is None else bias.to(input.dtype).view(-1, 1, 1))
    options = (None, list(stride), list(padding), list(dilation), groups)
    if precision == "exact" or always_exact(weight_shape, groups):
        dtype = _working_dtype(input.dtype)
        weight = bitserial_weight(planes, step, coefficients, weight_shape, 0).to(dtype)
        return with_bias(F.conv2d(input.to(dtype), weight, *options), bias, 2, input.dtype)
    integers, steps = quantize(input.flatten(1).float(), ELEMENT_LIMIT[precision])
    quantized = (integers.double() * steps.double()).view(input.shape)
    codes = bitplanes.decode(planes, coefficients, weight_shape)
    output = F.conv2d(quantized, codes.double(), *options) * along_channel(step.double(), 3, 0)
    return with_bias(output, bias, 2, input.dtype)


def bitserial_weight(
    planes: Tensor, step: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int], channel_axis: int
) -> Tensor:
    """Equation (7): ``W = step * z``, float32, one rounding a weight."""
    codes = bitplanes.decode(planes, coefficients, weight_shape)
    return codes.to(step.dtype) * along_channel(step, len(weight_shape), channel_axis)
