"""The ops on packed weights in Triton, for CUDA tensors, or for CPU tensors where Triton interprets.

Words of planes become words of bytes by shifts and selects, and only then one element a weight. The weight is the
operand with the rows of the product, so that what was unpacked can stay in registers. ``high`` is served as ``exact``.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from csq_kernels.backends import gpu_planes, gpu_products
from csq_kernels.backends.gpu_planes import tile as bitserial_linear_tile
from csq_kernels.backends.gpu_planes import untile as bitserial_linear_untile
from csq_kernels.backends.layout import DTYPES, weight_layout

__all__ = [
    "bitserial_conv2d",
    "bitserial_linear",
    "bitserial_linear_tile",
    "bitserial_linear_untile",
    "bitserial_weight",
]

# Weights, and blocks of the input, of a program that decodes or quantizes them.
WEIGHTS, BLOCKS = 1024, 8
# Rows of the input from which on making the weight once and multiplying by it is faster, in passes of 16.
PASSES = 128


@triton.jit
def _interleave(b_a, b_b, F: tl.constexpr, LOW: tl.constexpr):
    # Fields of F bits of two words, b_b above b_a, in even and in odd positions.
    return (b_a & LOW) | ((b_b << F) & ~LOW), ((b_a >> F) & LOW) | (b_b & ~LOW)


@triton.jit
def _plane(p_words, i_row, m_row, PLACE: tl.constexpr):
    # PLACE: planes of the groups before, planes of this group, index within it; negative where there is no plane.
    o_lane = (i_row % 8) * 4 + tl.arange(0, 4)[None, :]  # [BN, 4]
    if PLACE < 0:
        return tl.zeros_like(o_lane).to(tl.int32)
    else:
        i_word = (i_row // 8 % 4) * (PLACE // 16 % 16) + PLACE % 16  # [BN, 1]
        o_word = (PLACE // 256 + i_word // 4) * 128 + o_lane * 4 + i_word % 4
        return tl.load(p_words + o_word, mask=m_row, other=0)


@triton.jit
def _bytes(p_words, i_row, m_row, PLACES: tl.constexpr, BASE: tl.constexpr):
    # The codes' 8 bits from exponent BASE on, in the order of the columns.
    b_0 = _plane(p_words, i_row, m_row, PLACES[BASE])
    b_1 = _plane(p_words, i_row, m_row, PLACES[BASE + 1])
    b_2 = _plane(p_words, i_row, m_row, PLACES[BASE + 2])
    b_3 = _plane(p_words, i_row, m_row, PLACES[BASE + 3])
    b_4 = _plane(p_words, i_row, m_row, PLACES[BASE + 4])
    b_5 = _plane(p_words, i_row, m_row, PLACES[BASE + 5])
    b_6 = _plane(p_words, i_row, m_row, PLACES[BASE + 6])
    b_7 = _plane(p_words, i_row, m_row, PLACES[BASE + 7])
    b_0, b_1 = _interleave(b_0, b_1, 1, 0x55555555)
    b_2, b_3 = _interleave(b_2, b_3, 1, 0x55555555)
    b_4, b_5 = _interleave(b_4, b_5, 1, 0x55555555)
    b_6, b_7 = _interleave(b_6, b_7, 1, 0x55555555)
    b_0, b_2 = _interleave(b_0, b_2, 2, 0x33333333)
    b_1, b_3 = _interleave(b_1, b_3, 2, 0x33333333)
    b_4, b_6 = _interleave(b_4, b_6, 2, 0x33333333)
    b_5, b_7 = _interleave(b_5, b_7, 2, 0x33333333)
    b_0, b_4 = _interleave(b_0, b_4, 4, 0x0F0F0F0F)
    b_1, b_5 = _interleave(b_1, b_5, 4, 0x0F0F0F0F)
    b_2, b_6 = _interleave(b_2, b_6, 4, 0x0F0F0F0F)
    b_3, b_7 = _interleave(b_3, b_7, 4, 0x0F0F0F0F)
    # Word i holds columns 4 i .. 4 i + 3 in its bytes 0, 2, 1, 3.
    b_even = tl.join(tl.join(b_0, b_4), tl.join(b_2, b_6))
    b_odd = tl.join(tl.join(b_1, b_5), tl.join(b_3, b_7))
    b_words = tl.join(b_even, b_odd)  # [BN, 4, 2, 2, 2]
    i_column = tl.arange(0, 4)[None, None, :]
    b_words = tl.reshape(b_words, [b_words.shape[0], 32, 1])
    return tl.reshape((b_words >> (i_column % 2 * 16 + i_column // 2 * 8)) & 0xFF, [b_words.shape[0], 128])


@triton.jit
def _codes(p_words, i_row, m_row, offset, PLACES: tl.constexpr, OCTETS: tl.constexpr):
    b_codes = _bytes(p_words, i_row, m_row, PLACES, 0)
    for octet in tl.static_range(1, OCTETS):
        b_codes += _bytes(p_words, i_row, m_row, PLACES, 8 * octet) << (8 * octet)
    return b_codes - offset  # [BN, 128]


# reference.quantize without a group limit, BR blocks of 128 columns a program; the integers as halves.
@triton.jit(do_not_specialize=["items"])
def bitserial_quantize_kernel(p_input, p_values, p_steps, items, columns, blocks, BR: tl.constexpr):
    i_item = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)  # [BR]
    m_item = i_item < items
    i_within = tl.arange(0, 128)[None, :]
    i_column = (i_item % blocks)[:, None] * 128 + i_within  # [BR, 128]
    o_input = (i_item // blocks)[:, None] * columns + i_column
    b_x = tl.load(p_input + o_input, mask=m_item[:, None] & (i_column < columns), other=0.0).to(tl.float32)
    b_size = tl.abs(b_x)
    b_zeros = tl.zeros([BR], tl.float32)
    b_step = tl.div_rn(tl.max(b_size, 1), b_zeros + 127.0)
    b_step = tl.where(b_step < 1.1754943508222875e-38, 0.0, b_step)
    b_finite = tl.sum((b_size < float("inf")).to(tl.int32), 1) == 128
    b_usable = b_finite & (b_step > 0)
    b_inverse = tl.div_rn(b_zeros + 1.0, tl.where(b_usable, b_step, 1.0))
    b_scaled = tl.where(b_usable[:, None], b_x * b_inverse[:, None], 0.0)
    # Adding and subtracting 1.5 * 2^23 rounds half to even; the product must be rounded before, as the launch sees to.
    b_values = (b_scaled + 12582912.0) - 12582912.0
    tl.store(p_values + i_item[:, None] * 128 + i_within, b_values.to(tl.float16), mask=m_item[:, None])
    tl.store(p_steps + i_item, tl.where(b_finite, b_step, float("nan")), mask=m_item)


@triton.jit(do_not_specialize=["batch", "rows", "offset"])
def bitserial_linear_kernel(
    p_input,
    p_input_steps,
    p_words,
    p_step,
    p_bias,
    p_output,
    batch,
    rows,
    columns,
    blocks,
    offset,
    step_stride,
    PLACES: tl.constexpr,
    OCTETS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    QUANTIZED: tl.constexpr,
    BIAS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)[:, None]  # [BN, 1]
    i_input = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)  # [BM]
    m_row = i_row < rows
    m_input = i_input < batch
    p_tiles = p_words + i_row // 32 * blocks * TILE_WORDS
    b_step = tl.load(p_step + i_row * step_stride, mask=m_row, other=0.0)
    b_sums = tl.zeros([BN, BM], tl.float32)
    for block in range(blocks):
        i_column = block * 128 + tl.arange(0, 128)[None, :]
        m_load = m_input[:, None] & (i_column < columns)
        b_x = tl.load(p_input + i_input[:, None] * columns + i_column, mask=m_load, other=0.0)  # [BM, 128]
        b_codes = _codes(p_tiles + block * TILE_WORDS, i_row, m_row, offset, PLACES, OCTETS)
        b_codes = b_codes.to(tl.float32).to(ARITHMETIC)
        b_x = tl.trans(b_x.to(ARITHMETIC))
        if QUANTIZED:
            b_input_step = tl.load(p_input_steps + i_input * blocks + block, mask=m_input, other=0.0)
            b_sums += b_input_step[None, :] * tl.dot(b_codes, b_x)
        elif ARITHMETIC == tl.float32:
            # One running sum over all columns would err by the root of their number. The factor keeps the compiler
            # from making it one again.
            b_sums += b_step * tl.dot(b_codes, b_x, input_precision="ieee")
        else:
            b_sums = tl.dot(b_codes, b_x, b_sums)
    if QUANTIZED or ARITHMETIC != tl.float32:
        b_sums *= b_step
    if BIAS:
        b_sums += tl.load(p_bias + i_row, mask=m_row, other=0.0)
    o_output = i_input[None, :] * rows + i_row
    tl.store(p_output + o_output, b_sums.to(p_output.dtype.element_ty), mask=m_row & m_input[None, :])


# A tile of planes as the codes of the weight, or with a step as the weight.
@triton.jit(do_not_specialize=["rows", "offset"])
def bitserial_untiled_weight_kernel(
    p_words,
    p_step,
    p_weight,
    rows,
    columns,
    blocks,
    offset,
    step_stride,
    PLACES: tl.constexpr,
    OCTETS: tl.constexpr,
    TILE_WORDS: tl.constexpr,
    STEP: tl.constexpr,
):
    i_tile = tl.program_id(0).to(tl.int64)
    i_row = i_tile // blocks * 32 + tl.arange(0, 32)[:, None]  # [32, 1]
    i_column = i_tile % blocks * 128 + tl.arange(0, 128)[None, :]  # [1, 128]
    m_row = i_row < rows
    b_weight = _codes(p_words + i_tile * TILE_WORDS, i_row, m_row, offset, PLACES, OCTETS).to(tl.float32)
    if STEP:
        b_weight *= tl.load(p_step + i_row * step_stride, mask=m_row, other=0.0)
    o_weight = i_row * columns + i_column
    tl.store(p_weight + o_weight, b_weight.to(p_weight.dtype.element_ty), mask=m_row & (i_column < columns))


# The same from canonical planes; the set bits of `exponents` are those of the planes, of `inverted` the negative ones.
@triton.jit(do_not_specialize=["weights", "plane_bytes", "planes", "exponents", "inverted"])
def bitserial_weight_kernel(
    p_planes,
    p_step,
    p_weight,
    weights,
    plane_bytes,
    planes,
    exponents,
    inverted,
    channels,
    inner,
    STEP: tl.constexpr,
    BW: tl.constexpr,
):
    i_weight = tl.program_id(0).to(tl.int64) * BW + tl.arange(0, BW)  # [BW]
    m_weight = i_weight < weights
    b_codes = tl.zeros([BW], tl.int32)
    # Planes lie most significant first, and `rest & -rest` is the lowest that is left.
    o_plane = (planes - 1).to(tl.int64) * plane_bytes
    rest = exponents
    for _ in range(planes):
        b_bytes = tl.load(p_planes + o_plane + i_weight // 8, mask=m_weight, other=0).to(tl.int32)
        power = rest & -rest
        b_bits = (b_bytes >> (i_weight % 8).to(tl.int32)) & 1
        b_codes += tl.where((inverted & power) != 0, -power, power) * b_bits
        rest = rest & (rest - 1)
        o_plane -= plane_bytes
    b_weight = b_codes.to(tl.float32)
    if STEP:
        b_weight *= tl.load(p_step + i_weight // inner % channels, mask=m_weight, other=0.0)
    tl.store(p_weight + i_weight, b_weight.to(p_weight.dtype.element_ty), mask=m_weight)


def _places(coefficients: Sequence[int]) -> tuple[int, ...]:
    """Where the plane of each exponent lies within a tile, as ``_plane`` reads it."""
    places = [-1] * 24
    for group in gpu_planes.groups(coefficients):
        for index in range(group.planes):
            places[group.exponent + index] = (group.first * 16 + group.planes) * 16 + index
    return tuple(places)


def _tile_constants(coefficients: Sequence[int]) -> dict[str, object]:
    highest = abs(coefficients[0]).bit_length() - 1
    return {
        "PLACES": _places(coefficients),
        "OCTETS": highest // 8 + 1,
        "TILE_WORDS": gpu_planes.PLANE_BYTES // 4 * len(coefficients),
    }


def _offset(coefficients: Sequence[int]) -> int:
    return -sum(k for k in coefficients if k < 0)


def block_shape(batch: int, arithmetic: torch.dtype, quantized: bool) -> tuple[int, int]:
    """Rows of the weight and of the input that a program multiplies: as many as fit the registers."""
    if batch <= gpu_planes.PASS_ROWS:
        return 32, gpu_planes.PASS_ROWS
    if arithmetic == torch.float32:
        return 32, 32
    return 64, 32 if quantized else 64


def _quantized(input: Tensor) -> tuple[Tensor, Tensor]:
    """The input in blocks of 128 columns as integers, and the steps of the blocks."""
    batch, columns = input.shape
    padded = gpu_planes.padded_columns(columns)
    blocks = padded // gpu_planes.COLUMNS
    values = input.new_empty((batch, padded), dtype=torch.float16)
    steps = input.new_empty((batch, blocks), dtype=torch.float32)
    bitserial_quantize_kernel[(triton.cdiv(batch * blocks, BLOCKS),)](
        input, values, steps, batch * blocks, columns, blocks, BR=BLOCKS, enable_fp_fusion=False
    )
    return values, steps


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
    quantized = precision == "int8"
    arithmetic = torch.float16 if quantized else input.dtype
    if not gpu_planes.exact_in(arithmetic, coefficients):
        arithmetic = torch.float32
    height, width = block_shape(batch, arithmetic, quantized)
    values, steps = _quantized(input) if quantized else (input, step)
    bitserial_linear_kernel[(triton.cdiv(rows, height), triton.cdiv(batch, width))](
        values,
        steps,
        tiles.view(torch.int32),
        step,
        step if bias is None else bias,
        output,
        batch,
        rows,
        values.shape[1],
        tiles.shape[1],
        _offset(coefficients),
        step.stride(0) if step.ndim == 1 else 0,
        **_tile_constants(coefficients),
        ARITHMETIC=getattr(tl, DTYPES[arithmetic]),
        QUANTIZED=quantized,
        BIAS=bias is not None,
        BN=height,
        BM=width,
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
    step_values = weight if step is None else step.contiguous()
    with torch.cuda.device_of(planes):
        if planes.ndim > 2:
            rows, columns = weight_shape
            bitserial_untiled_weight_kernel[(planes.shape[0] * planes.shape[1],)](
                planes.view(torch.int32),
                step_values,
                weight,
                rows,
                columns,
                planes.shape[1],
                _offset(coefficients),
                int(per_channel),
                **_tile_constants(coefficients),
                STEP=step is not None,
            )
        else:
            _, channels, inner = weight_layout(weight_shape, per_channel, channel_axis)
            bitserial_weight_kernel[(triton.cdiv(weight.numel(), WEIGHTS),)](
                planes.contiguous(),
                step_values,
                weight,
                weight.numel(),
                planes.shape[1],
                len(coefficients),
                sum(abs(k) for k in coefficients),
                _offset(coefficients),
                channels,
                inner,
                STEP=step is not None,
                BW=WEIGHTS,
            )
    return weight


bitserial_linear = functools.partial(gpu_products.linear, _decode, _multiply, PASSES)
bitserial_conv2d = functools.partial(gpu_products.conv2d, _decode)
