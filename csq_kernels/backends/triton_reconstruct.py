"""Equations (3) to (6) in Triton, for CUDA tensors, or for CPU tensors where Triton interprets.

The weight is seen as a matrix of ``rows = outer * C`` by ``inner`` and cut into tiles ``[BR, BI]``, a program each.
A row has one channel; when nothing is per channel there is one row, and a tile is a run of the flat weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from csq_kernels import reference
from csq_kernels.backends.layout import channel_layout

TILE = 1024


@triton.jit
def _sigmoid(x):
    # exp overflows to inf below -88, and 1 / inf is the 0 that is meant; no logit gives inf / inf.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _exponent_rate(beta):
    return -1.4426950408889634 * beta


@triton.jit
def _soft_bit(logit, rate):
    return 1.0 / (1.0 + tl.exp2(rate * logit))


@triton.jit
def _digit(p, q, rate):
    # P - N through one division; csrc/core/soft_bits.h derives it and its error.
    a = tl.minimum(tl.exp2(rate * p), 9223372036854775808.0, propagate_nan=tl.PropagateNan.ALL)
    b = tl.minimum(tl.exp2(rate * q), 9223372036854775808.0, propagate_nan=tl.PropagateNan.ALL)
    return (b - a) / ((1.0 + a) * (1.0 + b))


@triton.jit
def _gates(u, beta, HARD_GATES: tl.constexpr):
    if HARD_GATES:
        return tl.where(u > 0.0, 1.0, 0.0)
    else:
        return _sigmoid(beta * u)


# Equation (3) but for its last factor: the sum of 2^b G_b (P_b - N_b) over the planes whose exponents are set in
# `bits`, lowest first: `rest & -rest` is 2^b of the next one. Planes whose gate is 0 in the whole tile are not read.
@triton.jit
def _total(
    p_bit_logits,
    p_gate_logits,
    beta,
    bits,
    planes,
    o_plane,
    o_gate,
    m_row,
    m_tile,
    plane_stride,
    sign_stride,
    gate_plane_stride,
    HARD_GATES: tl.constexpr,
):
    rate = _exponent_rate(beta)
    b_total = tl.zeros(m_tile.shape, tl.float32)
    rest = bits
    for _ in range(planes):
        b_logit = tl.load(p_gate_logits + o_gate, mask=m_row, other=0.0).to(tl.float32)
        b_gate = _gates(b_logit, beta, HARD_GATES)  # [BR, 1]
        m_open = m_row & (b_gate != 0.0)
        if tl.max(tl.max(m_open.to(tl.int32), 1), 0) != 0:
            m_read = m_tile & m_open
            b_p = tl.load(p_bit_logits + o_plane, mask=m_read, other=0.0).to(tl.float32)
            b_q = tl.load(p_bit_logits + sign_stride + o_plane, mask=m_read, other=0.0).to(tl.float32)
            b_power = (rest & -rest).to(tl.float32) * b_gate
            b_total += b_power * _digit(b_p, b_q, rate)
        rest = rest & (rest - 1)
        o_plane += plane_stride
        o_gate += gate_plane_stride
    return b_total


# Neither the set of exponents nor its size is a constant of the kernels, so dropping a plane compiles nothing.
@triton.jit(do_not_specialize=["bits", "planes", "levels"])
def reconstruct_fwd_kernel(
    p_bit_logits,
    p_gate_logits,
    p_scale,
    p_temperature,
    p_weight,
    bits,
    planes,
    levels,
    rows,
    channels,
    inner,
    column_blocks,
    plane_stride,
    sign_stride,
    gate_plane_stride,
    gate_channel_stride,
    scale_stride,
    HARD_GATES: tl.constexpr,
    BR: tl.constexpr,
    BI: tl.constexpr,
):
    i_block = tl.program_id(0).to(tl.int64)
    i_row = (i_block // column_blocks) * BR + tl.arange(0, BR)[:, None]  # [BR, 1]
    i_column = (i_block % column_blocks) * BI + tl.arange(0, BI)[None, :]  # [1, BI]
    i_channel = i_row % channels  # [BR, 1]
    m_row = i_row < rows
    m_tile = m_row & (i_column < inner)  # [BR, BI]
    o_weight = i_row * inner + i_column  # [BR, BI]

    beta = tl.load(p_temperature).to(tl.float32)
    b_total = _total(
        p_bit_logits,
        p_gate_logits,
        beta,
        bits,
        planes,
        o_weight,
        i_channel * gate_channel_stride,
        m_row,
        m_tile,
        plane_stride,
        sign_stride,
        gate_plane_stride,
        HARD_GATES,
    )
    b_scale = tl.load(p_scale + i_channel * scale_stride, mask=m_row, other=0.0).to(tl.float32)
    # Correctly rounded, or decided bits would not give equation (7) bit for bit.
    b_step = tl.div_rn(b_scale, tl.zeros([BR, 1], tl.float32) + levels)
    tl.store(p_weight + o_weight, (b_step * b_total).to(p_weight.dtype.element_ty), mask=m_tile)


# Logit gradients unless p_grad_bits is None, and per tile row and plane the partial sum T of D (P - N) from which (5)
# and (6) follow.
@triton.jit(do_not_specialize=["bits", "planes", "levels"])
def reconstruct_bwd_kernel(
    p_grad_weight,
    p_bit_logits,
    p_gate_logits,
    p_scale,
    p_temperature,
    p_grad_bits,
    p_partial,
    bits,
    planes,
    levels,
    rows,
    channels,
    inner,
    column_blocks,
    plane_stride,
    sign_stride,
    partial_stride,
    gate_plane_stride,
    gate_channel_stride,
    scale_stride,
    HARD_GATES: tl.constexpr,
    BR: tl.constexpr,
    BI: tl.constexpr,
):
    RUN: tl.constexpr = min(BI, 4)
    i_block = tl.program_id(0).to(tl.int64)
    i_row = (i_block // column_blocks) * BR + tl.arange(0, BR)[:, None]  # [BR, 1]
    i_column_block = i_block % column_blocks
    i_column = i_column_block * BI + tl.arange(0, BI)[None, :]  # [1, BI]
    i_channel = i_row % channels  # [BR, 1]
    m_row = i_row < rows
    m_tile = m_row & (i_column < inner)  # [BR, BI]
    o_weight = i_row * inner + i_column  # [BR, BI]

    beta = tl.load(p_temperature).to(tl.float32)
    rate = _exponent_rate(beta)
    b_scale = tl.load(p_scale + i_channel * scale_stride, mask=m_row, other=0.0).to(tl.float32)
    b_step = tl.div_rn(b_scale, tl.zeros([BR, 1], tl.float32) + levels)
    b_grad = tl.load(p_grad_weight + o_weight, mask=m_tile, other=0.0).to(tl.float32)  # [BR, BI]
    b_slope = b_grad * b_step * beta

    o_plane = o_weight
    o_gate = i_channel * gate_channel_stride
    o_partial = i_row * column_blocks + i_column_block  # [BR, 1]
    rest = bits
    for _ in range(planes):
        b_logit = tl.load(p_gate_logits + o_gate, mask=m_row, other=0.0).to(tl.float32)
        b_gate = _gates(b_logit, beta, HARD_GATES)  # [BR, 1]
        m_open = m_row & (b_gate != 0.0)
        if p_grad_bits is not None:
            b_grad_p = tl.zeros([BR, BI], tl.float32)
            b_grad_q = tl.zeros([BR, BI], tl.float32)
        b_sum = tl.zeros([BR, 1], tl.float64)
        if tl.max(tl.max(m_open.to(tl.int32), 1), 0) != 0:
            m_read = m_tile & m_open
            b_p = tl.load(p_bit_logits + o_plane, mask=m_read, other=0.0).to(tl.float32)
            b_q = tl.load(p_bit_logits + sign_stride + o_plane, mask=m_read, other=0.0).to(tl.float32)
            b_p = _soft_bit(b_p, rate)
            b_q = _soft_bit(b_q, rate)
            if p_grad_bits is not None:
                b_factor = b_slope * ((rest & -rest).to(tl.float32) * b_gate)
                b_grad_p = b_factor * b_p * (1.0 - b_p)
                b_grad_q = -b_factor * b_q * (1.0 - b_q)
            # fp32 for the few neighbours that a thread holds, fp64 from there on; the order follows from the tile.
            b_terms = tl.reshape(b_grad * (b_p - b_q), [BR, BI // RUN, RUN])
            b_sum = tl.sum(tl.sum(b_terms, axis=2).to(tl.float64), axis=1)[:, None]
        if p_grad_bits is not None:
            dtype = p_grad_bits.dtype.element_ty
            tl.store(p_grad_bits + o_plane, b_grad_p.to(dtype), mask=m_tile)
            tl.store(p_grad_bits + sign_stride + o_plane, b_grad_q.to(dtype), mask=m_tile)
        tl.store(p_partial + o_partial, b_sum, mask=m_row)
        rest = rest & (rest - 1)
        o_plane += plane_stride
        o_gate += gate_plane_stride
        o_partial += partial_stride


# Adds the partial sums of BC channels, and writes the part of each channel in (5) and in (6). All of it in fp64.
@triton.jit(do_not_specialize=["bits", "planes", "levels"])
def reconstruct_bwd_finish_kernel(
    p_partial,
    p_gate_logits,
    p_scale,
    p_temperature,
    p_grad_gates,
    p_grad_scale,
    bits,
    planes,
    levels,
    partials,
    channels,
    column_blocks,
    partial_stride,
    gate_plane_stride,
    gate_channel_stride,
    scale_stride,
    HARD_GATES: tl.constexpr,
    BC: tl.constexpr,
    BN: tl.constexpr,
):
    i_channel = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)[:, None]  # [BC, 1]
    m_channel = i_channel < channels
    beta = tl.load(p_temperature).to(tl.float32).to(tl.float64)
    b_scale = tl.load(p_scale + i_channel * scale_stride, mask=m_channel, other=0.0).to(tl.float32).to(tl.float64)
    unit = 1.0 / tl.cast(levels, tl.float64)
    b_grad_scale = tl.zeros([BC, 1], tl.float64)
    o_gate = i_channel * gate_channel_stride
    o_grad = i_channel
    o_plane = i_channel * column_blocks
    rest = bits
    for _ in range(planes):
        b_sum = tl.zeros([BC, BN], tl.float64)
        for start in range(0, partials, BN):
            # A channel has column_blocks partial sums in each of its outer rows, which lie `channels` rows apart.
            i_partial = start + tl.arange(0, BN)[None, :]
            o_row = (i_partial // column_blocks).to(tl.int64) * channels * column_blocks
            o_partial = o_plane + o_row + i_partial % column_blocks  # [BC, BN]
            b_sum += tl.load(p_partial + o_partial, mask=m_channel & (i_partial < partials), other=0.0)
        b_total = tl.sum(b_sum, axis=1)[:, None]
        b_u = tl.load(p_gate_logits + o_gate, mask=m_channel, other=0.0).to(tl.float32).to(tl.float64)
        b_gate = _gates(b_u, beta, HARD_GATES).to(tl.float64)
        power = (rest & -rest).to(tl.float64)
        if HARD_GATES:
            b_grad_gate = tl.zeros([BC, 1], tl.float64)
        else:
            b_grad_gate = beta * b_gate * (1.0 - b_gate) * power * unit * b_scale * b_total
        tl.store(p_grad_gates + o_grad, b_grad_gate, mask=m_channel)
        b_grad_scale += power * b_gate * unit * b_total
        rest = rest & (rest - 1)
        o_gate += gate_plane_stride
        o_grad += channels
        o_plane += partial_stride
    tl.store(p_grad_scale + i_channel, b_grad_scale, mask=m_channel)


def tile_shape(rows: int, inner: int) -> tuple[int, int]:
    """Return ``(BR, BI)``, powers of two with at most ``TILE`` elements."""
    columns = min(triton.next_power_of_2(inner), TILE)
    # Rather several rows in a tile than more than an eighth of it beyond the end of its row.
    while columns > 64 and rows > TILE // columns and triton.cdiv(inner, columns) * columns * 8 > inner * 9:
        columns //= 2
    return min(triton.next_power_of_2(rows), TILE // columns), columns


@dataclass(frozen=True)
class _Plan:
    """How one weight is cut into tiles, and the kernels' integer arguments in their order."""

    grid: tuple[int]
    tile: tuple[int, int]
    planes: tuple[int, int, float]
    matrix: tuple[int, int, int, int]
    plane_strides: tuple[int, int]
    parameter_strides: tuple[int, int, int]
    outer: int
    channels: int
    column_blocks: int


