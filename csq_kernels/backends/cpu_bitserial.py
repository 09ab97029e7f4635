"""Products with packed weights on the processor: tensors in, addresses and sizes to the native module.

Linear layers and most convolutions read tiles (``csrc/core/bitserial.h``), ``(row tiles, column tiles, k, 1024)``.
The columns of a convolution's are kernel row, kernel column, channel, the channels filled up to a multiple of 4. All
else reads canonical planes: the weight of the other convolutions is unpacked at each call, since it is small. The
caller has checked the arguments.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from csq_kernels import _native, bitplanes, reference
from csq_kernels._ops import conv2d_shape
from csq_kernels.backends.memory import new_empty_aligned

if _native.module is None:
    raise ImportError(_native.reason)
_C = _native.module

_GROUP = 4
_PLANE_BYTES = _C.tile_rows * _C.tile_columns // 8


@functools.lru_cache(maxsize=64)
def _column_order(weight_shape: tuple[int, ...]) -> list[int]:
    """For each column of a convolution's tiles its column in the weight, -1 where a channel is only filling."""
    _, channels, height, width = weight_shape
    columns = torch.arange(channels * height * width).view(channels, height, width)
    padded = F.pad(columns, (0, 0, 0, 0, 0, -channels % _GROUP), value=-1)
    return padded.permute(1, 2, 0).flatten().tolist()


def _columns(weight_shape: Sequence[int]) -> int:
    """Columns of the tiles, those that only fill up included."""
    channels, *kernel = weight_shape[1:]
    return math.prod(kernel) * (channels + -channels % _GROUP) if kernel else channels


def _order(weight_shape: Sequence[int]) -> list[int]:
    return _column_order(tuple(weight_shape)) if len(weight_shape) == 4 else []


@functools.lru_cache(maxsize=1024)
def _tiles_shape(coefficients: tuple[int, ...], weight_shape: tuple[int, ...]) -> tuple[int, ...]:
    if len(weight_shape) not in (2, 4):
        raise ValueError(f"expected weight_shape of 2 or 4 axes for planes in the order of tiles, got {weight_shape}")
    columns = _columns(weight_shape)
    return (
        math.ceil(weight_shape[0] / _C.tile_rows),
        math.ceil(columns / _C.tile_columns),
        len(coefficients),
        _PLANE_BYTES,
    )


def _tile(planes: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int]) -> Tensor:
    shape = _tiles_shape(tuple(coefficients), tuple(weight_shape))
    tiles = new_empty_aligned(planes, math.prod(shape)).view(shape)
    if tiles.numel():
        planes = planes.contiguous()
        columns = math.prod(weight_shape[1:])
        threads = torch.get_num_threads()
        _C.bitserial_tile(
            planes.data_ptr(), weight_shape[0], columns, _order(weight_shape), coefficients, tiles.data_ptr(), threads
        )
    return tiles


def _untile(tiles: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int]) -> Tensor:
    _check_tiles(tiles, coefficients, weight_shape)
    shape = (len(coefficients), bitplanes.plane_bytes(math.prod(weight_shape)))
    planes = tiles.new_empty(shape)
    if planes.numel():
        columns = math.prod(weight_shape[1:])
        threads = torch.get_num_threads()
        _C.bitserial_untile(
            tiles.data_ptr(), weight_shape[0], columns, _order(weight_shape), coefficients, planes.data_ptr(), threads
        )
    return planes


bitserial_linear_tile = bitserial_conv2d_tile = _tile
bitserial_linear_untile = bitserial_conv2d_untile = _untile


def _check_tiles(planes: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int]) -> None:
    expected = _tiles_shape(tuple(coefficients), tuple(weight_shape))
    if planes.shape != expected or not planes.is_contiguous():
        raise ValueError(f"expected contiguous planes of shape {expected}, got {tuple(planes.shape)}")


@functools.lru_cache(maxsize=1024)
def _linear(weight_shape: tuple[int, int], coefficients: tuple[int, ...], step_per_row: bool):
    return _C.BitserialLinear(*weight_shape, coefficients, step_per_row)


@functools.lru_cache(maxsize=1024)
def _conv2d(weight_shape: tuple[int, ...], coefficients: tuple[int, ...], step_per_row: bool, *windows):
    rows, channels, *kernel = weight_shape
    return _C.BitserialConv2d(rows, channels, kernel, *windows, coefficients, step_per_row)


def _as_float32(values: Tensor) -> Tensor:
    # A conversion that has nothing to do still costs as much as the smallest layer.
    return (values if values.dtype is torch.float32 else values.to(torch.float32)).contiguous()


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
    values = _as_float32(input)
    output = values.new_empty((*values.shape[:-1], rows))
    if output.numel() == 0:
        return output.to(input.dtype)
    if columns == 0:
        return reference.with_bias(output.zero_(), bias, 0, input.dtype)
    step = step.contiguous()
    bias = None if bias is None else bias.contiguous()
    _linear(tuple(weight_shape), tuple(coefficients), step.ndim == 1)(
        values.data_ptr(),
        planes.data_ptr(),
        step.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        output.data_ptr(),
        values.numel() // columns,
        precision,
        torch.get_num_threads(),
    )
    return output if input.dtype is torch.float32 else output.to(input.dtype)


