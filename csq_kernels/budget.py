"""What a scheme costs, the budget that it must meet, and the repair that makes it meet it exactly.

Paper bits count the active gates; stored bits count the planes that the file spends. Digits are ternary, so a run of
``r`` adjacent active bits spans ``-(2^r - 1) .. 2^r - 1`` and is stored as ``r + 1`` planes of two's complement; a gap
starts a new run. Filling a gap of one bit is therefore free.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from csq_kernels.bitplanes import plane_bytes
from csq_kernels.nn.layer import CSQLayer
from csq_kernels.nn.pack import SCALE_BYTES
from csq_kernels.nn.prepare import csq_layers
from csq_kernels.packed import rest_bytes
from csq_kernels.workload import Workload

ActiveSets = dict[str, frozenset[int]]


def runs(active: Collection[int]) -> int:
    """Number of runs of adjacent exponents in ``active``.

    >>> runs({0, 1, 4})
    2
    """
    chosen = set(active)
    return sum(1 for bit in chosen if bit + 1 not in chosen)


def stored_bits(active: Collection[int]) -> int:
    """Stored planes of a layer whose active exponents are ``active``: one a bit and one more a run.

    >>> stored_bits({0, 1, 4}), stored_bits({2}), stored_bits(())
    (5, 2, 0)
    """
    return len(set(active)) + runs(active)


def weight_bytes(active: Collection[int], weights: int, scales: int) -> int:
    """Bytes of a layer's planes and scales.

    >>> weight_bytes({2}, weights=100, scales=1)
    30
    """
    return stored_bits(active) * ((weights + 7) // 8) + SCALE_BYTES * scales


_UNITS = ("bits", "stored bits", "paper bits", "MB", "MBOPs", "GBOPs", "ms")
# Integers in which each unit is counted: bytes, bit operations, nanoseconds. Bits are counted over all weights.
_PER_UNIT = {"MB": 10**6, "MBOPs": 10**6, "GBOPs": 10**9, "ms": 10**6}


@dataclass(frozen=True)
class Budget:
    """A limit on what a model costs, in one of these units:

    - ``"3.0 bits"`` a weight as stored, or ``"3.0 paper bits"``: averages over the weights of the CSQ layers, without
      the scales, which take 4 bytes each.
    - ``"1.2 MB"``, 10^6 bytes: the packed file, with planes and scales, what stays float, and the header.
    - ``"1.5 GBOPs"``, 10^9, or ``"300 MBOPs"``, 10^6 bit operations: the sum over the CSQ layers of multiplications x
      stored bits x bits of the layer's input, of one forward pass of an example input, see ``workload``.
    - ``"2.5 ms"``: that forward pass, with packed layers, on the machine on which ``workload`` was measured.

    Example:
        >>> Budget.parse("2.5 paper bits"), Budget.parse("1.5 GBOPs")
        (Budget(value=2.5, unit='paper bits'), Budget(value=1.5, unit='GBOPs'))
    """

    value: float
    unit: str

    @classmethod
    def parse(cls, text: "str | Budget") -> "Budget":
        """Read a budget; ``ValueError`` if the text is not one."""
        if isinstance(text, Budget):
            return text
        match = re.fullmatch(rf"\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*({'|'.join(_UNITS)})\s*", str(text))
        if match is None or not 0 < float(match[1]) < math.inf:
            raise ValueError(
                "expected budget as '3.0 bits', '3.0 paper bits', '1.2 MB', '1.5 GBOPs', '300 MBOPs' or '2.5 ms', "
                f"got {text!r}"
            )
        return cls(float(match[1]), "stored bits" if match[2] == "bits" else match[2])

    @classmethod
    def parse_all(cls, budgets: "Budgets") -> "tuple[Budget, ...]":
        """Read one budget or several that must hold at once; ``ValueError`` if one cannot be read or there is none.

        Example:
            >>> [str(budget) for budget in Budget.parse_all(["3.0 bits", "1.2 ms"])]
            ['3 stored bits', '1.2 ms']
        """
        given = [budgets] if isinstance(budgets, str | Budget) else budgets
        if not given:
            raise ValueError("expected budget as at least one, got none")
        return tuple(cls.parse(budget) for budget in given)

    @property
    def needs_workload(self) -> bool:
        """Whether the cost depends on what a forward pass does, and not on the weights alone."""
        return self.unit.endswith("BOPs") or self.needs_latency

    @property
    def needs_latency(self) -> bool:
        """Whether the cost depends on the speed of this machine."""
        return self.unit == "ms"

    def __str__(self) -> str:
        return f"{self.value:g} {self.unit}"


Budgets = str | Budget | Sequence[str | Budget]


class Cost:
    """Cost of a set of active bits per layer, in the unit of a budget: exact for sets, differentiable for gates.

    What a layer costs is a table of integers over the count of its bits, stored or paper ones, so that "met" does not
    hang on a rounding: bits times weights, bytes, bit operations or nanoseconds. ``fixed`` is what no bit changes.

    Raises:
        ValueError: the model has no CSQ layer, or the budget needs a ``workload`` of this model.
    """

    def __init__(self, model: nn.Module, budget: Budget, workload: Workload | None = None):
        self.budget = budget
        self.layers = csq_layers(model)
        if not self.layers:
            raise ValueError("expected model with CSQ layers, got none; call prepare_ first")
        self.weights = {name: _numel(layer) for name, layer in self.layers.items()}
        self.total_weights = sum(self.weights.values())
        self.per_unit = _PER_UNIT.get(budget.unit, self.total_weights)
        self.table, self.fixed = self._tables(model, workload)
        # The product may fall just short of the integer that was meant, as 4.1 * 10 does.
        self.limit = math.floor(budget.value * self.per_unit * (1 + 1e-12))
        # Made once: `soft` runs many times a step, and on a GPU each copy would wait.
        longest = max(map(len, self.table.values()))
        rows = [[*row, *[row[-1]] * (longest - len(row))] for row in self.table.values()]
        device = next(iter(self.layers.values())).gate_logits.device
        table = torch.tensor(rows, dtype=torch.float64) / self.per_unit
        self._table = table.to(device, torch.float32)
        self._slope = table.diff(dim=1).to(device, torch.float32)

    def _tables(self, model: nn.Module, workload: Workload | None) -> tuple[dict[str, list[int]], int]:
        """``{layer: cost of 0, 1, 2, ... bits}``, and the cost of the rest."""
        counts = {name: range(layer.n_bits + 2) for name, layer in self.layers.items()}
        if not self.budget.needs_workload:
            if self.budget.unit == "MB":
                scales = {name: SCALE_BYTES * layer.scale.numel() for name, layer in self.layers.items()}
                planes = {name: plane_bytes(weights) for name, weights in self.weights.items()}
                table = {name: [scales[name] + count * planes[name] for count in counts[name]] for name in counts}
                return table, rest_bytes(model)
            return {name: [count * self.weights[name] for count in counts[name]] for name in counts}, 0
        if workload is None:
            raise ValueError(
                f"expected workload with a budget of {self.budget}, got None; "
                "pass workload=csq_kernels.workload(model, example_input, ...)"
            )
        if workload.operations.keys() != self.layers.keys():
            raise ValueError(
                f"expected workload of this model, with the layers {', '.join(self.layers)}, "
                f"got one of {', '.join(workload.operations)}"
            )
        if not self.budget.needs_latency:
            return {name: [count * workload.operations[name] for count in counts[name]] for name in counts}, 0
        if workload.nanoseconds is None:
            raise ValueError(f"expected workload with latency=True with a budget of {self.budget}, got one without")
        for name, row in workload.nanoseconds.items():
            if len(row) != len(counts[name]):
                raise ValueError(
                    f"expected workload with 0 to {counts[name][-1]} stored bits of {name}, got {len(row)}"
                )
        return {name: list(row) for name, row in workload.nanoseconds.items()}, workload.rest_nanoseconds

    def of_layer(self, name: str, active: Collection[int]) -> int:
        """Integer cost of one layer."""
        return self.table[name][len(active) if self.budget.unit == "paper bits" else stored_bits(active)]

    def total(self, active: Mapping[str, Collection[int]]) -> int:
        """Integer cost of the whole model; within the budget up to ``limit``."""
        return self.fixed + sum(self.of_layer(name, bits) for name, bits in active.items())

    def of(self, active: Mapping[str, Collection[int]]) -> float:
        """Cost of the whole model in the unit of the budget."""
        return self.total(active) / self.per_unit

    def is_met(self, active: Mapping[str, Collection[int]]) -> bool:
        """Whether the budget holds."""
        return self.total(active) <= self.limit

    def out_of_reach(self, least: Mapping[str, Collection[int]]) -> ValueError:
        """The error for a budget below the cost of ``least``."""
        return ValueError(
            f"expected budget of at least {self.of(least):.4g} {self.budget.unit} for this model, got {self.budget}"
        )

    def soft(self, shift: Tensor | float = 0.0, sharpness: float = 1.0) -> Tensor:
        """Cost with soft gates: a bit counts ``G_b``, and the end of a run ``G_b (1 - G_{b+1})`` once more where planes
        are stored; between two counts the table is interpolated linearly.

        ``shift`` is added to every gate logit; ``sharpness`` multiplies the temperature of the gates.
        """
        return self.of_gates(soft_gates(self.layers, shift, sharpness))

    def of_gates(self, gate: Tensor) -> Tensor:
        """``soft`` of what ``soft_gates`` returned."""
        count = gate.sum(1)
        if self.budget.unit != "paper bits":
            above = nn.functional.pad(gate, (0, 1))[:, 1:]
            count = count + (gate * (1 - above)).sum(1)
        # A gate that is not finite makes the cost so as well, but no index.
        below = count.detach().nan_to_num().long().clamp(0, self._slope.shape[1] - 1)[:, None]
        start, slope = self._table.gather(1, below), self._slope.gather(1, below)
        return self.fixed / self.per_unit + (start + slope * (count[:, None] - below)).sum()


def costs(model: nn.Module, budgets: Budgets, workload: Workload | None = None) -> list[Cost]:
    """The cost in the unit of each budget; ``ValueError`` as in ``Budget.parse`` and ``Cost``."""
    return [Cost(model, budget, workload) for budget in Budget.parse_all(budgets)]


def soft_gates(layers: Mapping[str, CSQLayer], shift: Tensor | float = 0.0, sharpness: float = 1.0) -> Tensor:
    """Mean gates over the channels, ``(layers, planes)``, with zeros where a layer has fewer planes than another."""
    gates = [_mean_gates(layer, shift, sharpness) for layer in layers.values()]
    return nn.utils.rnn.pad_sequence(gates, batch_first=True)


def _numel(layer: CSQLayer) -> int:
    return math.prod(layer.bit_logits.shape[2:])


def _mean_gates(layer: CSQLayer, shift: Tensor | float, sharpness: float) -> Tensor:
    gate = torch.sigmoid(sharpness * layer.temperature * (layer.gate_logits + shift))
    return gate if gate.ndim == 1 else gate.mean(1)


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


def repair(active: ActiveSets, scores: dict[str, dict[int, float]], cost: Cost | Sequence[Cost]) -> ActiveSets:
    """Change as few, and as unwanted, bits as needed for every budget to be met, then spend what is left of them.

    Closes the bit with the lowest score per cost saved, of the tightest budget, until all hold. Then opens the bit with
    the highest score that still fits, and where none does, trades bits of cheap layers for dearer ones while this uses
    more of the budget. Never goes below a layer's ``min_bits``.

    Raises:
        ValueError: a budget is below what ``min_bits`` needs.
    """
    costs = [cost] if isinstance(cost, Cost) else cost
    minimum = {name: layer.min_bits for name, layer in costs[0].layers.items()}
    active = {name: frozenset(bits) for name, bits in active.items()}
    for name, bits in active.items():
        while len(bits) < minimum[name]:
            bits |= {max(scores[name].keys() - bits, key=lambda bit: scores[name][bit])}
        active[name] = bits
    return _spend(_reduce(active, scores, costs, minimum), scores, costs, minimum)


def _tightest(costs: Sequence[Cost], active: ActiveSets) -> Cost:
    """The cost of which the largest share of its budget is used."""
    return max(costs, key=lambda cost: cost.total(active) / max(cost.limit, 1))


def _reduce(
    active: ActiveSets, scores: dict[str, dict[int, float]], costs: Sequence[Cost], minimum: Mapping[str, int]
) -> ActiveSets:
    """Close bits until every budget holds. Closing never makes another cost rise."""
    spread = max((abs(score) for by_bit in scores.values() for score in by_bit.values()), default=0.0) + 1.0
    while not (cost := _tightest(costs, active)).is_met(active):
        best: tuple[float, str, frozenset[int]] | None = None
        for name, bits in active.items():
            for fewer in _reductions(bits, minimum[name]):
                saved = cost.of_layer(name, bits) - cost.of_layer(name, fewer)
                if saved <= 0:
                    continue
                lost = sum(scores[name][bit] + spread for bit in bits - fewer)
                if best is None or lost / saved < best[0]:
                    best = (lost / saved, name, fewer)
        if best is not None:
            active = active | {best[1]: best[2]}
            continue
        closed_up = {name: _closed_up(bits, scores[name]) for name, bits in active.items()}
        if cost.total(closed_up) >= cost.total(active):
            raise cost.out_of_reach(active)
        active = closed_up
    return active


# Each exchange uses at least half of what is left where one can, so few are needed; and no bit that is wanted goes for
# the last hundredth of a budget.
_EXCHANGES, _FULL = 32, 0.99
# Regret, what each cost gains, the layer and its new set.
_Change = tuple[float, list[int], str, frozenset[int]]


def _spend(
    active: ActiveSets, scores: dict[str, dict[int, float]], costs: Sequence[Cost], minimum: Mapping[str, int]
) -> ActiveSets:
    """Open the bits with the highest scores that fit, then exchange bits to use what is left."""
    active = _fill(active, scores, costs)
    for _ in range(_EXCHANGES):
        exchanged = _exchange(active, scores, costs, minimum)
        if exchanged is None:
            break
        active = _fill(exchanged, scores, costs)
    return active


def _fill(active: ActiveSets, scores: dict[str, dict[int, float]], costs: Sequence[Cost]) -> ActiveSets:
    active = dict(active)
    while True:
        room = [cost.limit - cost.total(active) for cost in costs]
        candidates = [
            (scores[name][bit], name, bit)
            for name, bits in active.items()
            for bit in scores[name].keys() - bits
            if all(map(int.__le__, _added(costs, name, bits, bits | {bit}), room))
        ]
        if not candidates:
            return active
        _, name, bit = max(candidates)
        active[name] |= {bit}


def _added(costs: Sequence[Cost], name: str, before: frozenset[int], after: frozenset[int]) -> list[int]:
    """What each cost gains by the change of a layer's bits."""
    return [cost.of_layer(name, after) - cost.of_layer(name, before) for cost in costs]


