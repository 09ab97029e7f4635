"""The single-pass step in plain PyTorch: any dtype and device, float64 to judge the others."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from csq_kernels import reference
from csq_kernels.step import MOMENTUM_BLOCK, NARROW, StepLayer

_LARGEST = 448.0
# As kMomentumKeys in csrc/core/step.h.
_MOMENTUM_KEYS = (0x9E3779B9, 0x85EBCA6B)


def random_words(shape: Sequence[int], key: int, device: torch.device) -> Tensor:
    """A random 32-bit number, as int64, for each element in order: ``mix(counter + key)`` of ``csrc/core/step.h``."""
    words = torch.arange(torch.Size(shape).numel(), device=device) + key & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        words = ((words ^ (words >> shift)) * factor) & 0xFFFFFFFF
    return words.reshape(shape)


def round_to_bfloat16(values: Tensor, random: Tensor) -> Tensor:
    """float32 rounded to a bfloat16 neighbour, with the upper 16 of the random bits; what is not finite stays."""
    bits = values.view(torch.int32).to(torch.int64) & 0xFFFFFFFF
    moved = torch.where(bits & 0x7F800000 < 0x7F800000, bits + (random >> 16), bits) >> 16
    return torch.where(moved > 0x7FFF, moved - 0x10000, moved).to(torch.int16).view(torch.bfloat16)


def _blocks(plane: Tensor) -> Tensor:
    """``(2, k, *weight)`` as ``(2, k, blocks, MOMENTUM_BLOCK)``, filled up with zeros."""
    flat = plane.reshape(*plane.shape[:2], math.prod(plane.shape[2:]) if plane.shape[1] else 0)
    short = -flat.shape[2] % MOMENTUM_BLOCK
    return torch.nn.functional.pad(flat, (0, short)).unflatten(2, (-1, MOMENTUM_BLOCK))


def _like(blocks: Tensor, plane: Tensor) -> Tensor:
    return blocks.flatten(2)[:, :, : math.prod(plane.shape[2:])].reshape(plane.shape)


def widen(codes: Tensor, scales: Tensor, root: bool) -> Tensor:
    """The float32 values of a narrow momentum."""
    values = _like(_blocks(codes.float()) * scales[..., None], codes)
    return values.square() if root else values


def narrow(values: Tensor, random: Tensor, root: bool) -> tuple[Tensor, Tensor]:
    """float8 codes and the scales of their blocks; with ``root`` the square roots, of which only 0 becomes 0."""
    blocks = _blocks(values.float().sqrt() if root else values.float())
    largest = blocks.abs().amax(-1)
    some = largest > 2.0**-100
    scales = torch.where(some, largest / _LARGEST, 0.0)
    inverse = torch.where(some, _LARGEST / largest, 0.0)
    size = (blocks * inverse[..., None]).clamp(-_LARGEST, _LARGEST)
    dropped = _blocks(random >> 12)
    magnitude = size.abs().view(torch.int32).to(torch.int64)
    normal = (magnitude + dropped >> 20) - (120 << 3)
    small = (size.abs() * 2.0**9 + dropped.float() * 2.0**-20).to(torch.int64)
    code = torch.where(size.abs() < 2.0**-6, small, normal)
    if root:
        code = torch.where(size > 0, code.clamp(min=1), code)
    code = code | torch.where(torch.signbit(size), 0x80, 0)
    return _like(code.to(torch.uint8).view(NARROW), values), scales


def step_sums(layer: StepLayer) -> tuple[Tensor, Tensor]:
    """Gradients (5) of the gates and (6) of the scale, each in its own dtype."""
    logits = layer.bit_logits.to(torch.promote_types(layer.bit_logits.dtype, torch.float32))
    _, grad_gates, grad_scale = reference.reconstruct_backward(
        layer.grad_weight, logits, *layer.before, **layer.constants()
    )
    return grad_gates, grad_scale


def step_update(layers: Sequence[StepLayer]) -> None:
    """New logits, momenta and weights, in place."""
    for layer in layers:
        _update(layer)


def _update(layer: StepLayer) -> None:
    rule, dtype = layer.rule, torch.promote_types(layer.bit_logits.dtype, torch.float32)
    logits = layer.bit_logits.to(dtype)
    grad, _, _ = reference.reconstruct_backward(
        rule.sign * layer.grad_weight.to(dtype), logits, *layer.before, **layer.constants()
    )
    roots = (False, True)
    momenta = list(layer.momenta)
    for i, scales in enumerate(layer.momentum_scales):
        momenta[i] = widen(momenta[i], scales, roots[i])
    if rule.momenta == 0:
        logits = logits - rule.lr * grad
    elif rule.momenta == 1:
        momenta = [rule.decay * momenta[0] + rule.gain * grad]
        logits = logits - rule.lr * (rule.kept * momenta[0] + rule.direct * grad)
    else:
        first = momenta[0] + rule.gain * (grad - momenta[0])
        momenta = [first, rule.second_decay * momenta[1] + rule.second_gain * grad * grad]
        logits = logits - rule.lr * momenta[0] / (rule.root * momenta[1].sqrt() + rule.epsilon)
    for i, (target, values) in enumerate(zip(layer.momenta, momenta, strict=True)):
        if not layer.momentum_scales:
            target.copy_(values)
            continue
        random = random_words(values.shape, layer.key ^ _MOMENTUM_KEYS[i], values.device)
        codes, scales = narrow(values, random, roots[i])
        target.copy_(codes)
        layer.momentum_scales[i].copy_(scales)
    if layer.bit_logits.dtype == torch.bfloat16:
        logits = round_to_bfloat16(logits, random_words(logits.shape, layer.key, logits.device))
    layer.bit_logits.copy_(logits)
    weight = reference.reconstruct(layer.bit_logits.to(dtype), *layer.after, **layer.constants())
    layer.weight.copy_(weight)
