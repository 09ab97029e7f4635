"""One search inside a trainer that owns the loop: what the callbacks of every framework do at its hooks."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from csq_kernels.budget import Budget
from csq_kernels.nn.layer import Config
from csq_kernels.nn.prepare import Plan, csq_layers, prepare_
from csq_kernels.optim import SinglePassOptimizer
from csq_kernels.report import Report
from csq_kernels.search import Search, finalize_

METRICS = ("stored_bits", "paper_bits", "temperature", "gap")


class Session:
    """``prepare_``, ``Search`` and ``finalize_`` of one run, in the order in which a trainer reaches its hooks.

    Attributes:
        search: the search, once training has begun.
        plan: what ``prepare_`` did; None if the model came prepared.
        report: the finished scheme, once training has ended.
    """

    def __init__(self, budget: str | Budget, config: Config | None, finalize: bool, options: Mapping[str, Any]):
        self.budget = Budget.parse(budget)
        self.config = config
        self.finalize = finalize
        self.options = dict(options)
        self.search: Search | None = None
        self.plan: Plan | None = None
        self.report: Report | None = None

    def prepare(self, model: nn.Module) -> None:
        """Prepare ``model`` unless it is; before its optimizer is built and a checkpoint is loaded into it."""
        if not csq_layers(model):
            self.plan = prepare_(model, self.config)

    def begin(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, total_steps: int, state: Mapping[str, Any] | None
    ) -> None:
        """Build the search; go on from ``state`` if there is one, the model's and the optimizer's being loaded.

        Raises:
            ValueError: the optimizer does not step a CSQ layer, or decays one, or the scheme is fixed already.
        """
        _check_optimizer(model, optimizer)
        if state is None:
            for name, layer in csq_layers(model).items():
                if layer.stage != "search":
                    raise ValueError(
                        f"expected {name} in the search stage, got it in the {layer.stage} stage: a run begins with "
                        "float weights, or goes on from a checkpoint of its trainer"
                    )
        # The buckets of DistributedDataParallel cannot change: a torch optimizer keeps the planes that were pruned.
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        known = optimizer if alone or isinstance(optimizer, SinglePassOptimizer) else None
        self.search = Search(model, self.budget, total_steps, optimizer=known, **self.options)
        if state is not None:
            self.search.load_state_dict(state)

    def add_penalty_gradient(self) -> None:
        """Add the gradient of ``penalty()`` to that of the task, as if it had been part of the loss.

        To be called once before each optimizer step, however many batches it takes. Every process computes the same.
        """
        assert self.search is not None
        penalty = self.search.penalty()
        if penalty.requires_grad:
            penalty.backward()

    def step(self) -> None:
        """Advance the search; after each optimizer step."""
        assert self.search is not None
        self.search.step()

    def metrics(self) -> dict[str, float]:
        """What to log, under names that begin with ``csq/``."""
        assert self.search is not None
        progress = self.search.progress()
        return {f"csq/{name}": float(progress[name]) for name in METRICS}

    def finish(self, model: nn.Module) -> None:
        """Make the integers, if that was asked for and the search has come to its end."""
        assert self.search is not None
        done, total = self.search.steps_done, self.search.total_steps
        if self.finalize and done < total:
            warnings.warn(
                f"training stopped after {done} of {total} steps, so the bits are not decided and no integers were "
                "made: resume it, or call csq_kernels.finalize_",
                stacklevel=2,
            )
        elif self.finalize:
            self.report = finalize_(model, budget=self.budget)

    def state_dict(self) -> dict[str, float | int]:
        """The search's state as plain numbers, for checkpoints in any format."""
        assert self.search is not None
        return {name: torch.as_tensor(value).item() for name, value in self.search.state_dict().items()}


def _check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    advice = "use csq_kernels.optim, or csq_kernels.param_groups with an optimizer of torch"
    # The single-pass optimizers step the leaf in place of the logits, and its decay is that of the weight.
    decays_weight = isinstance(optimizer, SinglePassOptimizer) and optimizer.decays_bits
    decay = {id(tensor): group.get("weight_decay", 0) for group in optimizer.param_groups for tensor in group["params"]}
    for name, layer in csq_layers(model).items():
        for kind, tensor in layer.trained_tensors().items():
            if not tensor.requires_grad:
                continue
            if id(tensor) not in decay:
                raise ValueError(f"expected optimizer with {kind} of {name}, got one made before prepare_: {advice}")
            if decay[id(tensor)] and not (decays_weight and kind == "bit_logits"):
                raise ValueError(
                    f"expected no weight decay on {kind} of {name}, got {decay[id(tensor)]:g}, which would pull it to "
                    f"the undecided point: {advice}"
                )
