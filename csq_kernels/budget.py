"""What a scheme costs, the budget that it must meet, and the repair that makes it meet it exactly.

Paper bits count the active gates; stored bits count the planes that the file spends. Digits are ternary, so a run of
``r`` adjacent active bits spans ``-(2^r - 1) .. 2^r - 1`` and is stored as ``r + 1`` planes of two's complement; a gap
starts a new run. Filling a gap of one bit is therefore free.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from csq_kernels.nn.layer import CSQLayer
from csq_kernels.nn.pack import SCALE_BYTES
from csq_kernels.nn.prepare import csq_layers
from csq_kernels.packed import rest_bytes

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


@dataclass(frozen=True)
class Budget:
    """A limit on the size of a model: ``"3.0 bits"`` a weight as stored, ``"3.0 paper bits"`` a weight, or ``"1.2 MB"``
    of file.

    Bits are averages over the weights of the CSQ layers; the scales, 4 bytes each, are not part of them. Megabytes
    (10^6 bytes) count the whole packed file: planes and scales of the CSQ layers, what stays float, and the header.

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
    """Cost of a set of active bits per layer, in the unit of a budget: exact for sets, differentiable for gates.

    Inside, a cost is an integer, bits times weights or bytes, so that "met" does not hang on a rounding.
    """

    def __init__(self, model: nn.Module, budget: Budget):
        self.budget = budget
        self.layers = csq_layers(model)
        if not self.layers:
            raise ValueError("expected model with CSQ layers, got none; call prepare_ first")
        self.weights = {name: _numel(layer) for name, layer in self.layers.items()}
        self.total_weights = sum(self.weights.values())
        device = next(iter(self.layers.values())).gate_logits.device
        # Made once: `soft` runs many times a step, and on a GPU each copy would wait.
        self._weights = torch.tensor(list(self.weights.values()), dtype=torch.float32, device=device)
        self.fixed = rest_bytes(model) if budget.unit == "MB" else 0
        self.per_unit = 10**6 if budget.unit == "MB" else self.total_weights
        # The product may fall just short of the integer that was meant, as 4.1 * 10 does.
        self.limit = math.floor(budget.value * self.per_unit * (1 + 1e-12))

    def of_layer(self, name: str, active: Collection[int]) -> int:
        """Integer cost of one layer."""
        if self.budget.unit == "MB":
            return weight_bytes(active, self.weights[name], self.layers[name].scale.numel())
        bits = len(active) if self.budget.unit == "paper bits" else stored_bits(active)
        return bits * self.weights[name]

    def total(self, active: Mapping[str, Collection[int]]) -> int:
        """Integer cost of the whole model; within the budget up to ``limit``."""
        return self.fixed + sum(self.of_layer(name, bits) for name, bits in active.items())

    def of(self, active: Mapping[str, Collection[int]]) -> float:
        """Cost of the whole model in the unit of the budget."""
        return self.total(active) / self.per_unit

    def out_of_reach(self, least: Mapping[str, Collection[int]]) -> ValueError:
        """The error for a budget below the cost of ``least``."""
        return ValueError(
            f"expected budget of at least {self.of(least):.4g} {self.budget.unit} for this model, got {self.budget}"
        )

    def soft(self, shift: Tensor | float = 0.0, sharpness: float = 1.0) -> Tensor:
        """Cost with soft gates: a bit counts ``G_b``, and the end of a run ``G_b (1 - G_{b+1})`` once more where planes
        are stored.

        ``shift`` is added to every gate logit; ``sharpness`` multiplies the temperature of the gates.
        """
        gates = [_mean_gates(layer, shift, sharpness) for layer in self.layers.values()]
        gate = nn.utils.rnn.pad_sequence(gates, batch_first=True)  # [layers, planes]
        bits = gate.sum(1)
        if self.budget.unit != "paper bits":
            above = nn.functional.pad(gate, (0, 1))[:, 1:]
            bits = bits + (gate * (1 - above)).sum(1)
        if self.budget.unit == "MB":
            scales = sum(SCALE_BYTES * layer.scale.numel() for layer in self.layers.values())
            return (self.fixed + scales + (self._weights * bits).sum() / 8) / self.per_unit
        return (self._weights * bits).sum() / self.per_unit


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

    total = cost.total(active)
    while total > cost.limit:
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
            closed_up = {name: _closed_up(bits, scores[name]) for name, bits in active.items()}
            if cost.total(closed_up) >= total:
                raise cost.out_of_reach(active)
            active = closed_up
        else:
            active[best[1]] = best[2]
        total = cost.total(active)

    while True:
        room = cost.limit - total
        candidates = [
            (scores[name][bit], name, bit)
            for name, bits in active.items()
            for bit in scores[name].keys() - bits
            if cost.of_layer(name, bits | {bit}) - cost.of_layer(name, bits) <= room
        ]
        if not candidates:
            return active
        _, name, bit = max(candidates)
        active[name] |= {bit}
        total = cost.total(active)


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
