"""The single-pass step on CUDA devices: tensors in, addresses, sizes and a stream to the native module."""

from collections import defaultdict
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
    of_weight = layer.hard_gates and layer.weight.dtype == torch.float32
    weight = layer.weight.contiguous()
    grad = layer.grad_weight.contiguous()
    if weight.dtype not in (torch.float32, layer.bit_logits.dtype):
        weight, grad = weight.float(), grad.float()
    with torch.cuda.device(layer.bit_logits.device):
        native = native_layer(read, weight, grad)
        grad_gates, grad_scale = torch.zeros_like(gate_logits), torch.empty_like(scale)
        planes = 1 if of_weight else len(layer.bits)
        scratch = scale.new_empty(_C.cuda_reconstruct_scratch_size(*layout, planes), dtype=torch.float64)
        stream = torch.cuda.current_stream().cuda_stream
        if of_weight:
            _C.cuda_step_scale_sums(native, grad_scale.data_ptr(), scratch.data_ptr(), stream)
        else:
            _C.cuda_step_sums(native, grad_gates.data_ptr(), grad_scale.data_ptr(), scratch.data_ptr(), stream)
    return grad_gates.to(layer.before.gate_logits.dtype), grad_scale.to(layer.before.scale.dtype)


def step_update(layers: Sequence[StepLayer]) -> None:
    """New logits, momenta and weights of all layers, in place; layers of a device share their launches."""
    by_device = defaultdict(list)
    for layer in layers:
        if layer.suits_kernels():
            by_device[layer.bit_logits.device].append(layer)
        else:
            reference_step.step_update([layer])
    for device, own in by_device.items():
        with torch.cuda.device(device):
            _update(own)


def _update(layers: Sequence[StepLayer]) -> None:
    read = [with_float32_vectors(layer) for layer in layers]
    # The kernels write in order; a weight that lies otherwise in memory is copied.
    weights = [layer.weight if layer.weight.is_contiguous() else layer.weight.contiguous() for layer in layers]
    grads = [layer.grad_weight.contiguous() for layer in layers]
    native = [native_layer(*arrays) for arrays in zip(read, weights, grads, strict=True)]
    scratch = weights[0].new_empty(_C.cuda_step_scratch_size(native), dtype=torch.float32)
    _C.cuda_step_update(native, scratch.data_ptr(), torch.cuda.current_stream().cuda_stream)
    for layer, weight in zip(layers, weights, strict=True):
        if weight is not layer.weight:
            layer.weight.copy_(weight)
