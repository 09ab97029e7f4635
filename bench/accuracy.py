"""How far a result is from float64, and how far it may be."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


class Norms:
    """The largest value and the root mean square of a tensor that comes in blocks."""

    def __init__(self) -> None:
        self.largest, self.squares, self.count = 0.0, 0.0, 0

    def add(self, values: Tensor) -> "Norms":
        self.largest = max(self.largest, values.abs().max().item())
        self.squares += values.square().sum().item()  # keeps a NaN, which no comparison below lets through
        self.count += values.numel()
        return self

    def __call__(self) -> tuple[float, float]:
        return self.largest, math.sqrt(self.squares / self.count)


@dataclass(frozen=True)
class Verdict:
    """The error of an entry in units of what the rule allows it, where it is worst; above 1 it is wrong."""

    error: float
    where: str

    def worse(self, other: "Verdict | None") -> bool:
        """Whether this one is to be reported rather than the other."""
        return other is None or math.isnan(self.error) or self.error > other.error


def twice(
    name: str,
    errors: Norms,
    baseline_errors: Norms,
    exact: Norms,
    dtype: torch.dtype = torch.float32,
    roundings: int = 1,
) -> Verdict:
    """Twice the error of the baseline and of ``roundings`` to ``dtype`` is allowed: largest and root mean square."""
    worst: Verdict | None = None
    norms = zip(("largest", "root mean square"), errors(), baseline_errors(), exact(), strict=True)
    for norm, error, baseline_error, size in norms:
        allowed = 2 * (baseline_error + roundings * size * torch.finfo(dtype).eps / 2)
        verdict = Verdict(error / allowed, f"{norm} error of {name} {error:.2e}, allowed {allowed:.2e}")
        if verdict.worse(worst):
            worst = verdict
    assert worst is not None
    return worst
