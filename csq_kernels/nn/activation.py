"""Activation quantizers with a learnt range: LSQ-type (learnt step) and PACT-type (learnt clip).

The range is set from the first training batch and learnt from then on; at inference it never depends on the batch.
"""

import torch
from torch import Tensor, nn

KINDS = ("lsq", "pact")


def _round_ste(values: Tensor) -> Tensor:
    """``round`` with the gradient of the identity."""
    return values + (values.round() - values).detach()


def learnt_step_quantize(values: Tensor, step: Tensor, low: Tensor, high: Tensor, slope: Tensor | float) -> Tensor:
    """``step * round(clamp(values / step, low, high))``, with the gradient of the step scaled by ``slope``.

    The step's gradient is that of Esser et al. 2020; the value stays the learnt step to the last bit.
    """
    scaled = step * slope
    step = step.detach() + (scaled - scaled.detach())
    return _round_ste((values / step).clamp(low, high)) * step


class ActivationQuantizer(nn.Module):
    """``x -> step * round(clamp(x / step, low, high))`` with ``bits`` bits, unsigned where the first batch has no
    negative value.

    ``lsq`` learns the step (its gradient scaled by ``1 / sqrt(numel * high)``, Esser et al. 2020); ``pact`` learns the
    clip ``step * high`` from the clipped values alone (Choi et al. 2018). Until the first training batch the input
    passes unchanged.

    Args:
        bits: 2 to 8.
        kind: ``"lsq"`` or ``"pact"``.

    Example:
        >>> quantizer = ActivationQuantizer(4, "lsq")
        >>> quantizer(torch.linspace(0, 1, 8)).unique().numel() <= 16
        True
    """

    low: Tensor
    high: Tensor

    def __init__(self, bits: int, kind: str = "lsq", device=None):
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"expected act_bits from 2 to 8, got {bits}")
        if kind not in KINDS:
            raise ValueError(f"expected act_quantizer as one of {', '.join(KINDS)}, got {kind!r}")
        self.bits = bits
        self.kind = kind
        self.calibrated = False
        self.range = nn.Parameter(torch.ones((), device=device))
        self.register_buffer("low", torch.zeros((), device=device))
        self.register_buffer("high", torch.full((), 2.0**bits - 1, device=device))

    @torch.no_grad()
    def calibrate_(self, values: Tensor) -> None:
        """Set the range from ``values``: LSQ's ``2 mean|x| / sqrt(high)`` for the step, the maximum for PACT's clip."""
        values = values.float()
        if values.min() < 0:
            self.low.fill_(-(2.0 ** (self.bits - 1)))
            self.high.fill_(2.0 ** (self.bits - 1) - 1)
        start = values.abs().max() if self.kind == "pact" else 2 * values.abs().mean() / self.high.sqrt()
        self.range.copy_(torch.where(start > 0, start, torch.ones_like(start)))
        self.calibrated = True

    def forward(self, values: Tensor) -> Tensor:
        if not self.calibrated:
            if not self.training or values.numel() == 0:
                return values
            self.calibrate_(values)
        # A learnt range that crosses 0 would turn the quantizer over; its magnitude is what counts.
        learnt = self.range.abs() + torch.finfo(self.range.dtype).tiny
        if self.kind == "lsq":
            slope = 1 / torch.sqrt(values.numel() * self.high)
            return learnt_step_quantize(values, learnt, self.low, self.high, slope).to(values.dtype)
        step = learnt / self.high
        clipped = torch.minimum(torch.maximum(values, self.low * step), learnt)
        step = step.detach()
        return (_round_ste(clipped / step) * step).to(values.dtype)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.calibrated])

    def set_extra_state(self, state: Tensor) -> None:
        self.calibrated = bool(state[0])

    def extra_repr(self) -> str:
        return f"bits={self.bits}, kind={self.kind!r}"
