"""Fit a run into the time it is given: time its steps, and shorten its stages alike."""

import copy
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import csq_kernels as csq
from csq_kernels.nn import CSQLayer
from csq_kernels.train import baselines, runs
from csq_kernels.train.phase import optimizer_for, search_for
from csq_kernels.train.running import Run, TrainingError

# Seconds of steps that are timed, and the share of the time that is planned for.
_TIMED_SECONDS, _PLANNED_SHARE = 3.0, 0.9


def _seconds_per_step(run: Run, optimizer, model: nn.Module, penalty: Callable[[], Tensor | float] = float) -> float:
    """Seconds a step takes with its share of what is measured once an epoch; the first step is left out."""
    counted, start = -1, time.monotonic()
    while counted < 2 or time.monotonic() - start < _TIMED_SECONDS:
        if counted == 0:
            start = time.monotonic()
        inputs, labels = next(run.dataset.train_batches([(torch.arange(run.recipe.batch_size), None)]))
        with run.autocast():
            loss = F.cross_entropy(model(inputs).float(), labels) + penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        counted += 1
    step, start = (time.monotonic() - start) / counted, time.monotonic()
    runs.evaluate(model, run.dataset)
    if any(isinstance(module, CSQLayer) for module in model.modules()):
        run.measure_hard(model)
    return step + (time.monotonic() - start) / run.steps_per_epoch


def fit_into_time(run: Run, shorten: bool) -> None:
    """Time steps on copies of the model, and shorten the stages until they fit into the time that is left."""
    recipe, steps, config = run.recipe, run.steps, run.recipe.quantization.config()
    with torch.random.fork_rng():
        start = time.monotonic()
        runs.evaluate(run.model, run.dataset)
        # Statistics, evaluations and files at the end take about as long as four evaluations.
        run.seconds_to_finish = 4 * (time.monotonic() - start)
        if not shorten:
            return
        needed = 0.0
        if steps.float_:
            copied = copy.deepcopy(run.model)
            optimizer = optimizer_for(recipe, copied, quantized=False)
            needed += steps.float_ * _seconds_per_step(run, optimizer, copied)
        if steps.quantized:
            copied = copy.deepcopy(run.model)
            penalty: Callable[[], Tensor | float] = float
            if recipe.method == "csq":
                csq.prepare_(copied, config)
                penalty = search_for(run, copied, None).penalty
            else:
                baselines.learn_steps_(copied, recipe.bits, config)
            optimizer = optimizer_for(recipe, copied, quantized=True)
            needed += steps.quantized * _seconds_per_step(run, optimizer, copied, penalty)
    left = run.clock.seconds_left() - run.seconds_to_finish
    if left <= 0:
        raise TrainingError(f"expected max_minutes that leave time to train, got {-left / 60:.1f} minutes too few")
    if needed > _PLANNED_SHARE * left:
        run.steps = steps.shortened(_PLANNED_SHARE * left / needed)
        run.display.note(
            f"{needed / 60:.1f} minutes would be needed: trains {run.steps.total} of {steps.total} steps to end in time"
        )
