"""A layer of the single-pass step as the native module sees it, on any device."""

import dataclasses
from typing import Any

from torch import Tensor

from csq_kernels import _native
from csq_kernels.backends.layout import DTYPES, as_vector, channel_layout
from csq_kernels.step import StepLayer

if _native.module is None:
    raise ImportError(_native.reason)
_C = _native.module


def native_layer(layer: StepLayer, weight: Tensor, grad_weight: Tensor) -> Any:
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
        rule=_C.StepRule(**vars(layer.rule)),
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


def with_float32_vectors(layer: StepLayer) -> StepLayer:
    """The same layer with vectors as the kernels read them."""
    before, after = (type(v)(*map(as_vector, v)) for v in (layer.before, layer.after))
    return dataclasses.replace(layer, before=before, after=after)
