"""Every op of the ``csq::`` namespace: its schema, its argument checks and its fake. The contract, written once.

Shapes used throughout: ``k`` stored planes, ``C`` output channels (the length of the weight's ``channel_axis``).

====================  ==============================  =======================================================
argument              shape                           meaning
====================  ==============================  =======================================================
``bit_logits``        ``(2, k, *weight_shape)``       p (index 0) and q (index 1) of equation (1)
``gate_logits``       ``(k,)`` or ``(k, C)``          u of equation (2)
``scale``             ``()`` or ``(C,)``              s of equation (3)
``temperature``       ``()``                          beta; a tensor, so that it can change under torch.compile
``bits``              ``k`` increasing integers       exponent b of each stored plane; pruned planes are not stored
``n_bits``            1..16                           n of the normaliser ``2^n - 1``
``channel_axis``      axis of the weight              which axis ``C`` indexes
``hard_gates``        bool                            gates are ``[u > 0]`` of equation (7) and get no gradient
====================  ==============================  =======================================================

A plane whose gate is exactly 0 contributes nothing, be its logits NaN; every kernel skips it without reading it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

MAX_BITS = 16
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_ARGUMENTS = (
    "Tensor bit_logits, Tensor gate_logits, Tensor scale, Tensor temperature, "
    "int[] bits, int n_bits, int channel_axis, bool hard_gates"
)

SCHEMAS = {
    "reconstruct": f"({_ARGUMENTS}) -> Tensor",
    "reconstruct_backward": f"(Tensor grad_weight, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
}

library = torch.library.Library("csq", "DEF")  # noqa: TOR901 (kept for the life of the process)
for _name, _schema in SCHEMAS.items():
    library.define(_name + _schema, tags=(torch.Tag.pt2_compliant_tag,))


def check_reconstruct(
    bit_logits: Tensor,
    gate_logits: Tensor,
    scale: Tensor,
    temperature: Tensor,
    bits: Sequence[int],
    n_bits: int,
    channel_axis: int,
    hard_gates: bool,
) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless the arguments fit the table at the top of this file."""
    if bit_logits.dtype not in LOGIT_DTYPES:
        raise TypeError(f"expected bit_logits of dtype float32, bfloat16, float16 or float64, got {bit_logits.dtype}")
    if not 1 <= n_bits <= MAX_BITS:
        raise ValueError(f"expected n_bits from 1 to {MAX_BITS}, got {n_bits}")
    planes = len(bits)
    if any(b < 0 or b >= n_bits for b in bits) or any(a >= b for a, b in zip(bits, bits[1:], strict=False)):
        raise ValueError(f"expected bits as increasing integers from 0 to {n_bits - 1}, got {list(bits)}")
    if bit_logits.ndim < 2 or bit_logits.shape[0] != 2 or bit_logits.shape[1] != planes:
        expected = f"(2, {planes}, *weight_shape)"
        raise ValueError(f"expected bit_logits of shape {expected}, got {tuple(bit_logits.shape)}")
    weight_shape = bit_logits.shape[2:]
    per_channel = gate_logits.ndim == 2 or scale.ndim == 1
    if per_channel and not 0 <= channel_axis < len(weight_shape):
        raise ValueError(
            f"expected channel_axis from 0 to {len(weight_shape) - 1} for a weight of shape {tuple(weight_shape)}, "
            f"got {channel_axis}"
        )
    channels = weight_shape[channel_axis] if per_channel else 1
    allowed = f"({planes},) or ({planes}, {channels})" if per_channel else f"({planes},)"
    if gate_logits.ndim not in (1, 2) or gate_logits.shape[0] != planes:
        raise ValueError(f"expected gate_logits of shape {allowed}, got {tuple(gate_logits.shape)}")
    if gate_logits.ndim == 2 and gate_logits.shape[1] != channels:
        raise ValueError(f"expected gate_logits of shape {allowed}, got {tuple(gate_logits.shape)}")
    if scale.ndim > 1 or (scale.ndim == 1 and scale.shape[0] != channels):
        raise ValueError(f"expected scale of shape () or ({channels},), got {tuple(scale.shape)}")
    if temperature.ndim != 0:
        raise ValueError(f"expected temperature of shape (), got {tuple(temperature.shape)}")
    for name, tensor in (("gate_logits", gate_logits), ("scale", scale), ("temperature", temperature)):
        if not tensor.is_floating_point():
            raise TypeError(f"expected {name} of a floating-point dtype, got {tensor.dtype}")
        if tensor.device != bit_logits.device:
            raise ValueError(f"expected {name} on {bit_logits.device} like bit_logits, got {tensor.device}")


def check_reconstruct_backward(grad_weight: Tensor, bit_logits: Tensor, *rest) -> None:
    """As ``check_reconstruct``; ``grad_weight`` has the weight's shape and the logits' device."""
    check_reconstruct(bit_logits, *rest)
    if grad_weight.shape != bit_logits.shape[2:]:
        raise ValueError(f"expected grad_weight of shape {tuple(bit_logits.shape[2:])}, got {tuple(grad_weight.shape)}")
    if not grad_weight.is_floating_point():
        raise TypeError(f"expected grad_weight of a floating-point dtype, got {grad_weight.dtype}")
    if grad_weight.device != bit_logits.device:
        raise ValueError(f"expected grad_weight on {bit_logits.device} like bit_logits, got {grad_weight.device}")


CHECKS: dict[str, Callable[..., None]] = {
    "reconstruct": check_reconstruct,
    "reconstruct_backward": check_reconstruct_backward,
}


@torch.library.register_fake("csq::reconstruct", lib=library)
def _(bit_logits, *rest):
    check_reconstruct(bit_logits, *rest)
    return bit_logits.new_empty(bit_logits.shape[2:])


@torch.library.register_fake("csq::reconstruct_backward", lib=library)
def _(grad_weight, bit_logits, gate_logits, scale, *rest):
    check_reconstruct_backward(grad_weight, bit_logits, gate_logits, scale, *rest)
    return (
        bit_logits.new_empty(bit_logits.shape),
        gate_logits.new_empty(gate_logits.shape),
        scale.new_empty(scale.shape),
    )
