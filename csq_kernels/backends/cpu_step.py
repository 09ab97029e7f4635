"""The single-pass step on the processor: tensors in, addresses and sizes to the native module."""

from collections.abc import Sequence

import torch
from torch import Tensor

from csq_kernels import _native, reference_step
from csq_kernels.backends.layout import channel_layout
from csq_kernels.backends.native_step import native_layer, with_float32_vectors
from csq_kernels.step import StepLayer

if _native.module is None:
    raise ImportError(_native.reason)
_C = _native.module


def step_sums(layer: StepLayer) -> tuple[Tensor, Tensor]:
    """Gradients (5) of the gates and (6) of the scale, each in its own dtype.

    Fixed gates need the weight alone: (6) is then ``sum(D W) / s``.
    """
    if not layer.suits_kernels():
        return reference_step.step_sums(layer)
    read = with_float32_vectors(layer)
    gate_logits, scale, _ = read.before
    layout = channel_layout(layer.weight.shape, gate_logits, scale, layer.channel_axis)
    grad = layer.grad_weight.contiguous()
    weight = layer.weight.contiguous()
    if weight.dtype not in (torch.float32, layer.bit_logits.dtype):
        weight, grad = weight.float(), grad.float()
    native = native_layer(read, weight, grad)
    grad_gates, grad_scale = torch.zeros_like(gate_logits), torch.empty_like(scale)
    threads = torch.get_num_threads()
    if layer.hard_gates and weight.dtype == torch.float32 and bool((scale != 0).all()):
        scratch = torch.empty(_C.step_scratch_size(*layout), dtype=torch.float64)
        _C.step_scale_sums(native, grad_scale.data_ptr(), scratch.data_ptr(), threads)
    else:
        scratch = torch.empty(_C.reconstruct_scratch_size(*layout, len(layer.bits)), dtype=torch.float64)
        _C.step_sums(native, grad_gates.data_ptr(), grad_scale.data_ptr(), scratch.data_ptr(), threads)
    return grad_gates.to(layer.before.gate_logits.dtype), grad_scale.to(layer.before.scale.dtype)


def step_update(layers: Sequence[StepLayer]) -> None:
    """New logits, momenta and weights of all layers, in place."""
    held = []
    for layer in layers:
        if not layer.suits_kernels():
            reference_step.step_update([layer])
            continue
        read = with_float32_vectors(layer)
        # The kernels write in order; a weight that lies otherwise in memory is copied.
        weight = layer.weight if layer.weight.is_contiguous() else layer.weight.contiguous()
        grad = layer.grad_weight.contiguous()
        held.append((read, weight, grad, layer.weight, native_layer(read, weight, grad)))
    if held:
        _C.step_update([entry[-1] for entry in held], torch.get_num_threads())
    for _, weight, _, target, _ in held:
        if weight is not target:
            target.copy_(weight)