def _plan(bit_logits: Tensor, gates: Tensor, scale: Tensor, bits: Sequence[int], n_bits: int, axis: int) -> _Plan:
    outer, channels, inner = channel_layout(bit_logits.shape[2:], gates, scale, axis)
    rows = outer * channels
    numel = rows * inner
    height, width = tile_shape(rows, inner)
    column_blocks = triton.cdiv(inner, width)
    return _Plan(
        grid=(triton.cdiv(rows, height) * column_blocks,),
        tile=(height, width),
        planes=(sum(1 << bit for bit in bits), len(bits), float(2**n_bits - 1)),
        matrix=(rows, channels, inner, column_blocks),
        plane_strides=(numel, len(bits) * numel),
        parameter_strides=(
            gates.stride(0),
            gates.stride(1) if gates.ndim == 2 else 0,
            scale.stride(0) if scale.ndim == 1 else 0,
        ),
        outer=outer,
        channels=channels,
        column_blocks=column_blocks,
    )


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
    """Equation (3) in one pass, fp32 arithmetic; as ``reference.reconstruct``, which serves float64."""
    if bit_logits.dtype == torch.float64:
        return reference.reconstruct(
            bit_logits, gate_logits, scale, temperature, bits, n_bits, channel_axis, hard_gates
        )
    weight = bit_logits.new_empty(bit_logits.shape[2:])
    if weight.numel() == 0:
        return weight
    plan = _plan(bit_logits, gate_logits, scale, bits, n_bits, channel_axis)
    with torch.cuda.device_of(bit_logits):
        reconstruct_fwd_kernel[plan.grid](
            bit_logits.contiguous(),
            gate_logits,
            scale,
            temperature,
            weight,
            *plan.planes,
            *plan.matrix,
            *plan.plane_strides,
            *plan.parameter_strides,
            HARD_GATES=hard_gates,
            BR=plan.tile[0],
            BI=plan.tile[1],
        )
    return weight


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
    """Equations (4) to (6) in one pass and a small second kernel; as ``reference.reconstruct_backward``.

    Sums run in a fixed order: equal inputs give equal bits.
    """
    if bit_logits.dtype == torch.float64:
        return reference.reconstruct_backward(
            grad_weight, bit_logits, gate_logits, scale, temperature, bits, n_bits, channel_axis, hard_gates
        )
    grad_bits = bit_logits.new_empty(bit_logits.shape)
    vectors = gate_logits, scale, temperature
    sums = _backward(grad_weight, bit_logits, grad_bits, *vectors, bits, n_bits, channel_axis, hard_gates)
    return grad_bits, *sums


