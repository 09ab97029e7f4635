"""The single-pass step in Triton, for CUDA tensors, or for CPU tensors where Triton interprets.

The flat weight is cut into tiles of ``BN`` momentum blocks, a program each; a channel is looked up for each weight.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from csq_kernels import reference_step
from csq_kernels.backends.layout import channel_layout
from csq_kernels.backends.triton_reconstruct import (
    TILE,
    _digit,
    _exponent_rate,
    _gates,
    _plan,
    _soft_bit,
    _total,
    reconstruct_sums,
)
from csq_kernels.step import MOMENTUM_BLOCK, StepLayer

# As in csrc/core/step.h.
_LARGEST_FLOAT8 = tl.constexpr(448.0)
_SMALLEST_BLOCK = tl.constexpr(2.0**-100)
_FIRST_KEY = tl.constexpr(0x9E3779B9)
_SECOND_KEY = tl.constexpr(0x85EBCA6B)
# By a smaller scale the weight is not divided.
_SMALLEST_SCALE = tl.constexpr(2.0**-64)
# The float8 numbers below 2^-6 are in steps of 2^-9; 20 bits of a float32 are dropped.
_SMALLEST_NORMAL = tl.constexpr(2.0**-6)
_SMALL_STEPS = tl.constexpr(2.0**9)
_DROPPED = tl.constexpr(2.0**-20)


@triton.jit
def _random(i_element, key):
    x = i_element.to(tl.uint32) + key
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _round_to_bfloat16(x, random):
    bits = x.to(tl.uint32, bitcast=True)
    # An exponent of all ones has nothing to round: infinity would become NaN, and NaN something else.
    bits = tl.where((bits & 0x7F800000) < 0x7F800000, bits + (random >> 16), bits)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _from_float8(code):
    magnitude = code & 0x7F
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    small = magnitude.to(tl.float32) / _SMALL_STEPS
    value = tl.where(magnitude < 8, small, normal)
    return tl.where((code & 0x80) != 0, -value, value)


@triton.jit
def _to_float8(x, random):
    bits = x.to(tl.uint32, bitcast=True)
    size = tl.minimum(tl.abs(x), _LARGEST_FLOAT8)
    dropped = random >> 12
    normal = ((size.to(tl.uint32, bitcast=True) + dropped) >> 20) - (120 << 3)
    small = (size * _SMALL_STEPS + dropped.to(tl.int32).to(tl.float32) * _DROPPED).to(tl.int32).to(tl.uint32)
    return tl.where(size < _SMALLEST_NORMAL, small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def _load_momentum(p_momentum, p_scales, o_plane, o_block, m_tile, m_block):
    b_momentum = tl.load(p_momentum + o_plane, mask=m_tile, other=0)
    if p_scales is not None:
        b_momentum = _from_float8(b_momentum.to(tl.uint32))
        b_momentum *= tl.load(p_scales + o_block, mask=m_block, other=0.0)
    return b_momentum


@triton.jit
def _store_momentum(p_momentum, p_scales, b_momentum, o_plane, o_block, m_tile, m_block, key, ROOT: tl.constexpr):
    if p_scales is not None:
        b_largest = tl.max(tl.abs(b_momentum), axis=1, keep_dims=True)  # [BN, 1]
        # The inverse of less would overflow; no logit can feel it.
        m_some = b_largest > _SMALLEST_BLOCK
        b_limit = tl.zeros_like(b_largest) + _LARGEST_FLOAT8
        tl.store(p_scales + o_block, tl.where(m_some, tl.div_rn(b_largest, b_limit), 0.0), mask=m_block)
        b_size = b_momentum * tl.where(m_some, tl.div_rn(b_limit, b_largest), 0.0)
        b_momentum = _to_float8(b_size, _random(o_plane, key))
        if ROOT:
            # Divided by the root of 0 a step would be a leap.
            b_momentum = tl.where((b_size > 0.0) & (b_momentum == 0), 1, b_momentum)
        b_momentum = b_momentum.to(tl.uint8)
    tl.store(p_momentum + o_plane, b_momentum, mask=m_tile)


@triton.jit
def _quotient(x, y):
    # `/` errs by two roundings, which a step as long as its logit would hand on; what it leaves of x, divided again,
    # makes it one. `div_rn` takes more registers than there are. Narrow momenta err by more than any of them.
    b_quotient = x / y
    b_rest = tl.fma(-b_quotient, y, x)
    return tl.where(tl.abs(b_quotient) < float("inf"), b_quotient + b_rest / y, b_quotient)


# One plane of one sign: writes the next logits, as they are stored, and their momenta, and returns the logits.
@triton.jit
def _move(
    p_bit_logits,
    p_first,
    p_second,
    p_first_scales,
    p_second_scales,
    b_factor,
    m_open,
    rate,
    o_plane,
    o_block,
    m_tile,
    m_block,
    key,
    lr,
    decay,
    gain,
    kept,
    direct,
    second_decay,
    second_gain,
    root,
    epsilon,
    MOMENTA: tl.constexpr,
):
    b_x = tl.load(p_bit_logits + o_plane, mask=m_tile, other=0.0).to(tl.float32)
    b_bit = _soft_bit(b_x, rate)
    b_grad = tl.where(m_open, b_factor * b_bit * (1.0 - b_bit), 0.0)
    if MOMENTA == 0:
        b_step = b_grad
    else:
        b_first = _load_momentum(p_first, p_first_scales, o_plane, o_block, m_tile, m_block)
        if MOMENTA == 1:
            b_first = decay * b_first + gain * b_grad
            b_step = kept * b_first + direct * b_grad
        else:
            b_first = b_first + gain * (b_grad - b_first)
            b_second = _load_momentum(p_second, p_second_scales, o_plane, o_block, m_tile, m_block)
            # A narrow one is kept as its root: that halves its range.
            if p_second_scales is not None:
                b_second = b_second * b_second
            b_second = second_decay * b_second + second_gain * b_grad * b_grad
            b_root = tl.sqrt_rn(b_second)
            b_size = root * b_root + epsilon
            if p_second_scales is not None:
                b_second = b_root
                b_step = b_first / b_size
            else:
                b_step = _quotient(b_first, b_size)
            _store_momentum(
                p_second, p_second_scales, b_second, o_plane, o_block, m_tile, m_block, key ^ _SECOND_KEY, True
            )
        _store_momentum(p_first, p_first_scales, b_first, o_plane, o_block, m_tile, m_block, key ^ _FIRST_KEY, False)
    b_x = b_x - lr * b_step
    dtype = p_bit_logits.dtype.element_ty
    if dtype == tl.bfloat16:
        b_x = _round_to_bfloat16(b_x, _random(o_plane, key))
    tl.store(p_bit_logits + o_plane, b_x.to(dtype), mask=m_tile)
    return b_x


@triton.jit(do_not_specialize=["bits", "planes", "levels", "key"])
def step_kernel(
    p_bit_logits,
    p_weight,
    p_grad_weight,
    p_first,
    p_second,
    p_first_scales,
    p_second_scales,
    p_gate_logits,
    p_scale,
    p_temperature,
    p_next_gate_logits,
    p_next_scale,
    p_next_temperature,
    bits,
    planes,
    levels,
    size,
    channels,
    inner,
    gate_plane_stride,
    gate_channel_stride,
    scale_stride,
    key,
    sign,
    lr,
    decay,
    gain,
    kept,
    direct,
    second_decay,
    second_gain,
    root,
    epsilon,
    PER_CHANNEL: tl.constexpr,
    HARD_GATES: tl.constexpr,
    MOMENTA: tl.constexpr,
    BN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)[:, None]  # [BN, 1]
    i_weight = i_block * BLOCK + tl.arange(0, BLOCK)[None, :]  # [BN, BLOCK]
    blocks = tl.cdiv(size, BLOCK)
    m_block = i_block < blocks
    m_tile = i_weight < size
    if PER_CHANNEL:
        i_channel = i_weight // inner % channels  # [BN, BLOCK]
        m_channel = m_tile
    else:
        i_channel = tl.zeros([1, 1], tl.int64)
        m_channel = i_channel == 0

    key = key.to(tl.uint32)
    beta = tl.load(p_temperature)
    rate = _exponent_rate(beta)
    next_beta = tl.load(p_next_temperature)
    next_rate = _exponent_rate(next_beta)
    b_scale = tl.load(p_scale + i_channel * scale_stride, mask=m_channel, other=0.0)
    b_levels = tl.zeros_like(b_scale) + levels
    b_grad = tl.load(p_grad_weight + i_weight, mask=m_tile, other=0.0).to(tl.float32)  # [BN, BLOCK]
    b_slope = sign * b_grad * tl.div_rn(b_scale, b_levels) * beta
    b_total = tl.zeros([BN, BLOCK], tl.float32)

    o_gate = i_channel * gate_channel_stride
    rest = bits
    for plane in range(planes):
        power = (rest & -rest).to(tl.float32)
        b_power = power * _gates(tl.load(p_gate_logits + o_gate, mask=m_channel, other=0.0), beta, HARD_GATES)
        b_next_logit = tl.load(p_next_gate_logits + o_gate, mask=m_channel, other=0.0)
        b_next_power = power * _gates(b_next_logit, next_beta, HARD_GATES)
        b_p = _move(
            p_bit_logits,
            p_first,
            p_second,
            p_first_scales,
            p_second_scales,
            b_slope * b_power,
            b_power != 0.0,
            rate,
            plane * size.to(tl.int64) + i_weight,
            plane * blocks.to(tl.int64) + i_block,
            m_tile,
            m_block,
            key,
            lr,
            decay,
            gain,
            kept,
            direct,
            second_decay,
            second_gain,
            root,
            epsilon,
            MOMENTA,
        )
        b_q = _move(
            p_bit_logits,
            p_first,
            p_second,
            p_first_scales,
            p_second_scales,
            -b_slope * b_power,
            b_power != 0.0,
            rate,
            (planes + plane) * size.to(tl.int64) + i_weight,
            (planes + plane) * blocks.to(tl.int64) + i_block,
            m_tile,
            m_block,
            key,
            lr,
            decay,
            gain,
            kept,
            direct,
            second_decay,
            second_gain,
            root,
            epsilon,
            MOMENTA,
        )
        # As _total multiplies and adds, or compilers would round otherwise there.
        m_open = b_next_power != 0.0
        b_total += b_next_power * _digit(tl.where(m_open, b_p, 0.0), tl.where(m_open, b_q, 0.0), next_rate)
        rest = rest & (rest - 1)
        o_gate += gate_plane_stride

    b_next_scale = tl.load(p_next_scale + i_channel * scale_stride, mask=m_channel, other=0.0)
    b_weight = tl.div_rn(b_next_scale, b_levels) * b_total
    tl.store(p_weight + i_weight, b_weight.to(p_weight.dtype.element_ty), mask=m_tile)


# Partial sums of D W per tile row, from which (6) follows; where the scale is too small to divide by, of D W (2^n - 1)
# / s, from the logits.
@triton.jit(do_not_specialize=["bits", "planes"])
def step_scale_sums_kernel(
    p_grad_weight,
    p_weight,
    p_bit_logits,
    p_gate_logits,
    p_scale,
    p_temperature,
    p_partial,
    bits,
    planes,
    rows,
    channels,
    inner,
    column_blocks,
    plane_stride,
    sign_stride,
    gate_plane_stride,
    gate_channel_stride,
    scale_stride,
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

    b_scale = tl.load(p_scale + i_channel * scale_stride, mask=m_row, other=1.0).to(tl.float32)
    m_small = tl.abs(b_scale) < _SMALLEST_SCALE
    b_weight = tl.load(p_weight + o_weight, mask=m_tile, other=0.0)
    if tl.max(tl.max(m_small.to(tl.int32), 1), 0) != 0:
        b_total = _total(
            p_bit_logits,
            p_gate_logits,
            tl.load(p_temperature).to(tl.float32),
            bits,
            planes,
            o_weight,
            i_channel * gate_channel_stride,
            m_row,
            m_tile,
            plane_stride,
            sign_stride,
            gate_plane_stride,
            True,
        )
        b_weight = tl.where(m_small, b_total, b_weight)
    b_grad = tl.load(p_grad_weight + o_weight, mask=m_tile, other=0.0).to(tl.float32)
    # As in reconstruct_bwd_kernel.
    b_terms = tl.reshape(b_grad * b_weight, [BR, BI // RUN, RUN])
    b_sum = tl.sum(tl.sum(b_terms, axis=2).to(tl.float64), axis=1)[:, None]
    tl.store(p_partial + i_row * column_blocks + i_column_block, b_sum, mask=m_row)


def step_sums(layer: StepLayer) -> tuple[Tensor, Tensor]:
    """Gradients (5) of the gates and (6) of the scale, each in its own dtype.

    Fixed gates need the weight alone: (6) is then ``sum(D W) / s``.
    """
    if not layer.suits_kernels():
        return reference_step.step_sums(layer)
    if not layer.hard_gates or layer.weight.dtype != torch.float32:
        return reconstruct_sums(layer.grad_weight, layer.bit_logits, *layer.before, **layer.constants())
    gate_logits, scale, temperature = layer.before
    plan = _plan(layer.bit_logits, gate_logits, scale, layer.bits, layer.n_bits, layer.channel_axis)
    partial = scale.new_empty((plan.outer, plan.channels, plan.column_blocks), dtype=torch.float64)
    bits, planes, levels = plan.planes
    with torch.cuda.device_of(layer.bit_logits):
        step_scale_sums_kernel[plan.grid](
            layer.grad_weight.contiguous(),
            layer.weight.contiguous(),
            layer.bit_logits,
            gate_logits,
            scale,
            temperature,
            partial,
            bits,
            planes,
            *plan.matrix,
            *plan.plane_strides,
            *plan.parameter_strides,
            BR=plan.tile[0],
            BI=plan.tile[1],
        )
    divisor = torch.where(scale.float().abs() < _SMALLEST_SCALE.value, levels, scale.float().double())
    grad_scale = partial.sum((0, 2)) / divisor
    if scale.ndim == 0:
        grad_scale = grad_scale.sum()
    return torch.zeros_like(gate_logits), grad_scale.to(scale.dtype)


def step_update(layers: Sequence[StepLayer]) -> None:
    """New logits, momenta and weights of all layers, in place."""
    for layer in layers:
        if layer.suits_kernels():
            _update(layer)
        else:
            reference_step.step_update([layer])


def _update(layer: StepLayer) -> None:
    gate_logits, scale, _ = layer.after
    _, channels, inner = channel_layout(layer.weight.shape, gate_logits, scale, layer.channel_axis)
    weight = layer.weight if layer.weight.is_contiguous() else layer.weight.contiguous()
    size = weight.numel()
    tile = max(1, TILE // MOMENTUM_BLOCK)
    none = (None, None)
    momenta = tuple(m.view(torch.uint8) if layer.momentum_scales else m for m in layer.momenta)
    rule = layer.rule
    with torch.cuda.device_of(layer.bit_logits):
        step_kernel[(triton.cdiv(size, tile * MOMENTUM_BLOCK),)](
            layer.bit_logits,
            weight,
            layer.grad_weight.contiguous(),
            *(momenta + none)[:2],
            *(layer.momentum_scales + none)[:2],
            *(vector.to(torch.float32).contiguous() for vectors in (layer.before, layer.after) for vector in vectors),
            sum(1 << bit for bit in layer.bits),
            len(layer.bits),
            float(2**layer.n_bits - 1),
            size,
            channels,
            inner,
            channels if gate_logits.ndim == 2 else 1,
            int(gate_logits.ndim == 2),
            int(scale.ndim == 1),
            # Always of one type, which a kernel is compiled for.
            layer.key - 2**32 if layer.key >= 2**31 else layer.key,
            rule.sign,
            rule.lr,
            rule.decay,
            rule.gain,
            rule.kept,
            rule.direct,
            rule.second_decay,
            rule.second_gain,
            rule.root,
            rule.epsilon,
            PER_CHANNEL=gate_logits.ndim == 2 or scale.ndim == 1,
            HARD_GATES=layer.hard_gates,
            MOMENTA=rule.momenta,
            BN=tile,
            BLOCK=MOMENTUM_BLOCK,
        )
    if weight is not layer.weight:
        layer.weight.copy_(weight)
