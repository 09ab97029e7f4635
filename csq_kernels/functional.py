"""The documented functions: differentiable wrappers over the ops. They know no device and no backend."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input

from csq_kernels import backends
from csq_kernels.backends import tile, untile

__all__ = ["bitserial_conv2d", "bitserial_linear", "bitserial_weight", "reconstruct", "tile", "untile"]

_reconstruct = torch.ops.csq.reconstruct.default
_reconstruct_backward = torch.ops.csq.reconstruct_backward.default


class _Reconstruct(torch.autograd.Function):
    """Saves the logits and nothing else: every gradient of (4) to (6) follows from ``dL/dW`` and the logits."""

    @staticmethod
    def forward(
        ctx, bit_logits, gate_logits, scale, temperature, gradient_temperature, bits, n_bits, channel_axis, hard_gates
    ):
        backward = temperature if gradient_temperature is None else gradient_temperature
        ctx.save_for_backward(bit_logits, gate_logits, scale, backward)
        ctx.constants = (bits, n_bits, channel_axis, hard_gates)
        return _reconstruct(bit_logits, gate_logits, scale, temperature, bits, n_bits, channel_axis, hard_gates)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weight):
        grads = _reconstruct_backward(grad_weight, *ctx.saved_tensors, *ctx.constants)
        wanted = (grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad[:3], strict=True))
        return (*wanted, None, None, None, None, None, None)


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
    gradient_temperature: Tensor | None = None,
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
        gradient_temperature: ``()``, the temperature of (4), (5), (6); default ``temperature``. A lower one lets bits
            learn that the weight has as decided, as a straight-through gradient does.

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
    if gradient_temperature is temperature:
        # torch.compile takes no tensor twice.
        gradient_temperature = None
    elif gradient_temperature is not None and gradient_temperature.shape != ():
        raise ValueError(f"expected gradient_temperature of shape (), got {tuple(gradient_temperature.shape)}")
    return _Reconstruct.apply(
        bit_logits, gate_logits, scale, temperature, gradient_temperature, bits, n_bits, channel_axis, hard_gates
    )


def _serves_directly(input: Tensor) -> bool:
    """Whether an eager call may go straight to its backend: the dispatcher alone costs more than a small layer."""
    if type(input) is not Tensor or input.device.type not in backends.DEVICES or torch.compiler.is_compiling():
        return False
    # Whoever records what the dispatcher sees has to see it.
    return torch._C._len_torch_dispatch_stack() == 0 and torch._C._get_tracing_state() is None


def _forward(op: str, input: Tensor, *arguments) -> Tensor:
    if _serves_directly(input):
        # The dispatcher also resolves what is negated lazily, such as the imaginary part of a conjugate.
        lazy = input.is_neg() or any(isinstance(value, Tensor) and value.is_neg() for value in arguments[:3])
        if not lazy:
            return backends.serve(op, input.device.type)(input, *arguments)
    return getattr(torch.ops.csq, op).default(input, *arguments)


class _BitserialLinear(torch.autograd.Function):
    """The packed weight is constant; the quantization of the input passes gradients as if it were the identity."""

    @staticmethod
    def forward(ctx, input, planes, step, bias, coefficients, weight_shape, precision):
        ctx.save_for_backward(planes, step)
        ctx.constants = (coefficients, weight_shape)
        ctx.bias = None if bias is None else bias.dtype
        return _forward("bitserial_linear", input, planes, step, bias, coefficients, weight_shape, precision)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            planes, step = ctx.saved_tensors
            grad_input = grad @ bitserial_weight(planes, step, *ctx.constants).to(grad.dtype)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.sum_to_size(grad.shape[-1:]).to(ctx.bias)
        return grad_input, None, None, grad_bias, None, None, None


class _BitserialConv2d(torch.autograd.Function):
    """As ``_BitserialLinear``."""

    @staticmethod
    def forward(ctx, input, planes, step, bias, coefficients, weight_shape, *constants):
        ctx.save_for_backward(planes, step)
        ctx.constants = (coefficients, weight_shape, input.shape, constants[:-1])
        ctx.bias = None if bias is None else bias.dtype
        return _forward("bitserial_conv2d", input, planes, step, bias, coefficients, weight_shape, *constants)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        coefficients, weight_shape, input_shape, options = ctx.constants
        grad_input = grad_bias = None
        if ctx.needs_input_grad[0]:
            planes, step = ctx.saved_tensors
            weight = bitserial_weight(planes, step, coefficients, weight_shape).to(grad.dtype)
            grad_input = conv2d_input(input_shape, weight, grad, *options)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.sum((0, 2, 3)).to(ctx.bias)
        return grad_input, None, None, grad_bias, *[None] * 7


def _differentiable(input: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad))


def bitserial_linear(
    input: Tensor,
    planes: Tensor,
    step: Tensor,
    bias: Tensor | None = None,
    *,
    coefficients: Sequence[int],
    weight_shape: Sequence[int],
    precision: str = "exact",
) -> Tensor:
    """Product with a packed weight, ``y = x W^T + bias`` with ``W = step * sum_j k_j B_j``: equation (7) as stored.

    Its time and memory fall with the number of planes. Differentiable in the input and the bias, the weight is fixed.

    Args:
        input: ``(..., K)``, any floating dtype; the kernels compute from float32.
        planes: ``(k, ceil(N K / 8))`` uint8 as ``bitplanes.encode`` makes them, or in the order of ``backends.tile``.
        step: ``s / (2^n - 1)``, float32, ``()`` or ``(N,)``.
        bias: float32 ``(N,)``.
        coefficients: ``k_j``, most significant first.
        weight_shape: ``(N, K)``.
        precision: ``"exact"``, the error of a float32 product; ``"high"``, the input in 16 bits; ``"int8"``, in 8. The
            integers have a step for each 128 columns (64 where tables serve).

    Returns:
        ``(..., N)`` in the dtype of ``input``.

    Raises:
        ValueError, TypeError: a shape, size, device or dtype does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> from csq_kernels import bitplanes
        >>> planes, coefficients = bitplanes.encode(torch.tensor([[3, -1], [0, 2]]))
        >>> bitserial_linear(
        ...     torch.ones(1, 2), planes, torch.tensor(0.5), coefficients=coefficients, weight_shape=(2, 2)
        ... )
        tensor([[1., 1.]])
    """
    packed = (input, planes, step, bias, coefficients, weight_shape, precision)
    if _differentiable(input, bias):
        return _BitserialLinear.apply(*packed)
    return _forward("bitserial_linear", *packed)


def bitserial_conv2d(
    input: Tensor,
    planes: Tensor,
    step: Tensor,
    bias: Tensor | None = None,
    *,
    coefficients: Sequence[int],
    weight_shape: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    precision: str = "exact",
) -> Tensor:
    """Convolution with a packed weight; arguments as in ``bitserial_linear`` and ``torch.nn.functional.conv2d``.

    With ``"high"`` and ``"int8"`` the input has one step for each sample; with groups or
    fewer than 4 input channels every precision is exact.

    Args:
        input: ``(batch, C, H, W)``.
        weight_shape: ``(N, C / groups, kernel height, kernel width)``.

    Returns:
        ``(batch, N, H', W')`` in the dtype of ``input``.

    Raises:
        ValueError, TypeError: a shape, size, device or dtype does not fit; the message names the argument.

    Example:
        >>> import torch
        >>> from csq_kernels import bitplanes
        >>> planes, coefficients = bitplanes.encode(torch.ones(1, 1, 2, 2, dtype=torch.int32))
        >>> bitserial_conv2d(
        ...     torch.ones(1, 1, 3, 3), planes, torch.tensor(0.5), coefficients=coefficients, weight_shape=(1, 1, 2, 2)
        ... )
        tensor([[[[2., 2.],
                  [2., 2.]]]])
    """
    packed = (input, planes, step, bias, coefficients, weight_shape)
    constants = (stride, padding, dilation, groups, precision)
    if _differentiable(input, bias):
        return _BitserialConv2d.apply(*packed, *constants)
    return _forward("bitserial_conv2d", *packed, *constants)


def bitserial_weight(
    planes: Tensor, step: Tensor, coefficients: Sequence[int], weight_shape: Sequence[int], channel_axis: int = 0
) -> Tensor:
    """The float32 weight of equation (7) that packed planes hold, bit for bit; arguments as in ``bitserial_linear``.

    Example:
        >>> import torch
        >>> from csq_kernels import bitplanes
        >>> planes, coefficients = bitplanes.encode(torch.tensor([[3, -1], [0, 2]]))
        >>> bitserial_weight(planes, torch.tensor(0.5), coefficients, (2, 2)).tolist()
        [[1.5, -0.5], [0.0, 1.0]]
    """
    return _forward("bitserial_weight", planes, step, coefficients, weight_shape, channel_axis)
