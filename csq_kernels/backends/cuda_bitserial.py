"""The ops on packed weights on a CUDA device: tensors in, addresses, sizes and a stream to the native module.

The caller has checked the arguments. The planes of a linear layer are tiles of ``gpu_planes``; canonical ones are tiled
at each call. ``high`` is served as ``exact``. An input that is not finite gives NaN.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from csq_kernels import _native
from csq_kernels.backends import gpu_planes, gpu_products
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


def _multiply(
    input: Tensor,
    tiles: Tensor,
    step: Tensor,
    bias: Tensor | None,
    coefficients: Sequence[int],
    weight_shape: Sequence[int],
    precision: str,
    output: Tensor,
) -> None:
    batch, rows = input.shape[0], weight_shape[0]
    arithmetic = "int8" if precision == "int8" else "float32" if input.dtype == torch.float32 else "float16"
    values, steps = _prepared(input, arithmetic)
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


bitserial_linear = functools.partial(gpu_products.linear, _decode, _multiply, PASSES)
bitserial_conv2d = functools.partial(gpu_products.conv2d, _decode)
