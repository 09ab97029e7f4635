"""The ops on packed weights on a CUDA device: tensors in, addresses, sizes and a stream to the native module.

The caller has checked the arguments. The planes of a linear layer are tiles of ``gpu_planes``; canonical ones are tiled
at each call. ``high`` is served as ``exact``. An input that is not finite gives NaN.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from csq_kernels import _native, reference
from csq_kernels.backends import gpu_planes
from csq_kernels.backends.gpu_planes import tile as bitserial_linear_tile
from csq_kernels.backends.gpu_planes import untile as bitserial_linear_untile
from csq_kernels.backends.layout import DTYPES, weight_layout

if _native.module is None:
    raise ImportError(_native.reason)
_C = _native.module

__all__ = [
    "bitserial_conv2d",
    "bitserial_linear",
    "bitserial_linear_tile",
    "bitserial_linear_untile",
    "bitserial_weight",
]

# Passes over the planes that take as long as making the weight and multiplying by it.
PASSES = 4


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _groups(coefficients: Sequence[int]) -> list[tuple[int, int, int, int]]:
    return [(group.first, group.planes, group.exponent, group.offset) for group in gpu_planes.groups(coefficients)]


def _prepared(input: Tensor, arithmetic: str) -> tuple[Tensor, Tensor | None]:
    """The input as the kernels read it, and its steps unless they are 1."""
    batch, columns = input.shape
    padded = gpu_planes.padded_columns(columns)
    if arithmetic == "int8" or input.dtype == torch.bfloat16:
        values = input.new_empty((batch, padded), dtype=getattr(torch, arithmetic))
        passes = -(-batch // gpu_planes.PASS_ROWS)
        steps = input.new_empty((passes, padded // gpu_planes.COLUMNS, gpu_planes.PASS_ROWS), dtype=torch.float32)
        _C.cuda_bitserial_prepare(
            input.data_ptr(),
            values.data_ptr(),
            steps.data_ptr(),
            batch,
            columns,
            DTYPES[input.dtype],
            arithmetic,
            torch.cuda.current_stream().cuda_stream,
        )
        return values, steps
    values = F.pad(input, (0, padded - columns)) if padded != columns else input
    return values if values.data_ptr() % 16 == 0 else values.clone(), None


def bitserial_linear(
    input: Tensor,
    planes: Tensor,
    step: Tensor,
    bias: Tensor | None,
    coefficients: Sequence[int],
    weight_shape: Sequence[int],
    precision: str,
) -> Tensor:
    """``input @ W.T + bias``; as ``reference.bitserial_linear``, which serves float64."""
    rows, columns = weight_shape
    if input.dtype not in DTYPES:
        canonical = planes if planes.ndim == 2 else gpu_planes.untile(planes, coefficients, weight_shape)
        return reference.bitserial_linear(input, canonical, step, bias, coefficients, weight_shape, precision)
    output = input.new_empty((*input.shape[:-1], rows))
    if output.numel() == 0:
        return output
    if columns == 0 or not coefficients:
        return output.zero_() if bias is None else output.copy_(bias)
    with torch.cuda.device(input.device):
        tiles = planes if planes.ndim > 2 else gpu_planes.tile(planes, coefficients, weight_shape)
        flat = input.reshape(-1, columns).contiguous()
        batch = flat.shape[0]
        if precision != "int8" and gpu_planes.expands(batch, input.dtype, PASSES):

            def codes(dtype: torch.dtype) -> Tensor:
                return _decode(tiles, None, coefficients, weight_shape, 0, dtype)

            return gpu_planes.expanded_linear(flat, codes, step, bias, coefficients).view(output.shape)
        arithmetic = "int8" if precision == "int8" else "float32" if input.dtype == torch.float32 else "float16"
        values, steps = _prepared(flat, arithmetic)
        groups = _groups(coefficients)
        partial = input.new_empty((batch, rows), dtype=torch.float32) if len(groups) > 1 else None
        step_values, bias_values = step.contiguous(), None if bias is None else bias.contiguous()
        _C.cuda_bitserial_linear(
            tiles.data_ptr(),
            values.data_ptr(),
            _address(steps),
            step_values.data_ptr(),
            _address(bias_values),
            _address(partial),
            output.data_ptr(),
            batch,
            rows,
            values.shape[1] // gpu_planes.COLUMNS,
            len(coefficients),
            groups,
            arithmetic,
            DTYPES[input.dtype],
            step.ndim == 1,
            torch.cuda.current_stream().cuda_stream,
        )
    return output


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
    """Makes the weight, then convolves; as ``reference.bitserial_conv2d``, which serves float64."""
    options = (stride, padding, dilation, groups)
    if input.dtype not in DTYPES:
        return reference.bitserial_conv2d(input, planes, step, bias, coefficients, weight_shape, *options, precision)

    def codes(dtype: torch.dtype) -> Tensor:
        return _decode(planes, None, coefficients, weight_shape, 0, dtype)

    return gpu_planes.conv2d(input, codes, step, bias, coefficients, weight_shape, options, precision)


def bitserial_weight(
    planes: Tensor, step: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int], channel_axis: int
) -> Tensor:
    """``W = step * z``, float32; as ``reference.bitserial_weight``, and from tiles too."""
    return _decode(planes, step, coefficients, weight_shape, channel_axis, torch.float32)


def _decode(
    planes: Tensor,
    step: Tensor | None,
    coefficients: Sequence[int],
    weight_shape: Sequence[int],
    channel_axis: int,
    dtype: torch.dtype,
) -> Tensor:
    weight = planes.new_empty(weight_shape, dtype=dtype)
    if weight.numel() == 0:
        return weight
    if not coefficients:
        return weight.zero_()
    per_channel = step is not None and step.ndim == 1
    if planes.ndim > 2 and per_channel and channel_axis != 0:
        planes = gpu_planes.untile(planes, coefficients, weight_shape)
    tiled = planes.ndim > 2
    # Tiles know rows and columns, which are the channels and the rest.
    layout = (1, *weight_shape) if tiled else weight_layout(weight_shape, per_channel, channel_axis)
    with torch.cuda.device(planes.device):
        source, step_values = planes.contiguous(), None if step is None else step.contiguous()
        _C.cuda_bitserial_weight(
            source.data_ptr(),
            _address(step_values),
            weight.data_ptr(),
            *layout,
            planes.shape[1] if tiled else 0,
            list(coefficients),
            _groups(coefficients),
            DTYPES[dtype],
            per_channel,
            torch.cuda.current_stream().cuda_stream,
        )
    return weight
