"""What became of each layer: bits, bytes, the gap between soft and hard, and warnings about numbers that went wrong."""

import math
from collections.abc import Collection
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from csq_kernels import table
from csq_kernels.budget import Budget, Budgets, active_sets, costs, stored_bits, weight_bytes
from csq_kernels.nn.layer import CSQLayer
from csq_kernels.nn.prepare import csq_layers
from csq_kernels.packed import rest_bytes
from csq_kernels.workload import Workload

# beta * logit beyond which sig() is exactly 1 in float32 and the gradient exactly 0.
_FROZEN = 17.0


@dataclass
class LayerReport:
    """One layer: what it uses (paper bits, ``active``), what it stores, and how far soft and hard weights are apart.

    ``gap`` is ``|W_soft - W_hard| / |W_hard|`` (Frobenius); ``undecided`` the share of its active bits with ``sig``
    between 0.01 and 0.99.
    """

    name: str
    shape: tuple[int, ...]
    paper_bits: int
    stored_bits: int
    active: tuple[int, ...]
    bytes: int
    float_bytes: int
    gap: float
    undecided: float


@dataclass(frozen=True)
class BudgetReport:
    """One budget, what is used of it in its unit, and whether it holds."""

    budget: Budget
    cost: float
    met: bool

    def to_dict(self) -> dict:
        """Everything, ready for JSON."""
        return {"budget": str(self.budget), "cost": self.cost, "met": self.met}

    def __str__(self) -> str:
        verdict = "met" if self.met else "NOT met"
        return f"budget {self.budget}: used {self.cost:.4g} ({self.cost / self.budget.value:.1%}), {verdict}"


