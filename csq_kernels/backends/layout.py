"""How the kernels see tensors: a weight as ``[outer, channels, inner]``, small ones as float32 vectors."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# Names of the logit dtypes in the native module; it has no float64.
DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def as_vector(values: Tensor) -> Tensor:
    """The values as the kernels read them; the tensor itself when nothing needs to change."""
    return values.to(torch.float32).contiguous()


def channel_layout(
    weight_shape: Sequence[int], gate_logits: Tensor, scale: Tensor, channel_axis: int
) -> tuple[int, int, int]:
    """Return ``(outer, channels, inner)``; outer and channels are 1 when neither gates nor scale are per channel."""
    return weight_layout(weight_shape, gate_logits.ndim == 2 or scale.ndim == 1, channel_axis)


def weight_layout(weight_shape: Sequence[int], per_channel: bool, channel_axis: int) -> tuple[int, int, int]:
    """Return ``(outer, channels, inner)``; outer and channels are 1 when nothing is per channel."""
    if not per_channel:
        return 1, 1, math.prod(weight_shape)
    before, after = weight_shape[:channel_axis], weight_shape[channel_axis + 1 :]
    return math.prod(before), weight_shape[channel_axis], math.prod(after)
