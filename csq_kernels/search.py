"""The search for a precision per layer: budget, temperature, controller, exact repair; and the hard end of it.

One ``Search`` runs two stages over ``total_steps``. In the *search* stage gates and bits are soft, the temperature
rises (9), and the budget term (8) steers the cost to the budget. At its end the scheme is repaired so that the budget
is met exactly; in the *finetune* stage the scheme is fixed and the temperature is rewound and rises again, so that the
bits decide. ``finalize_`` makes the integers.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn, optim

from csq_kernels.nn.cost import runs, stored_bits, weight_bytes
from csq_kernels.nn.encode import digit_amplitude
from csq_kernels.nn.layer import CSQLayer
from csq_kernels.nn.prepare import csq_layers, followers

SCHEDULES = ("exponential", "linear", "cosine")
# beta * logit beyond which sig() is exactly 1 in float32 and the gradient exactly 0.
_FROZEN = 17.0
ActiveSets = dict[str, frozenset[int]]


@dataclass(frozen=True)
class Budget:
    """A limit on the size of a model: ``"3.0 bits"`` a weight as stored, ``"3.0 paper bits"`` a weight, or ``"1.2 MB"``
    of file.

    Bits are averages over the weights of the CSQ layers; the scales, 4 bytes each, are not part of them. Megabytes
    (10^6 bytes) count the planes and scales of the CSQ layers and everything of the model that stays float.

    Example:
        >>> Budget.parse("2.5 paper bits")
        Budget(value=2.5, unit='paper bits')
    """

    value: float
    unit: str

    @classmethod
    def parse(cls, text: "str | Budget") -> "Budget":
        """Read a budget; ``ValueError`` if the text is not one."""
        if isinstance(text, Budget):
            return text
        match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*(bits|stored bits|paper bits|MB)\s*", str(text))
        if match is None or float(match[1]) <= 0:
            raise ValueError(f"expected budget as '3.0 bits', '3.0 paper bits' or '1.2 MB', got {text!r}")
        return cls(float(match[1]), "stored bits" if match[2] == "bits" else match[2])

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit}"


class Cost:
    """Cost of a set of active bits per layer, in the unit of a budget; exact for sets, differentiable for gates."""

    def __init__(self, model: nn.Module, budget: Budget):
        self.budget = budget
        self.layers = csq_layers(model)
        if not self.layers:
            raise ValueError("expected model with CSQ layers, got none; call prepare_ first")
        self.weights = {name: _numel(layer) for name, layer in self.layers.items()}
        self.total_weights = sum(self.weights.values())
        self.float_bytes = _float_bytes(model) if budget.unit == "MB" else 0

    def of_layer(self, name: str, active: Collection[int]) -> float:
        """Share of one layer in the cost."""
        weights = self.weights[name]
        if self.budget.unit == "MB":
            return weight_bytes(active, weights, self.layers[name].scale.numel()) / 1e6
        bits = len(active) if self.budget.unit == "paper bits" else stored_bits(active)
        return bits * weights / self.total_weights

    def of(self, active: Mapping[str, Collection[int]]) -> float:
        """Cost of the whole model."""
        return self.float_bytes / 1e6 + sum(self.of_layer(name, bits) for name, bits in active.items())

    def soft(self, shift: Tensor | float = 0.0) -> Tensor:
        """Cost with soft gates: a bit counts ``G_b``, and the end of a run ``G_b (1 - G_{b+1})`` once more where planes
        are stored.

        ``shift`` is added to every gate logit.
        """
        gates = [_mean_gates(layer, shift) for layer in self.layers.values()]
        gate = nn.utils.rnn.pad_sequence(gates, batch_first=True)  # [layers, planes]
        bits = gate.sum(1)
        if self.budget.unit != "paper bits":
            above = nn.functional.pad(gate, (0, 1))[:, 1:]
            bits = bits + (gate * (1 - above)).sum(1)
        weights = torch.tensor(list(self.weights.values()), dtype=bits.dtype).to(bits.device)
        if self.budget.unit == "MB":
            scales = sum(4 * layer.scale.numel() for layer in self.layers.values())
            return (self.float_bytes + scales + (weights * bits).sum() / 8) / 1e6
        return (weights * bits).sum() / self.total_weights


def _numel(layer: CSQLayer) -> int:
    return math.prod(layer.bit_logits.shape[2:])


def _mean_gates(layer: CSQLayer, shift: Tensor | float) -> Tensor:
    gate = torch.sigmoid(layer.temperature * (layer.gate_logits + shift))
    return gate if gate.ndim == 1 else gate.mean(1)


def _float_bytes(model: nn.Module) -> int:
    """Bytes of the parameters and buffers that are saved as they are."""
    tensors: dict[int, Tensor] = {}
    for module in model.modules():
        csq = isinstance(module, CSQLayer)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or name in module._non_persistent_buffers_set:
                continue
            if csq and name in ("bit_logits", "gate_logits", "scale", "temperature", "codes"):
                continue
            tensors[id(tensor)] = tensor
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def active_sets(layers: Mapping[str, CSQLayer]) -> ActiveSets:
    """Exponents in use per layer."""
    return {name: frozenset(layer.active_bits()) for name, layer in layers.items()}


def gate_scores(layers: Mapping[str, CSQLayer]) -> dict[str, dict[int, float]]:
    """Gate logit per layer and bit, the mean over channels: how much the search wants the bit."""
    scores = {}
    for name, layer in layers.items():
        logits = layer.gate_logits.detach().float()
        logits = logits if logits.ndim == 1 else logits.mean(1)
        scores[name] = dict(zip(layer.bits, logits.tolist(), strict=True))
    return scores


def repair(active: ActiveSets, scores: dict[str, dict[int, float]], cost: Cost) -> ActiveSets:
    """Change as few, and as unwanted, bits as needed for the budget to be met, then spend what is left of it.

    Closes the bit with the lowest score per cost saved until the budget holds, then opens the bit with the highest
    score that still fits, and never goes below a layer's ``min_bits``.

    Raises:
        ValueError: the budget is below what ``min_bits`` needs.
    """
    active = {name: frozenset(bits) for name, bits in active.items()}
    minimum = {name: layer.min_bits for name, layer in cost.layers.items()}
    for name, bits in active.items():
        while len(bits) < minimum[name]:
            bits |= {max(scores[name].keys() - bits, key=lambda bit: scores[name][bit])}
        active[name] = bits
    spread = max((abs(score) for by_bit in scores.values() for score in by_bit.values()), default=0.0) + 1.0

    while cost.of(active) > cost.budget.value:
        best: tuple[float, str, frozenset[int]] | None = None
        for name, bits in active.items():
            for fewer in _reductions(bits, minimum[name]):
                saved = cost.of_layer(name, bits) - cost.of_layer(name, fewer)
                if saved <= 0:
                    continue
                lost = sum(scores[name][bit] + spread for bit in bits - fewer)
                if best is None or lost / saved < best[0]:
                    best = (lost / saved, name, fewer)
        if best is None:
            least = cost.of(active)
            raise ValueError(
                f"expected budget of at least {least:.4g} {cost.budget.unit} for this model, got {cost.budget}"
            )
        active[best[1]] = best[2]

    while True:
        candidates = [
            (scores[name][bit], name, bit)
            for name, bits in active.items()
            for bit in scores[name].keys() - bits
            if cost.of({**active, name: bits | {bit}}) <= cost.budget.value
        ]
        if not candidates:
            return active
        _, name, bit = max(candidates)
        active[name] |= {bit}


def _reductions(bits: frozenset[int], minimum: int) -> Iterable[frozenset[int]]:
    """Smaller sets to consider: one bit less, or a whole run less, where the minimum allows."""
    for bit in bits:
        if len(bits) > minimum:
            yield bits - {bit}
    if runs(bits) > 1:
        for top in sorted(bit for bit in bits if bit + 1 not in bits):
            run = frozenset(bit for bit in bits if bit <= top and all(b in bits for b in range(bit, top + 1)))
            if len(bits - run) >= minimum:
                yield bits - run


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


@dataclass
class Report:
    """The scheme of a model, layer by layer, and against a budget. ``print(report)`` shows the table."""

    layers: list[LayerReport]
    rest_bytes: int
    budget: Budget | None = None
    cost: float | None = None

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
        """Planes, scales and everything that stays float."""
        return sum(layer.bytes for layer in self.layers) + self.rest_bytes

    @property
    def float_bytes(self) -> int:
        """The same model with float32 weights."""
        return sum(layer.float_bytes for layer in self.layers) + self.rest_bytes

    @property
    def gap(self) -> float:
        """Largest gap of a layer."""
        return max(layer.gap for layer in self.layers)

    @property
    def budget_met(self) -> bool | None:
        """Whether the cost is within the budget; ``None`` without one."""
        return None if self.budget is None or self.cost is None else self.cost <= self.budget.value

    def to_dict(self) -> dict:
        """Everything, ready for JSON."""
        names = ("paper_bits", "stored_bits", "bytes", "float_bytes", "rest_bytes", "gap", "cost", "budget_met")
        totals = {name: getattr(self, name) for name in names}
        return totals | {"budget": str(self.budget or ""), "layers": [asdict(layer) for layer in self.layers]}

    def __str__(self) -> str:
        header = ("layer", "shape", "paper", "stored", "active", "bytes", "float", "ratio", "gap", "undecided")
        rows = [header]
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
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if self.budget is not None and self.cost is not None:
            verdict = "met" if self.budget_met else "NOT met"
            lines.append(f"budget {self.budget}: used {self.cost:.4g} ({self.cost / self.budget.value:.1%}), {verdict}")
        return "\n".join(lines)


@torch.no_grad()
def report(model: nn.Module, budget: str | Budget | None = None) -> Report:
    """Describe the scheme of a model at any stage; gates and bits count as they would be hard.

    Raises:
        ValueError: the model has no CSQ layer, or the budget cannot be read.
    """
    parsed = None if budget is None else Budget.parse(budget)
    cost = Cost(model, parsed or Budget(1.0, "stored bits"))
    rows = []
    for name, layer in cost.layers.items():
        active = layer.active_bits()
        hard, soft = layer.hard_weight().float(), layer.weight.float()
        difference, size = (soft - hard).norm().item(), hard.norm().item()
        shape, weights = tuple(layer.bit_logits.shape[2:]), cost.weights[name]
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
    total = None if parsed is None else cost.of(active_sets(cost.layers))
    return Report(rows, _float_bytes(model), parsed, total)


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
            warnings.append(f"{name}: every gate is closed, its weight is 0")
        frozen = 1 - _share_within(layer, _FROZEN, layer.bits)
        if layer.bit_logits.numel() and frozen > 0.999:
            warnings.append(f"{name}: {frozen:.1%} of the bit logits are frozen, it no longer learns")
        if layer.stage == "search" and layer.gate_logits.numel():
            closed = (layer.temperature * layer.gate_logits.detach()).abs() > _FROZEN
            if bool(closed.all()):
                warnings.append(f"{name}: every gate is saturated, its precision no longer moves")
    return warnings


class Search:
    """Temperature, budget and stages of a model that ``prepare_`` has prepared.

    Each step: add ``penalty()`` to the loss, step the optimizer, then call ``step()``. After ``total_steps`` the scheme
    meets the budget and the bits are decided; ``finalize_`` makes them integers.

    Args:
        model: a prepared model.
        budget: ``"3.0 bits"`` (stored), ``"3.0 paper bits"`` or ``"1.2 MB"``.
        total_steps: optimizer steps of both stages.
        optimizer: when given, pruned planes are freed at the end of the search and the optimizer forgets their state.
            Leave it out under DDP, whose buckets cannot change; then pruned planes stay, unread.
        search_share: share of the steps spent searching.
        strength: lambda of (8).
        search_temperature: last temperature of the search stage.
        final_temperature: last temperature of the finetune stage, ``beta_max`` of (9).
        schedule: ``"exponential"`` (9), ``"linear"`` or ``"cosine"`` (in the logarithm of the temperature).

    Raises:
        ValueError: an argument is out of range, or the budget cannot be reached with the layers' ``min_bits``.

    Example:
        >>> from csq_kernels import prepare_
        >>> model = nn.Sequential(nn.Linear(4, 2))
        >>> _ = prepare_(model)
        >>> search = Search(model, budget="3 bits", total_steps=10)
        >>> optimizer = optim.SGD(model.parameters(), lr=0.1)
        >>> for _ in range(10):
        ...     loss = model(torch.ones(1, 4)).square().sum() + search.penalty()
        ...     optimizer.zero_grad(); loss.backward(); optimizer.step(); search.step()
        >>> report(model, "3 bits").budget_met
        True
    """

    def __init__(
        self,
        model: nn.Module,
        budget: str | Budget,
        total_steps: int,
        *,
        optimizer: optim.Optimizer | None = None,
        search_share: float = 0.5,
        strength: float = 0.1,
        search_temperature: float = 30.0,
        final_temperature: float = 2000.0,
        schedule: str = "exponential",
    ):
        if total_steps < 2:
            raise ValueError(f"expected total_steps of at least 2, got {total_steps}")
        if not 0 < search_share < 1:
            raise ValueError(f"expected search_share between 0 and 1, got {search_share}")
        for name, value in (("search_temperature", search_temperature), ("final_temperature", final_temperature)):
            if not 1 <= value < math.inf:
                raise ValueError(f"expected {name} of at least 1 and finite, got {value}")
        if not 0 <= strength < math.inf:
            raise ValueError(f"expected strength of at least 0 and finite, got {strength}")
        if schedule not in SCHEDULES:
            raise ValueError(f"expected schedule as one of {', '.join(SCHEDULES)}, got {schedule!r}")
        self.model = model
        self.budget = Budget.parse(budget)
        self.total_steps = total_steps
        self.search_steps = min(max(round(total_steps * search_share), 1), total_steps - 1)
        self.optimizer = optimizer
        self.strength = strength
        self.search_temperature = search_temperature
        self.final_temperature = final_temperature
        self.schedule = schedule
        self.steps_done = 0
        self.cost = Cost(model, self.budget)
        self.layers = self.cost.layers
        self._followers = {name: followers(model, layer) for name, layer in self.layers.items()}
        self._check_reachable()
        # A tensor on the model's device: the controller never waits for the GPU.
        self.integral = torch.zeros((), device=self._device(), dtype=torch.float64)
        self.first_cost = float(self.cost.soft().detach())

    def _check_reachable(self) -> None:
        lowest = {name: frozenset(range(layer.min_bits)) for name, layer in self.layers.items()}
        least = self.cost.of(lowest)
        if least > self.budget.value:
            raise ValueError(
                f"expected budget of at least {least:.4g} {self.budget.unit} for this model, got {self.budget}"
            )

    def _device(self) -> torch.device:
        return next(iter(self.layers.values())).scale.device

    @property
    def stage(self) -> str:
        """``"search"`` or ``"finetune"``."""
        return "search" if self.steps_done < self.search_steps else "finetune"

    @property
    def temperature(self) -> float:
        """beta of (9) for the step that comes next."""
        if self.stage == "search":
            done, length, last = self.steps_done, self.search_steps, self.search_temperature
        else:
            done = min(self.steps_done, self.total_steps) - self.search_steps
            length, last = self.total_steps - self.search_steps, self.final_temperature
        share = done / length
        if self.schedule == "linear":
            return 1 + (last - 1) * share
        if self.schedule == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return last**share

    def target(self) -> float:
        """Cost to steer to: from the first cost to the budget over two thirds of the search, then the budget."""
        share = min(1.0, 1.5 * self.steps_done / self.search_steps)
        return self.first_cost + (self.budget.value - self.first_cost) * share

    def penalty(self) -> Tensor:
        """Equation (8): ``lambda * (DeltaS + integral of DeltaS) * cost``, a 0-dim tensor; 0 once the scheme is fixed.

        ``DeltaS`` is the relative distance of the soft cost from the target, not differentiated. The integral lets the
        price of a bit rise for as long as the budget is missed, whatever the scale of the task's loss.
        """
        if self.stage != "search":
            return torch.zeros((), device=self._device())
        cost = self.cost.soft()
        distance = (cost.detach() - self.target()) / self.budget.value
        return (self.strength * (distance + self.integral)).to(cost.dtype) * cost

    @torch.no_grad()
    def step(self) -> None:
        """Advance by one optimizer step: controller, end of the search, temperature."""
        if self.stage == "search":
            distance = (self.cost.soft() - self.target()) / self.budget.value
            # The integral doubles a constant distance after a twentieth of the search.
            self.integral = (self.integral + 20 * distance / self.search_steps).clamp(-10.0, 10.0)
            self._hold_target()
        before = self.temperature
        self.steps_done += 1
        if self.steps_done == self.search_steps:
            self._fix_scheme()
            before = 1.0
        self._set_temperature(before, self.temperature)

    def _set_temperature(self, before: float, after: float) -> None:
        """Raise the temperature; the scale makes up for what a decided digit that training left alone gains by it."""
        ratio = digit_amplitude(before) / digit_amplitude(after)
        for name, layer in self.layers.items():
            layer.scale.mul_(ratio)
            for member in (layer, *self._followers[name]):
                member.temperature.fill_(after)

    def _hold_target(self) -> None:
        """Shift all gate logits alike, by one Newton step, towards the target cost.

        Only their order then decides which bits stay. Without it gates near the threshold die together once the
        temperature is high.
        """
        with torch.enable_grad():
            shift = torch.zeros((), device=self._device(), requires_grad=True)
            cost = self.cost.soft(shift)
            (slope,) = torch.autograd.grad(cost, shift)
        limit = 0.1
        move = ((self.target() - cost.detach()) / slope.clamp_min(1e-6)).clamp(-limit, limit)
        for layer in self.layers.values():
            layer.gate_logits.add_(move)

    def _fix_scheme(self) -> None:
        scheme = repair(active_sets(self.layers), gate_scores(self.layers), self.cost)
        drop = self.optimizer is not None
        for name, layer in self.layers.items():
            layer.fix_scheme_(scheme[name], drop_planes=drop)
            for follower in self._followers[name]:
                follower.follow_(layer)
            if self.optimizer is not None:
                for parameter in (layer.bit_logits, layer.gate_logits):
                    self.optimizer.state.pop(parameter, None)
                    parameter.grad = None

    def layer_bits(self) -> dict[str, dict[str, int]]:
        """``{layer: {"paper": active bits, "stored": stored planes}}``, counted as if hard."""
        sets = active_sets(self.layers)
        return {name: {"paper": len(bits), "stored": stored_bits(bits)} for name, bits in sets.items()}

    def progress(self) -> dict[str, float | str]:
        """Where the search stands: step, stage, temperature, average bits, the budget and the distance from it."""
        sets = active_sets(self.layers)
        weights = self.cost.weights

        def average(count) -> float:
            return sum(count(bits) * weights[name] for name, bits in sets.items()) / self.cost.total_weights

        return {
            "step": self.steps_done,
            "total_steps": self.total_steps,
            "stage": self.stage,
            "temperature": self.temperature,
            "paper_bits": average(len),
            "stored_bits": average(stored_bits),
            "budget": str(self.budget),
            "gap": self.cost.of(sets) - self.budget.value,
        }

    def health(self) -> list[str]:
        """Warnings of the numerical watchdog, see ``health``."""
        return health(self.model)

    def state_dict(self) -> dict[str, float | int | Tensor]:
        """What a resumed run needs besides the model's and the optimizer's state."""
        return {"steps_done": self.steps_done, "integral": self.integral, "first_cost": self.first_cost}

    def load_state_dict(self, state: Mapping[str, float | int | Tensor]) -> None:
        """Continue from ``state_dict()``; load the model's state first, it carries the temperature and the scheme."""
        expected = set(self.state_dict())
        if set(state) != expected:
            raise ValueError(f"expected search state with {sorted(expected)}, got {sorted(state)}")
        self.steps_done = int(state["steps_done"])
        self.integral = torch.as_tensor(state["integral"], dtype=torch.float64).to(self._device(), copy=True)
        self.first_cost = float(state["first_cost"])


