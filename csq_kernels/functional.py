"""The documented functions: differentiable wrappers over the ops. They know no device and no backend."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from csq_kernels import backends  # noqa: F401  (registers the implementations of the ops)

_reconstruct = torch.ops.csq.reconstruct.default
_reconstruct_backward = torch.ops.csq.reconstruct_backward.default


class _Reconstruct(torch.autograd.Function):
    """Saves the logits and nothing else: every gradient of (4) to (6) follows from ``dL/dW`` and the logits."""

    @staticmethod
    def forward(ctx, bit_logits, gate_logits, scale, temperature, bits, n_bits, channel_axis, hard_gates):
        ctx.save_for_backward(bit_logits, gate_logits, scale, temperature)
        ctx.constants = (bits, n_bits, channel_axis, hard_gates)
        return _reconstruct(bit_logits, gate_logits, scale, temperature, bits, n_bits, channel_axis, hard_gates)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weight):
        grads = _reconstruct_backward(grad_weight, *ctx.saved_tensors, *ctx.constants)
        wanted = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[:3], strict=True))
        return (*wanted, None, None, None, None, None)


def reconstruct(
    bit_logits: Tensor,
    gate_logits: Tensor,
    scale: Tensor,
    temperature: Tensor,
    *,
    bits: Sequence[int] | None = None,
    n_bits: int | None = None,
    channel_axis: int = 0,
    hard_gates: bool = False,
) -> Tensor:
    """Weight of a CSQ layer, equation (3): ``W = s * sum_b c_b G_b (P_b - N_b)``, ``c_b = 2^b / (2^n - 1)``.

    Gradients are those of (4), (5), (6), computed in one pass that saves only the logits. First derivatives only.

    Args:
        bit_logits: ``(2, k, *weight_shape)``, positive then negative; float32, bfloat16, float16 or float64.
        gate_logits: ``(k,)``, or ``(k, C)`` for one gate per output channel.
        scale: ``()``, or ``(C,)`` for one scale per output channel.
        temperature: ``()``, positive. A tensor, so that changing it does not recompile.
        bits: exponent of each of the ``k`` stored planes, increasing; default ``0 .. k-1``.
        n_bits: ``n`` of the normaliser ``2^n - 1``, 1 to 16; default ``k``.
        channel_axis: axis of the weight that ``C`` indexes.
        hard_gates: use ``[u > 0]`` for the gates, without a gradient for them.

    Returns:
        The weight, contiguous, of shape ``weight_shape`` and the dtype of ``bit_logits``.

    Raises:
        ValueError, TypeError: a shape, size, device or dtype does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> from csq_kernels.functional import reconstruct
        >>> logits = torch.tensor([[[9.0], [-9.0]], [[-9.0], [-9.0]]])      # one weight, digits 1 (b=0) and 0 (b=1)
        >>> weight = reconstruct(logits, torch.tensor([9.0, 9.0]), torch.tensor(3.0), torch.tensor(10.0))
        >>> weight.tolist()
        [1.0]
    """
    planes = bit_logits.shape[1] if bit_logits.ndim > 1 else 0
    bits = list(range(planes)) if bits is None else list(bits)
    n_bits = planes if n_bits is None else n_bits
    return _Reconstruct.apply(bit_logits, gate_logits, scale, temperature, bits, n_bits, channel_axis, hard_gates)
