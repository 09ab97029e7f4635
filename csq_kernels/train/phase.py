"""One phase of training: its optimizer, its search, and its steps."""

import json
import math
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import csq_kernels as csq
from csq_kernels.nn.prepare import csq_layers
from csq_kernels.train import data, runs
from csq_kernels.train.paper import PaperSearch
from csq_kernels.train.running import (
    AUGMENT,
    METRICS,
    ORDER,
    SEARCH_STATISTICS,
    Run,
    TimeUpError,
    TrainingError,
    generator,
)

if TYPE_CHECKING:
    from csq_kernels.train.recipe import Optimizer, Recipe


def lr_factor(schedule: str, step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate at ``step`` of ``steps``: a rise over the share ``warmup``, then a half cosine to 0.

    ``cosine`` rises linearly, ``onecycle`` along a half cosine from 1/25, ``constant`` rises linearly and stays.
    """
    rise = int(warmup * steps)
    if step < rise:
        if schedule == "onecycle":
            return 1 / 25 + (1 - 1 / 25) * (1 - math.cos(math.pi * step / rise)) / 2
        return (step + 1) / (rise + 1)
    if schedule == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - rise) / (steps - rise))) / 2


def _csq_options(recipe: "Recipe") -> "Optimizer":
    return recipe.csq_optimizer or recipe.optimizer


def optimizer_for(recipe: "Recipe", model: nn.Module, quantized: bool) -> torch.optim.Optimizer:
    # What is not a CSQ model is trained as the float model is, by torch.optim.
    quantized = quantized and recipe.method == "csq"
    options = _csq_options(recipe) if quantized else recipe.optimizer
    lr = options.lr
    rates: dict[str, Any] = {"logit_lr": options.logit_lr, "gate_lr": options.gate_lr, "scale_lr": options.scale_lr}
    rule: dict[str, Any] = {"lr": lr}
    if options.name == "sgd":
        rule |= {"momentum": options.momentum, "nesterov": options.momentum > 0}
    optimizer: torch.optim.Optimizer
    if quantized and recipe.preset == "paper":
        # One group: logits, gates and scales decay as well.
        optimizer = torch.optim.SGD(model.parameters(), lr, options.momentum, weight_decay=options.weight_decay)
    elif quantized and options.step != "separate":
        single_pass = {"sgd": csq.optim.SGD, "adam": csq.optim.Adam, "adamw": csq.optim.AdamW}[options.name]
        state: dict[str, Any] = {"narrow": options.step == "narrow", "seed": recipe.seed}
        optimizer = single_pass(model, weight_decay=options.weight_decay, **rule, **rates, **state)
    else:
        stock = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[options.name]
        optimizer = stock(csq.param_groups(model, lr, options.weight_decay, **rates), **rule)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def _loss_decay(recipe: "Recipe") -> float:
    """Decay of CSQ weights that the loss has to bring, as ``csq.optim`` brings it: torch optimizers step logits."""
    options = _csq_options(recipe)
    brought = options.step != "separate" or options.name == "adamw" or recipe.preset == "paper"
    return 0.0 if brought else options.weight_decay


def search_for(run: Run, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> csq.Search:
    steps = run.steps
    if run.recipe.preset == "paper":
        return PaperSearch(model, run.recipe.budget, steps.quantized, search_share=steps.search / steps.quantized)
    return csq.Search(
        model,
        budget=run.recipe.budget,
        total_steps=steps.quantized,
        optimizer=optimizer,
        search_share=steps.search / steps.quantized,
        workload=runs.load_workload(run.out, run.recipe),
        **run.recipe.search.model_dump(),
    )


def _restore(state: dict[str, Any], run: Run, optimizer, search) -> Tensor:
    """Put the rest of a checkpoint in place, once the model holds its part; return the running sums of the metrics."""
    optimizer.load_state_dict(state["optimizer"])
    if search is not None:
        search.load_state_dict(state["search"])
    torch.set_rng_state(state["rng"][0])
    if run.device.type == "cuda":
        torch.cuda.set_rng_state(state["rng"][1], run.device)
    return state["window"].to(run.device)


def _requests(run: Run, phase_number: int, first: int, total: int) -> Iterator[data.Request]:
    """What the steps of a phase train on, as functions of seed and step: data sets on disk read ahead of them."""
    size, seed = run.recipe.batch_size, run.recipe.seed
    order = torch.empty(0, dtype=torch.int64)
    for step in range(first, total):
        epoch, position = divmod(step, run.steps_per_epoch)
        if position == 0 or step == first:
            order = torch.randperm(run.dataset.train_size, generator=generator(seed, ORDER, phase_number, epoch))
        yield order[position * size : (position + 1) * size], generator(seed, AUGMENT, phase_number, step)


def train_phase(
    run: Run, phase: str, optimizer, search, state: dict[str, Any] | None, teacher: nn.Module | None = None
) -> None:
    """Train for the steps of ``phase`` (``float``, ``csq`` or ``lsq``), from ``state`` on if it is given."""
    recipe, model, dataset = run.recipe, run.model, run.dataset
    phase_number = 0 if phase == "float" else 1
    total = run.steps.float_ if phase == "float" else run.steps.quantized
    # Loss, right predictions and all since the last line of metrics. On the device: nothing waits for it in between.
    window = torch.zeros(3, dtype=torch.float64, device=run.device)
    first = 0
    if state is not None:
        first = state["step"]
        window = _restore(state, run, optimizer, search)
    else:
        run.save(phase, 0, optimizer, search, window)
    decay = _loss_decay(recipe)
    batches = dataset.train_batches(_requests(run, phase_number, first, total))
    model.train()
    with open(run.out / METRICS, "a") as metrics:
        for step in range(first, total):
            stage = phase if search is None else search.stage
            inputs, labels = next(batches)

            begin, end = _stage_steps(stage, search, total)
            factor = lr_factor(recipe.schedule.name, step - begin, end - begin, recipe.schedule.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

            with run.autocast():
                logits = model(inputs)
            logits = logits.float()
            task = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            loss = task if teacher is None else run.distil(task, logits, inputs, teacher)
            if search is not None:
                loss = loss + search.penalty()
                if decay:
                    loss = loss + decay * sum(layer.decay_term() for layer in csq_layers(model).values())
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
            optimizer.step()
            if search is not None:
                if stage == "search" and search.steps_done + 1 == search.search_steps:
                    run.save_searched()
                search.step()

            window[0] += task.detach() * labels.numel()
            window[1] += (logits.detach().argmax(1) == labels).sum()
            window[2] += labels.numel()
            done = step + 1
            if done % recipe.log_every == 0 or done % run.steps_per_epoch == 0:
                record = _record(run, phase, stage, done, window, factor, search)
                metrics.write(json.dumps(record) + "\n")
                metrics.flush()
                run.display.update(record)
                window = torch.zeros_like(window)
            pause = run.clock.pause_is_due()
            # The float phase is no end: what it gives can be gone on with.
            late = run.clock.seconds_left() < run.seconds_to_finish
            pause |= late and phase == "float" and done < total
            if pause or done == total or run.clock.save_is_due(recipe.checkpoint, done):
                _check_finite("loss is", [window], done, phase)
                _check_finite("weights are", model.parameters(), done, phase)
                os.fsync(metrics.fileno())
                run.save(phase, done, optimizer, search, window)
            if pause:
                raise TimeUpError(f"stopped after step {done} of {total} of the {phase} phase")
            if late and done < total:
                run.display.note(f"out of time after step {done} of {total} of the {phase} phase")
                if search is not None and search.stage == "search":
                    search.fix_scheme()
                return


def _stage_steps(stage: str, search, total: int) -> tuple[int, int]:
    """First step of the stage and first step after it: the schedule starts anew with each stage."""
    if stage == "search":
        return 0, search.search_steps
    return (0, total) if search is None else (search.search_steps, total)


def _check_finite(what: str, values: Iterable[Tensor], done: int, phase: str) -> None:
    """Raise ``TrainingError`` where neither a line of metrics nor a checkpoint would be worth keeping."""
    if not all(value.isfinite().all() for value in values):
        raise TrainingError(
            f"the {what} not finite at step {done} of the {phase} phase; lower optimizer.lr or set clip_grad_norm"
        )


def _record(run: Run, phase: str, stage: str, done: int, window: Tensor, factor: float, search) -> dict[str, Any]:
    _check_finite("loss is", [window], done, phase)
    loss, correct, samples = window.tolist()
    before = 0 if phase == "float" else run.steps.float_
    record = {
        "iteration": before + done,
        "total_iterations": run.steps.total,
        "phase": stage,
        "epoch": (before + done) / run.steps_per_epoch,
        "lr_factor": factor,
        "loss": loss / samples,
        "train_accuracy": correct / samples,
    }
    if done % run.steps_per_epoch == 0:
        if stage == "search":
            # A gate that has just closed leaves running statistics behind that fit no longer.
            run.estimate_statistics(SEARCH_STATISTICS)
        record["test_accuracy"], record["test_loss"] = runs.evaluate(run.model, run.dataset)
    if search is not None:
        progress = search.progress()
        record |= {key: progress[key] for key in ("temperature", "paper_bits", "stored_bits", "gap", "budget")}
        record["layer_bits"] = search.layer_bits()
        if "test_accuracy" in record and stage == "search":
            record["warnings"] = search.health()
    if search is not None and "test_accuracy" in record:
        record |= run.measure_hard(run.model)
    record["seconds"] = round(run.clock.seconds(), 2)
    return record