def reconstruct_sums(
    grad_weight: Tensor,
    bit_logits: Tensor,
    gate_logits: Tensor,
    scale: Tensor,
    temperature: Tensor,
    bits: Sequence[int],
    n_bits: int,
    channel_axis: int,
    hard_gates: bool,
) -> tuple[Tensor, Tensor]:
    """Equations (5) and (6) alone, for a gradient of any dtype; the same bits as from ``reconstruct_backward``."""
    vectors = gate_logits, scale, temperature
    return _backward(grad_weight, bit_logits, None, *vectors, bits, n_bits, channel_axis, hard_gates)


def _backward(
    grad_weight: Tensor,
    bit_logits: Tensor,
    grad_bits: Tensor | None,
    gate_logits: Tensor,
    scale: Tensor,
    temperature: Tensor,
    bits: Sequence[int],
    n_bits: int,
    channel_axis: int,
    hard_gates: bool,
) -> tuple[Tensor, Tensor]:
    if grad_weight.numel() == 0:
        return gate_logits.new_zeros(gate_logits.shape), scale.new_zeros(scale.shape)
    plan = _plan(bit_logits, gate_logits, scale, bits, n_bits, channel_axis)
    partials = plan.outer * plan.column_blocks
    partial_stride = partials * plan.channels
    partial = bit_logits.new_empty((len(bits), partial_stride), dtype=torch.float64)
    grad_gates = bit_logits.new_empty((len(bits), plan.channels), dtype=torch.float64)
    grad_scale = bit_logits.new_empty((plan.channels,), dtype=torch.float64)
    with torch.cuda.device_of(bit_logits):
        reconstruct_bwd_kernel[plan.grid](
            grad_weight.contiguous(),
            bit_logits.contiguous(),
            gate_logits,
            scale,
            temperature,
            grad_bits,
            partial,
            *plan.planes,
            *plan.matrix,
            *plan.plane_strides,
            partial_stride,
            *plan.parameter_strides,
            HARD_GATES=hard_gates,
            BR=plan.tile[0],
            BI=plan.tile[1],
        )
        width = min(triton.next_power_of_2(partials), TILE)
        height = min(triton.next_power_of_2(plan.channels), TILE // width)
        reconstruct_bwd_finish_kernel[(triton.cdiv(plan.channels, height),)](
            partial,
            gate_logits,
            scale,
            temperature,
            grad_gates,
            grad_scale,
            *plan.planes,
            partials,
            plan.channels,
            plan.column_blocks,
            partial_stride,
            *plan.parameter_strides,
            HARD_GATES=hard_gates,
            BC=height,
            BN=width,
        )
    # What the channels share gets a summand from each.
    if gate_logits.ndim == 1:
        grad_gates = grad_gates.sum(1)
    if scale.ndim == 0:
        grad_scale = grad_scale.sum()
    return grad_gates.to(gate_logits.dtype), grad_scale.to(scale.dtype)
