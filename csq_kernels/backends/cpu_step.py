"""The single-pass step on the processor: tensors in, addresses and sizes to the native module."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from csq_kernels import _native, reference_step
from csq_kernels.backends.layout import DTYPES, as_vector, channel_layout
from csq_kernels.step import StepLayer

if _native.module is None:
    raise ImportError(_native.reason)
_C = _native.module


def _native_layer(layer: StepLayer, weight: Tensor, grad_weight: Tensor):
    """The layer as the native module sees it; the tensors have to outlive it."""
    gate_logits, scale, _ = layer.after
    outer, channels, inner = channel_layout(layer.weight.shape, gate_logits, scale, layer.channel_axis)
    return _C.StepLayer(
        bit_logits=layer.bit_logits.data_ptr(),
        before=[vector.data_ptr() for vector in layer.before],
        after=[vector.data_ptr() for vector in layer.after],
        grad_weight=grad_weight.data_ptr(),
        weight=weight.data_ptr(),
        weight_dtype=DTYPES[weight.dtype],
        momenta=[momentum.data_ptr() for momentum in layer.momenta],
        momentum_scales=[scales.data_ptr() for scales in layer.momentum_scales],
        rule=_C.StepRule(**dataclasses.asdict(layer.rule)),
        key=layer.key,
        outer=outer,
        channels=channels,
        inner=inner,
        bits=layer.bits,
        n_bits=layer.n_bits,
        dtype=DTYPES[layer.bit_logits.dtype],
        gates_per_channel=gate_logits.ndim == 2,
        scale_per_channel=scale.ndim == 1,
        hard_gates=layer.hard_gates,
    )


def _serves(layer: StepLayer) -> bool:
    return layer.bit_logits.dtype != torch.float64 and layer.weight.numel() > 0


def _as_float32(layer: StepLayer) -> StepLayer:
    """The same layer with vectors as the kernels read them."""
    before, after = (type(v)(*map(as_vector, v)) for v in (layer.before, layer.after))
    return dataclasses.replace(layer, before=before, after=after)


def step_sums(layer: StepLayer) -> tuple[Tensor, Tensor]:
    """Gradients (5) of the gates and (6) of the scale, each in its own dtype.

    Fixed gates need the weight alone: (6) is then ``sum(D W) / s``.
    """
    if not _serves(layer):
        return reference_step.step_sums(layer)
    read = _as_float32(layer)
    gate_logits, scale, _ = read.before
    layout = channel_layout(layer.weight.shape, gate_logits, scale, layer.channel_axis)
    grad = layer.grad_weight.contiguous()
    weight = layer.weight.contiguous()
    native = _native_layer(read, weight, grad)
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
        if not _serves(layer):
            reference_step.step_update([layer])
            continue
        read = _as_float32(layer)
        # The kernels write in order; a weight that lies otherwise in memory is copied.
        weight = layer.weight if layer.weight.is_contiguous() else layer.weight.contiguous()
        grad = layer.grad_weight.contiguous()
        held.append((read, weight, grad, layer.weight, _native_layer(read, weight, grad)))
    if held:
        _C.step_update([entry[-1] for entry in held], torch.get_num_threads())
    for _, weight, _, target, _ in held:
        if weight is not target:
            target.copy_(weight)