@torch.no_grad()
def finalize_(model: nn.Module, data: Iterable | None = None, budget: str | Budget | None = None) -> Report:
    """Make the hard model in place: integer codes (7) in every CSQ layer, logits freed; return the report.

    Args:
        model: a prepared model, at any stage.
        data: batches of inputs; when given, batch-norm statistics are estimated again, since they drifted while bits
            moved.
        budget: when given and not yet met, the scheme is repaired first, and the report says how much of it is used.

    Raises:
        ValueError: the model has no CSQ layer, or the budget cannot be met.
    """
    layers = csq_layers(model)
    if budget is not None:
        cost = Cost(model, Budget.parse(budget))
        sets = active_sets(layers)
        if cost.of(sets) > cost.budget.value:
            hard = [name for name, layer in layers.items() if layer.stage == "hard"]
            if hard:
                raise ValueError(
                    f"expected budget of at least {cost.of(sets):.4g} {cost.budget.unit}, got {cost.budget}: "
                    f"{hard[0]} is hard"
                )
            scheme = repair(sets, gate_scores(layers), cost)
            for name, layer in layers.items():
                layer.close_gates_(scheme[name])
    soft = report(model, budget)
    for layer in layers.values():
        others = followers(model, layer)
        layer.harden_()
        for follower in others:
            follower.follow_(layer)
    if data is not None:
        device = next(iter(layers.values())).scale.device
        optim.swa_utils.update_bn(data, model, device=device)
    hard_report = report(model, budget)
    for before, after in zip(soft.layers, hard_report.layers, strict=True):
        after.gap, after.undecided = before.gap, before.undecided
    return hard_report
