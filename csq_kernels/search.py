"""The search for a precision per layer: budget, temperature, controller, exact repair; and the hard end of it.

One ``Search`` runs two stages over ``total_steps``. In the *search* stage gates and bits are soft, the temperature
rises (9), and the budget term (8) steers the cost to the budget. At its end the scheme is repaired so that the budget
is met exactly; in the *finetune* stage the scheme is fixed and the temperature is rewound and rises again, so that the
bits decide. ``finalize_`` makes the integers.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn, optim

from csq_kernels.budget import Budgets, active_sets, costs, gate_scores, repair, soft_gates, stored_bits
from csq_kernels.nn.encode import digit_amplitude
from csq_kernels.nn.layer import CSQLayer
from csq_kernels.nn.prepare import csq_layers, followers
from csq_kernels.optim import SinglePassOptimizer
from csq_kernels.report import Report, health, report
from csq_kernels.workload import Workload

SCHEDULES = ("exponential", "linear", "cosine")
# The controller counts gates at a higher temperature than the weight uses: nearly as the repair will count them.
COUNT_SHARPNESS = 8.0
_LARGEST_SHIFT, _BISECTIONS = 0.1, 12


class Search:
    """Temperature, budget and stages of a model that ``prepare_`` has prepared.

    Each step: add ``penalty()`` to the loss, step the optimizer, then call ``step()``. After ``total_steps`` the scheme
    meets the budget and the bits are decided; ``finalize_`` makes them integers.

    Args:
        model: a prepared model.
        budget: ``"3.0 bits"`` (stored), ``"3.0 paper bits"``, ``"1.2 MB"``, ``"1.5 GBOPs"`` or ``"2.5 ms"``, see
            ``Budget``; or several that must hold at once, as in ``["3.0 bits", "1.2 ms"]``. The search steers to the
            one that is exceeded most, relative to what it allows.
        total_steps: optimizer steps of both stages.
        optimizer: when given, pruned planes are freed at the end of the search and the optimizer forgets their state.
            Leave a torch optimizer out under DDP, whose buckets cannot change; then pruned planes stay, unread. One of
            ``csq_kernels.optim`` advances the search within its own step, where the next weight is made.
        search_share: share of the steps spent searching; with 0, call ``fix_scheme`` before the first step, on a model
            that was searched before.
        strength: lambda of (8).
        search_temperature: last temperature of the search stage.
        final_temperature: last temperature of the finetune stage, ``beta_max`` of (9).
        schedule: ``"exponential"`` (9), ``"linear"`` or ``"cosine"`` (in the logarithm of the temperature).
        decision_share: share of the finetune stage, at its end, in which the temperature goes on from
            ``search_temperature``, up to which bits learn, to ``final_temperature``, at which they are decided.
        lateness: before that share, the finetune stage follows (9) not in the share ``x`` of the way but in
            ``x ** lateness``: bits move far while they are soft, and are decided once the learning rate has fallen.
        gradient_temperature: the highest temperature at which the finetune stage takes gradients; default that of the
            weight, whatever it is. With 3, bits go on learning to the end, which the weight has as decided: those of
            each layer's lowest plane. The digits of the planes above it are decided when the temperature passes 3.
        workload: what ``workload(model, example_input)`` counted, for a budget in bit operations, or measured with
            ``latency=True``, for one in milliseconds.

    Raises:
        ValueError: an argument is out of range, a budget needs a ``workload``, or cannot be reached with the layers'
            ``min_bits``.

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
        budget: Budgets,
        total_steps: int,
        *,
        optimizer: optim.Optimizer | None = None,
        search_share: float = 0.5,
        strength: float = 0.1,
        search_temperature: float = 30.0,
        final_temperature: float = 10000.0,
        schedule: str = "exponential",
        decision_share: float = 0.2,
        lateness: float = 3.0,
        gradient_temperature: float | None = None,
        workload: Workload | None = None,
    ):
        if total_steps < 2:
            raise ValueError(f"expected total_steps of at least 2, got {total_steps}")
        if not 0 <= search_share < 1:
            raise ValueError(f"expected search_share of at least 0 and below 1, got {search_share}")
        for name, value in (("search_temperature", search_temperature), ("final_temperature", final_temperature)):
            if not 1 <= value < math.inf:
                raise ValueError(f"expected {name} of at least 1 and finite, got {value}")
        if not 0 <= strength < math.inf:
            raise ValueError(f"expected strength of at least 0 and finite, got {strength}")
        if not 0 <= decision_share < 1:
            raise ValueError(f"expected decision_share of at least 0 and below 1, got {decision_share}")
        if not 0 < lateness < math.inf:
            raise ValueError(f"expected lateness above 0 and finite, got {lateness}")
        if gradient_temperature is not None and not 1 <= gradient_temperature < math.inf:
            raise ValueError(f"expected gradient_temperature of at least 1 and finite, got {gradient_temperature}")
        if schedule not in SCHEDULES:
            raise ValueError(f"expected schedule as one of {', '.join(SCHEDULES)}, got {schedule!r}")
        self.model = model
        self.total_steps = total_steps
        # With a share of 0 there is one step of search until ``fix_scheme`` is called.
        self.search_steps = min(max(round(total_steps * search_share), 1), total_steps - 1)
        self.optimizer = optimizer
        self.strength = strength
        self.search_temperature = search_temperature
        self.final_temperature = final_temperature
        self.schedule = schedule
        self.decision_share = decision_share
        self.lateness = lateness
        self.gradient_temperature = gradient_temperature
        self.steps_done = 0
        self.costs = costs(model, budget, workload)
        # The first: layers and weights are the same in all.
        self.cost = self.costs[0]
        self.layers = self.cost.layers
        self._followers = {name: followers(model, layer) for name, layer in self.layers.items()}
        self._check_reachable()
        for name, layer in self.layers.items():
            for member in (layer, *self._followers[name]):
                member.gradient_temperature_limit = gradient_temperature
        # A tensor on the model's device: the controller never waits for the GPU.
        self.integral = torch.zeros((), device=self._device(), dtype=torch.float64)
        gates = soft_gates(self.layers, sharpness=COUNT_SHARPNESS).detach()
        self.first_costs = [float(cost.of_gates(gates)) for cost in self.costs]
        self._advanced = False
        if isinstance(optimizer, SinglePassOptimizer):
            optimizer.before_weights = self._advance_early

    def _check_reachable(self) -> None:
        least = {name: frozenset(range(layer.min_bits)) for name, layer in self.layers.items()}
        for cost in self.costs:
            if not cost.is_met(least):
                raise cost.out_of_reach(least)

    def _device(self) -> torch.device:
        return next(iter(self.layers.values())).scale.device

    @property
    def stage(self) -> str:
        """``"search"`` or ``"finetune"``."""
        return "search" if self.steps_done < self.search_steps else "finetune"

    @property
    def temperature(self) -> float:
        """beta of (9) for the step that comes next."""
        return self._temperature_at(self.steps_done)

    def _temperature_at(self, step: int) -> float:
        if step < self.search_steps:
            return self._rise(1.0, self.search_temperature, step / self.search_steps)
        done = min(step, self.total_steps) - self.search_steps
        share = done / (self.total_steps - self.search_steps)
        learning = 1 - self.decision_share
        middle = min(self.search_temperature, self.final_temperature) if learning < 1 else self.final_temperature
        if share <= learning:
            return self._rise(1.0, middle, (share / learning) ** self.lateness)
        return self._rise(middle, self.final_temperature, (share - learning) / self.decision_share)

    def _rise(self, first: float, last: float, share: float) -> float:
        """The temperature after so much of the way from ``first`` to ``last``."""
        if self.schedule == "linear":
            return first + (last - first) * share
        if self.schedule == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return first * (last / first) ** share

    @property
    def first_cost(self) -> float:
        """Cost at the start, in the unit of the first budget."""
        return self.first_costs[0]

    def target(self, index: int = 0) -> float:
        """Cost to steer to: from the first cost to the budget over two thirds of the search, then the budget.

        ``index`` names one of several budgets.
        """
        share = min(1.0, 1.5 * self.steps_done / self.search_steps)
        first = self.first_costs[index]
        return first + (self.costs[index].budget.value - first) * share

    def _distances(self, shift: Tensor | float = 0.0) -> Tensor:
        """Relative distance of the cost of each budget from its target; the largest is that of the tightest budget."""
        gates = soft_gates(self.layers, shift, COUNT_SHARPNESS).detach()
        return torch.stack(
            [(cost.of_gates(gates) - self.target(index)) / cost.budget.value for index, cost in enumerate(self.costs)]
        )

    def penalty(self) -> Tensor:
        """Equation (8): ``lambda * (DeltaS + integral of DeltaS) * cost``, a 0-dim tensor; 0 once the scheme is fixed.

        ``DeltaS`` is the relative distance of the soft cost from the target, not differentiated. The integral lets the
        price of a bit rise for as long as the budget is missed, whatever the scale of the task's loss. The cost is that
        of the tightest budget: in bits or MB, or as a share of what the budget allows.
        """
        if self.stage != "search":
            return torch.zeros((), device=self._device())
        distances = self._distances()
        gates = soft_gates(self.layers)
        priced = [
            cost.of_gates(gates) / (cost.budget.value if cost.budget.needs_workload else 1.0) for cost in self.costs
        ]
        # Not an index: that would wait for the GPU.
        cost = torch.stack(priced).take(distances.argmax())
        return (self.strength * (distances.max() + self.integral)).to(cost.dtype) * cost

    def _advance_early(self) -> None:
        """``step``, called by the single-pass optimizer once gates and scales have moved and before the logits do.

        What encodes the weight anew is left to ``step``: it encodes the new logits.
        """
        if self.steps_done + 1 != self.search_steps and not self._upper_planes_decide():
            self._advance()
            self._advanced = True

    def _upper_planes_decide(self) -> bool:
        """Whether the step under way takes the temperature of the finetune stage past that of the gradients."""
        if self.gradient_temperature is None or self.stage != "finetune":
            return False
        before, after = (self._temperature_at(self.steps_done + i) for i in range(2))
        return before <= self.gradient_temperature < after

    def step(self) -> None:
        """Advance by one optimizer step: controller, end of the search, temperature.

        Where a single-pass optimizer has done so in its step, nothing is left to do.
        """
        if not self._advanced:
            self._advance()
            for layer in self.layers.values():
                if layer.is_stale():
                    layer.refresh_weight_()
        self._advanced = False

    @torch.no_grad()
    def _advance(self) -> None:
        if self.stage == "search":
            distance = self._distances().max()
            # The integral doubles a constant distance after a twentieth of the search.
            self.integral = (self.integral + 20 * distance / self.search_steps).clamp(-10.0, 10.0)
            self._hold_target()
        before, decide = self.temperature, self._upper_planes_decide()
        self.steps_done += 1
        if self.steps_done == self.search_steps:
            self._fix_scheme()
            before = 1.0
        self._set_temperature(before, self.temperature)
        if decide:
            for layer in self.layers.values():
                layer.decide_upper_planes_(self.temperature)
                self._forget(layer)

    @torch.no_grad()
    def fix_scheme(self) -> None:
        """End the search now: repair the scheme to the budget and go on to the finetune stage with the steps left.

        For a run that is out of time, and for a model whose gates an earlier search has moved, with ``search_share=0``.

        Raises:
            RuntimeError: the scheme is fixed already.
        """
        if self.stage != "search":
            raise RuntimeError(f"expected a search that still runs, got one in the {self.stage} stage")
        self.search_steps = self.steps_done
        self._fix_scheme()
        self._set_temperature(1.0, self.temperature)
        for layer in self.layers.values():
            if layer.is_stale():
                layer.refresh_weight_()

    def _set_temperature(self, before: float, after: float) -> None:
        """Raise the temperature; the scale makes up for what a decided digit that training left alone gains by it."""
        ratio = digit_amplitude(before) / digit_amplitude(after)
        for name, layer in self.layers.items():
            layer.scale.mul_(ratio)
            for member in (layer, *self._followers[name]):
                member.temperature.fill_(after)

    def _hold_target(self) -> None:
        """Shift all gate logits alike, so that the bits they stand for cost what the target says.

        Only their order then decides which bits stay. Without it a layer's gates all settle just below the threshold,
        where together they still carry the weight, and die together once the temperature is high.
        """
        low, high = (torch.full((), side * _LARGEST_SHIFT, device=self._device()) for side in (-1, 1))
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            too_much = self._distances(middle).max() > 0
            low, high = torch.where(too_much, low, middle), torch.where(too_much, middle, high)
        for layer in self.layers.values():
            layer.gate_logits.add_((low + high) / 2)

    def _fix_scheme(self) -> None:
        scheme = repair(active_sets(self.layers), gate_scores(self.layers), self.costs)
        drop = self.optimizer is not None
        for name, layer in self.layers.items():
            layer.fix_scheme_(scheme[name], drop_planes=drop)
            for follower in self._followers[name]:
                follower.follow_(layer)
            self._forget(layer)

    def _forget(self, layer: CSQLayer) -> None:
        """Let the optimizer forget how logits moved that have just been encoded anew."""
        if self.optimizer is not None:
            for tensor in (layer.trained_tensors()["bit_logits"], layer.gate_logits):
                self.optimizer.state.pop(tensor, None)
                tensor.grad = None

    def layer_bits(self) -> dict[str, dict[str, int]]:
        """``{layer: {"paper": active bits, "stored": stored planes}}``, counted as if hard."""
        sets = active_sets(self.layers)
        return {name: {"paper": len(bits), "stored": stored_bits(bits)} for name, bits in sets.items()}

    def progress(self) -> dict[str, float | str]:
        """Step, stage, temperature, average bits, the tightest budget and the distance from it."""
        sets = active_sets(self.layers)
        tightest = max(self.costs, key=lambda cost: cost.of(sets) / cost.budget.value)
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
            "budget": str(tightest.budget),
            "gap": tightest.of(sets) - tightest.budget.value,
        }

    def health(self) -> list[str]:
        """Warnings of the numerical watchdog, see ``health``."""
        return health(self.model)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs besides the model's and the optimizer's state."""
        names = ("steps_done", "search_steps", "integral")
        # Under the name and in the form of the times with one budget only, where there is one.
        first = self.first_costs[0] if len(self.first_costs) == 1 else list(self.first_costs)
        return {name: getattr(self, name) for name in names} | {"first_cost": first}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict()``; load the model's state first, it carries the temperature and the scheme."""
        expected = set(self.state_dict())
        if set(state) != expected:
            raise ValueError(f"expected search state with {sorted(expected)}, got {sorted(state)}")
        first = state["first_cost"] if isinstance(state["first_cost"], list) else [state["first_cost"]]
        if len(first) != len(self.costs):
            raise ValueError(f"expected search state with {len(self.costs)} budgets, got one with {len(first)}")
        self.steps_done, self.search_steps = int(state["steps_done"]), int(state["search_steps"])
        self.integral = torch.as_tensor(state["integral"], dtype=torch.float64).to(self._device(), copy=True)
        self.first_costs = [float(cost) for cost in first]