def _exchange(
    active: ActiveSets, scores: dict[str, dict[int, float]], costs: Sequence[Cost], minimum: Mapping[str, int]
) -> ActiveSets | None:
    """Open a bit in one layer and close one or more in another, so that more of the tightest budget is used.

    Of the exchanges that use at least half of what is left, takes the one with the best scores; where there is none,
    the one that uses the most. ``None``: no exchange uses more, or the budget is as good as full.
    """
    totals = [cost.total(active) for cost in costs]
    limits = [max(cost.limit, 1) for cost in costs]
    usage = max(map(float.__truediv__, map(float, totals), map(float, limits)))
    if usage >= _FULL:
        return None
    openings: list[_Change] = []
    closings: list[_Change] = []
    for name, bits in active.items():
        openings += _cheapest_regrets(
            (-scores[name][bit], _added(costs, name, bits, bits | {bit}), name, bits | {bit})
            for bit in scores[name].keys() - bits
        )
        lost, fewer = 0.0, bits
        while len(fewer) > minimum[name]:
            steps = _cheapest_regrets(
                (lost + scores[name][bit], _added(costs, name, bits, fewer - {bit}), name, fewer - {bit})
                for bit in fewer
            )
            closings += steps
            lost, _, _, fewer = min(steps)
    best: tuple[tuple[bool, float], ActiveSets] | None = None
    for regret, opened, name, more in openings:
        for lost, closed, other, fewer in closings:
            if other == name:
                continue
            after = list(map(sum, zip(totals, opened, closed, strict=True)))
            if not all(map(int.__le__, after, limits)):
                continue
            used = (max(map(float.__truediv__, map(float, after), map(float, limits))) - usage) / (1 - usage)
            rank = (True, -regret - lost) if used >= 0.5 else (False, used)
            if used > 0 and (best is None or rank > best[0]):
                best = (rank, {name: more, other: fewer})
    return None if best is None else active | best[1]


def _cheapest_regrets(changes: Iterable[_Change]) -> list[_Change]:
    """Of the changes that cost the same, the one with the least regret."""
    best: dict[tuple[int, ...], _Change] = {}
    for change in changes:
        key = tuple(change[1])
        if key not in best or change[0] < best[key][0]:
            best[key] = change
    return list(best.values())


def _closed_up(bits: frozenset[int], scores: dict[int, float]) -> frozenset[int]:
    """As many bits in one run, with the highest scores: what gaps cost is saved where no bit can be spared."""
    windows = (frozenset(range(low, low + len(bits))) for low in scores)
    return max(
        (window for window in windows if window <= scores.keys()),
        key=lambda window: sum(scores[bit] for bit in window),
        default=bits,
    )


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