def bitserial_linear_kernel(
    input: Tensor,
    planes: Tensor,
    step: Tensor,
    bias: Tensor | None,
    coefficients: Sequence[int],
    weight_shape: Sequence[int],
    precision: str,
) -> str:
    """What ``bitserial_linear`` computes with: instruction set and way, or ``reference``."""
    if planes.ndim == 2 or input.dtype == torch.float64:
        return "reference"
    linear = _linear(tuple(weight_shape), tuple(coefficients), step.ndim == 1)
    return f"{_C.isa()} {linear.path(math.prod(input.shape[:-1]), precision)}"


def _prefer_float(output_shape: Sequence[int]) -> bool:
    """Whether to unpack the weight and leave an exact convolution to PyTorch: it does many positions 10 % faster, if it
    can fill its vectors with output channels.
    """
    batch, channels, height, width = output_shape
    return channels >= 32 and batch * height * width >= 2048


def _unpacks(input: Tensor, planes: Tensor, precision: str, output_shape: Sequence[int]) -> bool:
    """Whether a convolution is PyTorch's on the unpacked weight: exact, and no tiles or better there."""
    exact = precision == "exact" and input.dtype != torch.float64
    return exact and (planes.ndim == 2 or _prefer_float(output_shape))


def bitserial_conv2d_kernel(
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
) -> str:
    """What ``bitserial_conv2d`` computes with: instruction set and way, unpacked to PyTorch, or ``reference``."""
    precision = "exact" if reference.always_exact(weight_shape, groups) else precision
    if _unpacks(input, planes, precision, conv2d_shape(input, weight_shape, stride, padding, dilation)):
        return "unpacked to PyTorch"
    if planes.ndim == 2 or input.dtype == torch.float64:
        return "reference"
    return f"{_C.isa()} {'float' if precision == 'exact' else 'byte'} products"


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
    windows = (tuple(stride), tuple(padding), tuple(dilation))
    precision = "exact" if reference.always_exact(weight_shape, groups) else precision
    if planes.ndim > 2 and groups != 1:
        raise ValueError(f"expected groups 1 for planes in the order of tiles, got {groups}")
    shape = conv2d_shape(input, weight_shape, *windows)
    if _unpacks(input, planes, precision, shape):
        # In the usual order, for which PyTorch chooses what it would for the float layer.
        weight = bitserial_weight(planes, step, coefficients, weight_shape, 0)
        return F.conv2d(_as_float32(input), weight, bias, *windows, groups).to(input.dtype)
    if planes.ndim == 2 or input.dtype == torch.float64:
        planes = planes if planes.ndim == 2 else _untile(planes, coefficients, weight_shape)
        return reference.bitserial_conv2d(
            input, planes, step, bias, coefficients, weight_shape, *windows, groups, precision
        )
    _check_tiles(planes, coefficients, weight_shape)
    values = _as_float32(input)
    output = values.new_empty(shape)
    if output.numel() == 0:
        return output.to(input.dtype)
    step = step.contiguous()
    bias = None if bias is None else bias.contiguous()
    _conv2d(tuple(weight_shape), tuple(coefficients), step.ndim == 1, *windows)(
        values.data_ptr(),
        planes.data_ptr(),
        step.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        output.data_ptr(),
        values.shape[0],
        tuple(values.shape[2:]),
        precision,
        torch.get_num_threads(),
    )
    return output if input.dtype is torch.float32 else output.to(input.dtype)


def bitserial_weight_kernel(*arguments: object) -> str:
    """Every caller hands the weight that ``bitserial_weight`` makes to PyTorch."""
    return "unpacked to PyTorch"


def bitserial_weight(
    planes: Tensor, step: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int], channel_axis: int
) -> Tensor:
    """Arguments and result as in ``reference.bitserial_weight``; from either order."""
    if planes.ndim == 2:
        return _weight_of_planes(planes, step, coefficients, weight_shape, channel_axis)
    _check_tiles(planes, coefficients, weight_shape)
    if channel_axis != 0:
        raise ValueError(f"expected channel_axis 0 for planes in the order of tiles, got {channel_axis}")
    return _weight(planes, step, coefficients, weight_shape).contiguous()


def _weight_of_planes(
    planes: Tensor, step: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int], channel_axis: int
) -> Tensor:
    weight = step.new_empty(weight_shape)
    if weight.numel():
        planes, step = planes.contiguous(), step.contiguous()
        before, after = weight_shape[:channel_axis], weight_shape[channel_axis + 1 :]
        layout = (math.prod(before), weight_shape[channel_axis], math.prod(after))
        _C.bitserial_weight_of_planes(
            planes.data_ptr(), *layout, coefficients, step.data_ptr(), step.ndim == 1, weight.data_ptr()
        )
    return weight


def _weight(planes: Tensor, step: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int]) -> Tensor:
    """The weight, that of a convolution with its channels last in memory, where the tiles have them."""
    rows, columns = weight_shape[0], _columns(weight_shape)
    weight = step.new_empty((rows, columns))
    if weight.numel():
        linear = _linear((rows, columns), tuple(coefficients), step.ndim == 1)
        step = step.contiguous()
        threads = torch.get_num_threads()
        _C.bitserial_weight(linear, planes.data_ptr(), step.data_ptr(), weight.data_ptr(), threads)
    if len(weight_shape) == 2:
        return weight
    _, channels, height, width = weight_shape
    return weight.view(rows, height, width, -1)[..., :channels].permute(0, 3, 1, 2)
