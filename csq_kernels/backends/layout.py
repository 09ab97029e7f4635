"""How every backend sees a weight: ``[outer, channels, inner]``."""

import math
from collections.abc import Sequence

from torch import Tensor


def channel_layout(
    weight_shape: Sequence[int], gate_logits: Tensor, scale: Tensor, channel_axis: int
) -> tuple[int, int, int]:
    """Return ``(outer, channels, inner)``; outer and channels are 1 when neither gates nor scale are per channel."""
    if gate_logits.ndim != 2 and scale.ndim != 1:
        return 1, 1, math.prod(weight_shape)
    before, after = weight_shape[:channel_axis], weight_shape[channel_axis + 1 :]
    return math.prod(before), weight_shape[channel_axis], math.prod(after)
