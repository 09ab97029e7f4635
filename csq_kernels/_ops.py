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

The ops on packed weights, ``W = step * z`` with ``z = sum_j k_j B_j`` (``bitplanes.py``) and ``step = s / (2^n - 1)``:

====================  ==============================  =======================================================
``planes``            ``(k, ceil(weights / 8))``      uint8, canonical as in ``bitplanes.py``; or more axes: the order
                                                      that the device's kernels read, made by ``backends.tile``
``coefficients``      ``k`` integers                  k_j, most significant first
``step``              ``()`` or ``(C,)``              float32, per tensor or per output channel
``bias``              ``(C,)`` or none                float32
``weight_shape``      of the float layer's weight     output channels first, but for ``bitserial_weight``
``precision``         one of ``PRECISIONS``           how the input is read, see ``reference.quantize``
====================  ==============================  =======================================================
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from csq_kernels.bitplanes import check_coefficients, plane_bytes

MAX_BITS = 16
PRECISIONS = ("exact", "high", "int8")
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_ARGUMENTS = (
    "Tensor bit_logits, Tensor gate_logits, Tensor scale, Tensor temperature, "
    "int[] bits, int n_bits, int channel_axis, bool hard_gates"
)

_PACKED = "Tensor planes, Tensor step, Tensor? bias, int[] coefficients, int[] weight_shape"

SCHEMAS = {
    "reconstruct": f"({_ARGUMENTS}) -> Tensor",
    "reconstruct_backward": f"(Tensor grad_weight, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    "bitserial_linear": f"(Tensor input, {_PACKED}, str precision) -> Tensor",
    "bitserial_conv2d": (
        f"(Tensor input, {_PACKED}, int[] stride, int[] padding, int[] dilation, int groups, str precision) -> Tensor"
    ),
    "bitserial_weight": (
        "(Tensor planes, Tensor step, int[] coefficients, int[] weight_shape, int channel_axis) -> Tensor"
    ),
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


def check_planes(planes: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int]) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless these are planes of such a weight, in canonical order or another."""
    check_coefficients(tuple(coefficients))
    if any(size < 0 for size in weight_shape):
        raise ValueError(f"expected weight_shape of sizes from 0, got {list(weight_shape)}")
    if planes.dtype != torch.uint8:
        raise TypeError(f"expected planes of dtype uint8, got {planes.dtype}")
    # With more axes it is in a backend's own order, and the backend knows its shape.
    if planes.ndim <= 2:
        canonical = (len(coefficients), plane_bytes(math.prod(weight_shape)))
        if planes.shape != canonical:
            raise ValueError(f"expected planes of shape {canonical}, got {tuple(planes.shape)}")
    elif math.prod(weight_shape) >= 1 << 63:
        raise ValueError(f"expected weight_shape of sizes that fit in memory, got {list(weight_shape)}")


def _check_weight(
    planes: Tensor, step: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int], channel_axis: int
) -> None:
    check_planes(planes, coefficients, weight_shape)
    channels = weight_shape[channel_axis]
    if step.ndim > 1 or (step.ndim == 1 and step.shape[0] != channels):
        raise ValueError(f"expected step of shape () or ({channels},), got {tuple(step.shape)}")
    if step.dtype != torch.float32:
        raise TypeError(f"expected step of dtype float32, got {step.dtype}")
    if step.device != planes.device:
        raise ValueError(f"expected step on {planes.device} like planes, got {step.device}")


def _check_packed(
    input: Tensor,
    planes: Tensor,
    step: Tensor,
    bias: Tensor | None,
    coefficients: Sequence[int],
    weight_shape: Sequence[int],
    precision: str,
) -> None:
    _check_weight(planes, step, coefficients, weight_shape, 0)
    if precision not in PRECISIONS:
        raise ValueError(f"expected precision as one of {', '.join(PRECISIONS)}, got {precision!r}")
    if not input.is_floating_point():
        raise TypeError(f"expected input of a floating-point dtype, got {input.dtype}")
    if input.device != planes.device:
        raise ValueError(f"expected input on {planes.device} like planes, got {input.device}")
    if bias is not None and bias.shape != (weight_shape[0],):
        raise ValueError(f"expected bias of shape ({weight_shape[0]},), got {tuple(bias.shape)}")
    if bias is not None and bias.dtype != torch.float32:
        raise TypeError(f"expected bias of dtype float32, got {bias.dtype}")
    if bias is not None and bias.device != planes.device:
        raise ValueError(f"expected bias on {planes.device} like planes, got {bias.device}")


def check_bitserial_linear(input: Tensor, *packed) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless ``input`` is ``(..., K)`` for a packed weight of ``(N, K)``."""
    *_, weight_shape, _ = packed
    if len(weight_shape) != 2:
        raise ValueError(f"expected weight_shape of 2 axes, got {list(weight_shape)}")
    _check_packed(input, *packed)
    if input.ndim < 1 or input.shape[-1] != weight_shape[1]:
        raise ValueError(f"expected input of shape (..., {weight_shape[1]}), got {tuple(input.shape)}")


