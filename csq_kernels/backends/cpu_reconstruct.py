"""The ops on the processor: tensors in, addresses and sizes to the native module. The caller has checked arguments."""

from collections.abc import Sequence

import torch
from torch import Tensor

from csq_kernels import _native, reference
from csq_kernels.backends.layout import DTYPES, as_vector, channel_layout
from csq_kernels.backends.memory import new_empty

if _native.module is None:
    raise ImportError(_native.reason)
_C = _native.module


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
    """Equation (3); arguments and result as in ``reference.reconstruct``."""
    if bit_logits.dtype not in DTYPES:
        return reference.reconstruct(
            bit_logits, gate_logits, scale, temperature, bits, n_bits, channel_axis, hard_gates
        )
    weight_shape = bit_logits.shape[2:]
    weight = new_empty(bit_logits, weight_shape)
    if weight.numel() == 0:
        return weight
    logits = bit_logits.contiguous()
    gate_values, scale_values, beta = as_vector(gate_logits), as_vector(scale), as_vector(temperature)
    _C.reconstruct_forward(
        logits.data_ptr(),
        gate_values.data_ptr(),
        scale_values.data_ptr(),
        beta.data_ptr(),
        weight.data_ptr(),
        *channel_layout(weight_shape, gate_logits, scale, channel_axis),
        bits,
        n_bits,
        DTYPES[bit_logits.dtype],
        gate_logits.ndim == 2,
        scale.ndim == 1,
        hard_gates,
        torch.get_num_threads(),
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
    """Equations (4), (5), (6); arguments and results as in ``reference.reconstruct_backward``."""
    if bit_logits.dtype not in DTYPES:
        return reference.reconstruct_backward(
            grad_weight, bit_logits, gate_logits, scale, temperature, bits, n_bits, channel_axis, hard_gates
        )
    grad_bits = new_empty(bit_logits, bit_logits.shape)
    grad_gates = gate_logits.new_empty(gate_logits.shape, dtype=torch.float32)
    grad_scale = scale.new_empty(scale.shape, dtype=torch.float32)
    if grad_weight.numel() == 0:
        return grad_bits, grad_gates.zero_().to(gate_logits.dtype), grad_scale.zero_().to(scale.dtype)
    grad = grad_weight.to(bit_logits.dtype).contiguous()
    logits = bit_logits.contiguous()
    gate_values, scale_values, beta = as_vector(gate_logits), as_vector(scale), as_vector(temperature)
    layout = channel_layout(grad_weight.shape, gate_logits, scale, channel_axis)
    scratch = torch.empty(_C.reconstruct_scratch_size(*layout, len(bits)), dtype=torch.float64)
    _C.reconstruct_backward(
        grad.data_ptr(),
        logits.data_ptr(),
        gate_values.data_ptr(),
        scale_values.data_ptr(),
        beta.data_ptr(),
        grad_bits.data_ptr(),
        grad_gates.data_ptr(),
        grad_scale.data_ptr(),
        scratch.data_ptr(),
        *layout,
        bits,
        n_bits,
        DTYPES[bit_logits.dtype],
        gate_logits.ndim == 2,
        scale.ndim == 1,
        hard_gates,
        torch.get_num_threads(),
    )
    return grad_bits, grad_gates.to(gate_logits.dtype), grad_scale.to(scale.dtype)
