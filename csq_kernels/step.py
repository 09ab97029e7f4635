"""The contract of the single-pass training step: what one layer brings to it, and the rule by which its logits move.

A backend has two functions. ``step_sums(layer)`` returns the gradients (5) and (6), from which the stock optimizer
makes the new gates and scale; ``step_update(layers)`` then writes logits, momenta and the next weight in one pass. They
are not ops of the dispatcher: they change what they are given, and nobody traces an optimizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from csq_kernels._ops import check_reconstruct

STEP_OPS = ("step_sums", "step_update")
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# Weights of a plane that share a scale in a narrow momentum.
MOMENTUM_BLOCK = 256
NARROW = torch.float8_e4m3fn


@dataclass(frozen=True)
class Rule:
    """How a logit x moves for its gradient g (times ``sign``), with as many momenta as the rule has:

    - none: ``x -= lr * g``
    - one, SGD: ``m = decay * m + gain * g; x -= lr * (kept * m + direct * g)``
    - two, Adam: ``m += gain * (g - m); v = second_decay * v + second_gain * g^2; x -= lr * m / (root * sqrt(v) + eps)``
    """

    momenta: int
    lr: float
    sign: float = 1.0
    decay: float = 0.0
    gain: float = 0.0
    kept: float = 0.0
    direct: float = 0.0
    second_decay: float = 0.0
    second_gain: float = 0.0
    root: float = 0.0
    epsilon: float = 0.0

    @classmethod
    def sgd(cls, step: int, lr: float, momentum: float, dampening: float, nesterov: bool, maximize: bool) -> "Rule":
        """The rule of ``torch.optim.SGD`` in its ``step``-th step, the first being 1."""
        sign = -1.0 if maximize else 1.0
        if momentum == 0:
            return cls(0, lr, sign)
        gain = 1.0 if step == 1 else 1.0 - dampening
        kept, direct = (momentum, 1.0) if nesterov else (1.0, 0.0)
        return cls(1, lr, sign, momentum, gain, kept, direct)

    @classmethod
    def adam(cls, step: int, lr: float, betas: tuple[float, float], eps: float, maximize: bool) -> "Rule":
        """The rule of ``torch.optim.Adam`` in its ``step``-th step, the first being 1."""
        first, second = betas
        return cls(
            momenta=2,
            lr=lr / (1 - first**step),
            sign=-1.0 if maximize else 1.0,
            gain=1 - first,
            second_decay=second,
            second_gain=1 - second,
            root=(1 - second**step) ** -0.5,
            epsilon=eps,
        )


class Vectors(NamedTuple):
    """Gate logits ``(k,)`` or ``(k, C)``, scale ``()`` or ``(C,)``, temperature ``()``: what makes a weight of bits."""

    gate_logits: Tensor
    scale: Tensor
    temperature: Tensor


@dataclass(frozen=True)
class StepLayer:
    """One layer in one step; shapes as in ``_ops``.

    ``grad_weight`` belongs to the weight that ``before`` made, and ``after`` makes the next one; between ``step_sums``
    and ``step_update`` the caller changes ``after`` in place. Written are ``bit_logits`` (stochastically rounded if
    bfloat16), ``momenta`` and ``weight``. A narrow momentum is float8 with a scale for each ``MOMENTUM_BLOCK`` weights
    of a plane, also stochastically rounded; Adam's second one is kept as its root.
    """

    weight: Tensor
    grad_weight: Tensor
    bit_logits: Tensor
    before: Vectors
    after: Vectors
    bits: tuple[int, ...]
    n_bits: int
    channel_axis: int
    hard_gates: bool
    rule: Rule
    momenta: tuple[Tensor, ...]
    momentum_scales: tuple[Tensor, ...]
    key: int

    def suits_kernels(self) -> bool:
        """Whether kernels know its dtypes and have something to do; the reference serves what is left."""
        return torch.float64 not in (self.bit_logits.dtype, self.weight.dtype) and self.weight.numel() > 0

    def constants(self) -> dict[str, Any]:
        """What follows the tensors in the arguments of ``reconstruct``."""
        names = ("bits", "n_bits", "channel_axis", "hard_gates")
        return {name: getattr(self, name) for name in names}


def momentum_scale_shape(bit_logits: Tensor) -> tuple[int, int, int]:
    """Shape of the scales of a narrow momentum: one for each block of each plane."""
    weights = bit_logits[0, 0].numel() if bit_logits.shape[1] else 0
    return 2, bit_logits.shape[1], -(-weights // MOMENTUM_BLOCK)


def mix(*words: int) -> int:
    """32 bits that look random, from integers: the mixer of ``csrc/core/step.h``, once a word."""
    mixed = 0
    for word in words:
        mixed = (mixed + word + 0x9E3779B9) & 0xFFFFFFFF
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
            mixed = ((mixed ^ (mixed >> shift)) * factor) & 0xFFFFFFFF
    return mixed


def expect_shape(name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    """Raise ``ValueError`` unless the tensor has this shape."""
    if tensor.shape != tuple(expected):
        raise ValueError(f"expected {name} of shape {tuple(expected)}, got {tuple(tensor.shape)}")


def expect_dtype(name: str, tensor: Tensor, expected: torch.dtype) -> None:
    """Raise ``TypeError`` unless the tensor has this dtype."""
    if tensor.dtype != expected:
        raise TypeError(f"expected {name} of dtype {expected}, got {tensor.dtype}")


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first address of a tensor and the one after its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (reach + 1) * tensor.element_size() if tensor.numel() else start


def _check_memory(written: dict[str, Tensor], read: dict[str, Tensor]) -> None:
    """Raise ``ValueError`` unless memory holds the values, and what is written shares none."""
    for name, tensor in (written | read).items():
        if tensor.is_neg():
            raise ValueError(f"expected {name} as it is in memory, got a negated view: resolve_neg copies it")
    for name, tensor in written.items():
        if tensor.is_contiguous():
            continue
        # From the innermost dimension outwards, each steps over all that the ones before it reach.
        reach = 1
        for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
            if size > 1 and stride < reach:
                raise ValueError(f"expected {name} with memory for each element, got strides {tensor.stride()}")
            reach += stride * (size - 1)
    extents = sorted(((*_extent(tensor), name) for name, tensor in (written | read).items()))
    reached, last = 0, ""
    for start, end, name in extents:
        if start < reached and (name in written or last in written):
            raise ValueError(f"expected {name} and {last} in memory of their own, got tensors that overlap")
        if end > reached:
            reached, last = end, name


def check_step(layer: StepLayer) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless the tensors of a layer belong together."""
    for name, tensor in (("bit_logits", layer.bit_logits), ("weight", layer.weight)):
        if tensor.dtype not in LOGIT_DTYPES:
            raise TypeError(f"expected {name} of dtype float32, bfloat16 or float64, got {tensor.dtype}")
    expect_shape("bit_logits", layer.bit_logits, (2, len(layer.bits), *layer.weight.shape))
    check_reconstruct(layer.bit_logits, *layer.after, **layer.constants())
    expect_shape("grad_weight", layer.grad_weight, layer.weight.shape)
    for name, after, before in zip(Vectors._fields, layer.after, layer.before, strict=True):
        expect_shape(f"{name} before the step", before, after.shape)
        expect_dtype(f"{name} before the step", before, after.dtype)
    if len(layer.momenta) != layer.rule.momenta:
        raise ValueError(f"expected {layer.rule.momenta} momenta, got {len(layer.momenta)}")
    expect_dtype("grad_weight", layer.grad_weight, layer.weight.dtype)
    wide = torch.promote_types(layer.bit_logits.dtype, torch.float32)
    for momentum in layer.momenta:
        expect_shape("momenta", momentum, layer.bit_logits.shape)
        expect_dtype("momenta", momentum, NARROW if layer.momentum_scales else wide)
    for scales in layer.momentum_scales:
        expect_shape("momentum_scales", scales, momentum_scale_shape(layer.bit_logits))
        expect_dtype("momentum_scales", scales, torch.float32)
    state = {"bit_logits": [layer.bit_logits], "momenta": layer.momenta, "momentum_scales": layer.momentum_scales}
    for name, tensors in (state | {"grad_weight": [layer.grad_weight]}).items():
        for tensor in tensors:
            if tensor.device != layer.weight.device:
                raise ValueError(f"expected {name} on {layer.weight.device} like the weight, got {tensor.device}")
            if name in state and not tensor.is_contiguous():
                raise ValueError(f"expected {name} contiguous, got strides {tensor.stride()}")
    if layer.weight.device.type == "meta":
        return
    several = {f"{name} {i}": t for name in ("momenta", "momentum_scales") for i, t in enumerate(getattr(layer, name))}
    vectors = {f"{name} after the step": t for name, t in zip(Vectors._fields, layer.after, strict=True)}
    vectors |= {f"{name} before the step": t for name, t in zip(Vectors._fields, layer.before, strict=True)}
    _check_memory(
        {"weight": layer.weight, "bit_logits": layer.bit_logits, **several},
        {"grad_weight": layer.grad_weight, **vectors},
    )
