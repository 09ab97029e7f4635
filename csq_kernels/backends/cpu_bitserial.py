"""Products with packed weights on the processor: tensors in, addresses and sizes to the native module.

Linear layers and convolutions without groups read tiles (``csrc/core/bitserial.h``), ``(row tiles, column tiles, k,
1024)`` bytes; the columns of a convolution's are kernel row, kernel column, channel, the channels filled up to a multiple
of 4. Everything else reads canonical planes. The caller has checked the arguments.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from csq_kernels import _native, bitplanes, reference
from csq_kernels._ops import conv2d_shape
from csq_kernels.backends.memory import new_empty

if _native.module is None:
    raise ImportError(_native.reason)
_C = _native.module

_GROUP = 4
_PLANE_BYTES = _C.tile_rows * _C.tile_columns // 8
_MOST_CONV_COLUMNS = 1 << 16


@functools.cache
def _column_order(weight_shape: tuple[int, ...]) -> list[int]:
    """For each column of a convolution's tiles its column in the weight, -1 where a channel is only filling."""
    _, channels, height, width = weight_shape
    columns = torch.arange(channels * height * width).view(channels, height, width)
    padded = F.pad(columns, (0, 0, 0, 0, 0, -channels % _GROUP), value=-1)
    return padded.permute(1, 2, 0).flatten().tolist()


def _order(weight_shape: Sequence[int]) -> list[int]:
    return _column_order(tuple(weight_shape)) if len(weight_shape) == 4 else []


def _tiles_shape(coefficients: Sequence[int], weight_shape: Sequence[int]) -> tuple[int, ...]:
    columns = len(_order(weight_shape)) or weight_shape[1]
    return (
        math.ceil(weight_shape[0] / _C.tile_rows),
        math.ceil(columns / _C.tile_columns),
        len(coefficients),
        _PLANE_BYTES,
    )


def _tile(planes: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int]) -> Tensor:
    tiles = new_empty(planes, _tiles_shape(coefficients, weight_shape))
    if tiles.numel():
        planes = planes.contiguous()
        columns = math.prod(weight_shape[1:])
        threads = torch.get_num_threads()
        _C.bitserial_tile(
            planes.data_ptr(), weight_shape[0], columns, _order(weight_shape), coefficients, tiles.data_ptr(), threads
        )
    return tiles


def _untile(tiles: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int]) -> Tensor:
    shape = (len(coefficients), bitplanes.plane_bytes(math.prod(weight_shape)))
    planes = tiles.new_empty(shape)
    if planes.numel():
        _check_tiles(tiles, coefficients, weight_shape)
        columns = math.prod(weight_shape[1:])
        tiles = tiles.contiguous()
        _C.bitserial_untile(
            tiles.data_ptr(), weight_shape[0], columns, _order(weight_shape), coefficients, planes.data_ptr()
        )
    return planes


bitserial_linear_tile = bitserial_conv2d_tile = _tile
bitserial_linear_untile = bitserial_conv2d_untile = _untile


def _check_tiles(planes: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int]) -> None:
    expected = _tiles_shape(coefficients, weight_shape)
    if planes.shape != expected:
        raise ValueError(f"expected planes of shape {expected}, in the order of tiles, got {tuple(planes.shape)}")


def bitserial_linear(
    input: Tensor,
    planes: Tensor,
    step: Tensor,
    bias: Tensor | None,
    coefficients: Sequence[int],
    weight_shape: Sequence[int],
    precision: str,
) -> Tensor:
    """Arguments and result as in ``reference.bitserial_linear``; canonical planes are left to it."""
    if planes.ndim == 2 or input.dtype == torch.float64:
        planes = planes if planes.ndim == 2 else _untile(planes, coefficients, weight_shape)
        return reference.bitserial_linear(input, planes, step, bias, coefficients, weight_shape, precision)
    _check_tiles(planes, coefficients, weight_shape)
    rows, columns = weight_shape
    output = torch.empty((*input.shape[:-1], rows), dtype=torch.float32)
    if output.numel() == 0:
        return output.to(input.dtype)
    if columns == 0:
        return reference.with_bias(output.zero_(), bias, 0, input.dtype)
    values = input.to(torch.float32).contiguous()
    batch = values.numel() // columns
    scratch = torch.empty(
        _C.bitserial_linear_scratch(batch, rows, columns, coefficients, precision), dtype=torch.uint8
    )
    steps, tiles = step.contiguous(), planes.contiguous()
    biases = None if bias is None else bias.contiguous()
    _C.bitserial_linear(
        values.data_ptr(),
        tiles.data_ptr(),
        steps.data_ptr(),
        0 if biases is None else biases.data_ptr(),
        output.data_ptr(),
        scratch.data_ptr(),
        batch,
        rows,
        columns,
        coefficients,
        step.ndim == 1,
        precision,
        torch.get_num_threads(),
    )
    return output.to(input.dtype)


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
    """Arguments and result as in ``reference.bitserial_conv2d``; canonical planes are left to it."""
    if planes.ndim == 2 or input.dtype == torch.float64:
        planes = planes if planes.ndim == 2 else _untile(planes, coefficients, weight_shape)
        return reference.bitserial_conv2d(
            input, planes, step, bias, coefficients, weight_shape, stride, padding, dilation, groups, precision
        )
    _check_tiles(planes, coefficients, weight_shape)
    if groups != 1:
        raise ValueError(f"expected groups 1 for planes in the order of tiles, got {groups}")
    output = torch.empty(conv2d_shape(input, weight_shape, stride, padding, dilation), dtype=torch.float32)
    if output.numel() == 0:
        return output.to(input.dtype)
    values = input.to(torch.float32).contiguous()
    sizes = (tuple(input.shape[2:]), tuple(weight_shape[2:]), tuple(stride), tuple(padding), tuple(dilation))
    scratch = torch.empty(
        _C.bitserial_conv2d_scratch(input.shape[0], input.shape[1], *sizes, precision), dtype=torch.uint8
    )
    steps, tiles = step.contiguous(), planes.contiguous()
    biases = None if bias is None else bias.contiguous()
    _C.bitserial_conv2d(
        values.data_ptr(),
        tiles.data_ptr(),
        steps.data_ptr(),
        0 if biases is None else biases.data_ptr(),
        output.data_ptr(),
        scratch.data_ptr(),
        input.shape[0],
        input.shape[1],
        weight_shape[0],
        *sizes,
        coefficients,
        step.ndim == 1,
        precision,
        torch.get_num_threads(),
    )
    return output.to(input.dtype)


def bitserial_weight(
    planes: Tensor, step: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int], channel_axis: int
) -> Tensor:
    """Arguments and result as in ``reference.bitserial_weight``; tiles are put back in canonical order first."""
    planes = planes if planes.ndim == 2 else _untile(planes, coefficients, weight_shape)
    return reference.bitserial_weight(planes, step, coefficients, weight_shape, channel_axis)