@dataclass
class Report:
    """The scheme of a model, layer by layer, and against its budgets. ``print(report)`` shows the table."""

    layers: list[LayerReport]
    rest_bytes: int
    budgets: list[BudgetReport] = field(default_factory=list)

    @property
    def budget(self) -> Budget | None:
        """The first budget, ``None`` if there is none."""
        return self.budgets[0].budget if self.budgets else None

    @property
    def cost(self) -> float | None:
        """What is used of the first budget, in its unit."""
        return self.budgets[0].cost if self.budgets else None

    @property
    def budget_met(self) -> bool | None:
        """Whether all budgets hold."""
        return all(budget.met for budget in self.budgets) if self.budgets else None

    def _average(self, attribute: str) -> float:
        weights = [math.prod(layer.shape) for layer in self.layers]
        return sum(getattr(row, attribute) * w for row, w in zip(self.layers, weights, strict=True)) / sum(weights)

    @property
    def paper_bits(self) -> float:
        """Active bits a weight, averaged over the weights."""
        return self._average("paper_bits")

    @property
    def stored_bits(self) -> float:
        """Stored planes a weight, averaged over the weights."""
        return self._average("stored_bits")

    @property
    def bytes(self) -> int:
        """The packed file: planes, scales, and ``rest_bytes``, which are what stays float and the header."""
        return sum(layer.bytes for layer in self.layers) + self.rest_bytes

    @property
    def float_bytes(self) -> int:
        """The same model with float32 weights."""
        return sum(layer.float_bytes for layer in self.layers) + self.rest_bytes

    @property
    def gap(self) -> float:
        """Largest gap of a layer."""
        return max(layer.gap for layer in self.layers)

    def to_dict(self) -> dict:
        """Everything, ready for JSON."""
        names = ("paper_bits", "stored_bits", "bytes", "float_bytes", "rest_bytes", "gap", "cost", "budget_met")
        totals = {name: getattr(self, name) for name in names}
        budgets = {"budget": str(self.budget or ""), "budgets": [budget.to_dict() for budget in self.budgets]}
        return totals | budgets | {"layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        rows = [("layer", "shape", "paper", "stored", "active", "bytes", "float", "ratio", "gap", "undecided")]
        for row in self.layers:
            shape = "x".join(map(str, row.shape))
            active = ",".join(map(str, row.active)) or "removed"
            ratio = f"{row.float_bytes / row.bytes:.1f}x" if row.bytes else "-"
            rows.append(
                (row.name, shape, str(row.paper_bits), str(row.stored_bits), active, f"{row.bytes:,}")
                + (f"{row.float_bytes:,}", ratio, f"{row.gap:.1e}", f"{row.undecided:.2%}")
            )
        ratio = f"{self.float_bytes / self.bytes:.1f}x"
        rows.append(
            ("model", "", f"{self.paper_bits:.2f}", f"{self.stored_bits:.2f}", "", f"{self.bytes:,}")
            + (f"{self.float_bytes:,}", ratio, f"{self.gap:.1e}", "")
        )
        return "\n".join([*table.lines(rows), *map(str, self.budgets)])


@torch.no_grad()
def report(model: nn.Module, budget: Budgets | None = None, workload: Workload | None = None) -> Report:
    """Describe the scheme of a model at any stage; gates and bits count as they would be hard.

    Args:
        model: a prepared model.
        budget: as for ``Search``, one or several.
        workload: as for ``Search``.

    Raises:
        ValueError: the model has no CSQ layer, or a budget cannot be read or needs a ``workload``.

    Example:
        >>> from csq_kernels import prepare_
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> _ = prepare_(model)
        >>> for budget in report(model, ["9 bits", "0.001 MB"]).budgets:
        ...     print(budget)
        budget 9 stored bits: used 9 (100.0%), met
        budget 0.001 MB: used 0.000497 (49.7%), met
    """
    layers = csq_layers(model)
    if not layers:
        raise ValueError("expected model with CSQ layers, got none; call prepare_ first")
    rows = []
    for name, layer in layers.items():
        active = layer.active_bits()
        hard, soft = layer.hard_weight().float(), layer.weight.float()
        difference, size = (soft - hard).norm().item(), hard.norm().item()
        shape = tuple(layer.bit_logits.shape[2:])
        weights = math.prod(shape)
        rows.append(
            LayerReport(
                name=name,
                shape=shape,
                paper_bits=len(active),
                stored_bits=stored_bits(active),
                active=active,
                bytes=weight_bytes(active, weights, layer.scale.numel()),
                float_bytes=4 * weights,
                gap=difference / size if size else difference,
                undecided=_share_within(layer, math.log(99), active),
            )
        )
    scheme = active_sets(layers)
    asked = [] if budget is None else costs(model, budget, workload)
    used = [BudgetReport(cost.budget, cost.of(scheme), cost.is_met(scheme)) for cost in asked]
    return Report(rows, rest_bytes(model), used)


def _share_within(layer: CSQLayer, limit: float, active: Collection[int]) -> float:
    """Share of the logits of the active planes with ``|beta * logit| < limit``."""
    planes = [plane for plane, bit in enumerate(layer.bits) if bit in active]
    if layer.stage == "hard" or not planes:
        return 0.0
    inside = (layer.temperature * layer.bit_logits.detach()[:, planes]).abs() < limit
    return inside.float().mean().item()


def health(model: nn.Module) -> list[str]:
    """Warnings, each with the layer's name: values that are not finite, closed or saturated gates, frozen logits."""
    warnings = []
    for name, layer in csq_layers(model).items():
        for attribute in ("bit_logits", "gate_logits", "scale", "temperature"):
            if not bool(torch.isfinite(getattr(layer, attribute)).all()):
                warnings.append(f"{name}: {attribute} is not finite")
        if layer.stage == "hard":
            continue
        if not layer.active_bits():
            warnings.append(f"{name}: every gate is below the threshold, as hard its weight would be 0")
        frozen = 1 - _share_within(layer, _FROZEN, layer.bits)
        if layer.bit_logits.numel() and frozen > 0.999:
            warnings.append(f"{name}: {frozen:.1%} of the bit logits are frozen, it no longer learns")
        if layer.stage == "search" and layer.gate_logits.numel():
            closed = (layer.temperature * layer.gate_logits.detach()).abs() > _FROZEN
            if bool(closed.all()):
                warnings.append(f"{name}: every gate is saturated, its precision no longer moves")
    return warnings