def conv2d_shape(
    input: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """Shape of the output of a convolution."""
    sizes = zip(input.shape[2:], weight_shape[2:], stride, padding, dilation, strict=True)
    spatial = [(size + 2 * p - d * (kernel - 1) - 1) // s + 1 for size, kernel, s, p, d in sizes]
    return [input.shape[0], weight_shape[0], *spatial]


def check_bitserial_conv2d(
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
) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless ``input`` is ``(batch, C, H, W)`` for a weight of shape
    ``(N, C / groups, kernel height, kernel width)``.
    """
    if len(weight_shape) != 4:
        raise ValueError(f"expected weight_shape of 4 axes, got {list(weight_shape)}")
    for name, values, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if len(values) != 2 or min(values) < least:
            raise ValueError(f"expected {name} as 2 integers of at least {least}, got {list(values)}")
    if groups < 1 or weight_shape[0] % groups:
        raise ValueError(f"expected groups that divide {weight_shape[0]} output channels, got {groups}")
    _check_packed(input, planes, step, bias, coefficients, weight_shape, precision)
    channels = weight_shape[1] * groups
    if input.ndim != 4 or input.shape[1] != channels:
        raise ValueError(f"expected input of shape (batch, {channels}, height, width), got {tuple(input.shape)}")
    if min(conv2d_shape(input, weight_shape, stride, padding, dilation)[2:]) < 1:
        raise ValueError(f"expected input at least as large as the kernel {weight_shape[2:]}, got {tuple(input.shape)}")


def check_bitserial_weight(
    planes: Tensor, step: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int], channel_axis: int
) -> None:
    """Raise ``ValueError`` or ``TypeError`` unless the arguments describe a packed weight."""
    if not 0 <= channel_axis < len(weight_shape):
        raise ValueError(f"expected channel_axis from 0 to {len(weight_shape) - 1}, got {channel_axis}")
    _check_weight(planes, step, coefficients, weight_shape, channel_axis)


CHECKS: dict[str, Callable[..., None]] = {
    "reconstruct": check_reconstruct,
    "reconstruct_backward": check_reconstruct_backward,
    "bitserial_linear": check_bitserial_linear,
    "bitserial_conv2d": check_bitserial_conv2d,
    "bitserial_weight": check_bitserial_weight,
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


@torch.library.register_fake("csq::bitserial_linear", lib=library)
def _(input, planes, step, bias, coefficients, weight_shape, precision):
    check_bitserial_linear(input, planes, step, bias, coefficients, weight_shape, precision)
    return input.new_empty((*input.shape[:-1], weight_shape[0]))


@torch.library.register_fake("csq::bitserial_conv2d", lib=library)
def _(input, planes, step, bias, coefficients, weight_shape, stride, padding, dilation, groups, precision):
    check_bitserial_conv2d(
        input, planes, step, bias, coefficients, weight_shape, stride, padding, dilation, groups, precision
    )
    return input.new_empty(conv2d_shape(input, weight_shape, stride, padding, dilation))


@torch.library.register_fake("csq::bitserial_weight", lib=library)
def _(planes, step, coefficients, weight_shape, channel_axis):
    check_bitserial_weight(planes, step, coefficients, weight_shape, channel_axis)
    return step.new_empty(weight_shape)