@torch.no_grad()
def finalize_(
    model: nn.Module,
    data: Iterable | None = None,
    budget: Budgets | None = None,
    *,
    meet_budget: bool = True,
    workload: Workload | None = None,
) -> Report:
    """Make the hard model in place: integer codes (7) in every CSQ layer, logits freed; return the report.

    Args:
        model: a prepared model, at any stage.
        data: batches of inputs; when given, batch-norm statistics are estimated again, since they drifted while bits
            moved.
        budget: as for ``Search``, one or several; when given and not yet met, the scheme is repaired first, and the
            report says how much of it is used.
        meet_budget: False leaves a missed budget missed, and the report says so.
        workload: as for ``Search``, and the same.

    Raises:
        ValueError: the model has no CSQ layer, or a budget needs a ``workload`` or cannot be met.
    """
    layers = csq_layers(model)
    if budget is not None and meet_budget:
        asked = costs(model, budget, workload)
        sets = active_sets(layers)
        missed = [cost for cost in asked if not cost.is_met(sets)]
        if missed:
            hard, cost = [name for name, layer in layers.items() if layer.stage == "hard"], missed[0]
            if hard:
                raise ValueError(
                    f"expected budget of at least {cost.of(sets):.4g} {cost.budget.unit}, got {cost.budget}: "
                    f"{hard[0]} is hard"
                )
            scheme = repair(sets, gate_scores(layers), asked)
            for name, layer in layers.items():
                layer.close_gates_(scheme[name])
    soft = report(model, budget, workload)
    for layer in layers.values():
        others = followers(model, layer)
        layer.harden_()
        for follower in others:
            follower.follow_(layer)
    if data is not None:
        device = next(iter(layers.values())).scale.device
        optim.swa_utils.update_bn(data, model, device=device)
    hard_report = report(model, budget, workload)
    for before, after in zip(soft.layers, hard_report.layers, strict=True):
        after.gap, after.undecided = before.gap, before.undecided
    return hard_report
