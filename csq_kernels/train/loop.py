"""The training loop of ``csq train``: a float baseline, then one ``Search`` from soft bits to exact integers.

Data order and augmentation are functions of the seed and the step, and a checkpoint holds the rest: on the CPU, two
runs with one seed are equal bit for bit, and so is a run that was killed and resumed.
"""

import copy
import json
import math
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import csq_kernels as csq
from csq_kernels.files import write_atomically
from csq_kernels.train import checkpoint, data, models, runs

if TYPE_CHECKING:
    from csq_kernels.train.recipe import Checkpoint, Recipe

METRICS = "metrics.jsonl"
PACKED = "model.safetensors"
# Batches for batch-norm statistics: of the final models, and after each epoch of the search.
FINAL_STATISTICS, SEARCH_STATISTICS = 100, 20
# What a resumed run may change without becoming another run.
_CHANGEABLE = ("checkpoint.", "data.root", "data.workers")
# Numbers that keep the random streams apart.
_ORDER, _AUGMENT, _STATISTICS = 0, 1, 2


class TrainingError(RuntimeError):
    """Training cannot go on, or cannot start; the message says why and what to do."""


class TimeUpError(Exception):
    """The time given to a run is over; its checkpoint is written."""


class Display:
    """Receives what happens in a run. This one shows nothing."""

    def note(self, text: str) -> None:
        """Something to say once."""

    def update(self, record: dict[str, Any]) -> None:
        """A line of metrics.jsonl."""


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


def _generator(seed: int, *path: int) -> torch.Generator:
    """A stream of its own for each purpose and step, so that a resumed run draws what the uninterrupted one draws."""
    word = np.random.SeedSequence([seed, *path]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))


def _optimizer(recipe: "Recipe", model: nn.Module, quantized: bool) -> torch.optim.Optimizer:
    options = recipe.optimizer
    lr = options.csq_lr if quantized and options.csq_lr is not None else options.lr
    rates: dict[str, Any] = {"logit_lr": options.logit_lr, "gate_lr": options.gate_lr, "scale_lr": options.scale_lr}
    rule: dict[str, Any] = {"lr": lr}
    if options.name == "sgd":
        rule |= {"momentum": options.momentum, "nesterov": options.momentum > 0}
    optimizer: torch.optim.Optimizer
    if quantized and options.step != "separate":
        single_pass = csq.optim.AdamW if options.name == "adamw" else csq.optim.SGD
        state: dict[str, Any] = {"narrow": options.step == "narrow", "seed": recipe.seed}
        optimizer = single_pass(model, weight_decay=options.weight_decay, **rule, **rates, **state)
    else:
        stock = torch.optim.AdamW if options.name == "adamw" else torch.optim.SGD
        optimizer = stock(csq.param_groups(model, lr, options.weight_decay, **rates), **rule)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


class _Clock:
    """Seconds spent in a run, across interruptions, and the moments to save and to stop."""

    def __init__(self, spent: float, max_minutes: float | None):
        self._start = time.monotonic() - spent
        self._saved = time.monotonic()
        self._end = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def saved(self) -> None:
        self._saved = time.monotonic()

    def save_is_due(self, options: "Checkpoint", step: int) -> bool:
        by_step = options.steps is not None and step % options.steps == 0
        return by_step or time.monotonic() - self._saved >= 60 * options.minutes

    def time_is_up(self) -> bool:
        return time.monotonic() >= self._end


@dataclass
class _Run:
    """What every phase of one run shares: recipe, data, model, folder, clock, results so far."""

    recipe: "Recipe"
    out: Path
    dataset: data.Dataset
    model: nn.Module
    device: torch.device
    display: Display
    clock: _Clock
    results: dict[str, float]

    @property
    def steps_per_epoch(self) -> int:
        return self.dataset.train_size // self.recipe.batch_size

    @property
    def float_steps(self) -> int:
        return self.recipe.epochs.float_ * self.steps_per_epoch

    @property
    def csq_steps(self) -> int:
        return (self.recipe.epochs.search + self.recipe.epochs.finetune) * self.steps_per_epoch

    def statistics_batches(self, count: int) -> Iterator[Tensor]:
        """Training inputs without augmentation, in batches like those of training."""
        # Shuffled: files are often sorted by label, and the statistics are an average over batches.
        order = torch.randperm(self.dataset.train_size, generator=_generator(self.recipe.seed, _STATISTICS))
        size = self.recipe.batch_size
        batches = order[: self.steps_per_epoch * size].split(size)[:count]
        return (inputs for inputs, _ in self.dataset.train_batches((index, None) for index in batches))

    def estimate_statistics(self, count: int) -> None:
        """Estimate the batch-norm statistics again, from ``count`` batches."""
        torch.optim.swa_utils.update_bn(self.statistics_batches(count), self.model)

    def save(self, phase: str, step: int, optimizer=None, search=None, window: Tensor | None = None) -> None:
        rng = [torch.get_rng_state()]
        if self.device.type == "cuda":
            rng.append(torch.cuda.get_rng_state(self.device))
        state = {
            "phase": phase,
            "step": step,
            "model": self.model.state_dict(),
            "optimizer": None if optimizer is None else optimizer.state_dict(),
            "search": None if search is None else search.state_dict(),
            "window": window,
            "rng": rng,
            "results": self.results,
            "seconds": self.clock.seconds(),
            "recipe": self.recipe.dump(),
            "data_options": self.dataset.options,
        }
        checkpoint.save(self.out, state)
        self.clock.saved()


def _search(run: _Run, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> csq.Search:
    epochs = run.recipe.epochs
    return csq.Search(
        model,
        budget=run.recipe.budget,
        total_steps=run.csq_steps,
        optimizer=optimizer,
        search_share=epochs.search / (epochs.search + epochs.finetune),
        **run.recipe.search.model_dump(),
    )


def _check_quantization(run: _Run) -> None:
    """Raise ``TrainingError`` for rules or a budget that do not fit the model, now and not after the float phase."""
    copied = copy.deepcopy(run.model)
    try:
        csq.prepare_(copied, run.recipe.quantization.config())
        _search(run, copied, None)
    except ValueError as error:
        raise TrainingError(str(error)) from None


def _restore(state: dict[str, Any], run: _Run, optimizer, search) -> Tensor:
    """Put the rest of a checkpoint in place, once the model holds its part; return the running sums of the metrics."""
    optimizer.load_state_dict(state["optimizer"])
    if search is not None:
        search.load_state_dict(state["search"])
    torch.set_rng_state(state["rng"][0])
    if run.device.type == "cuda":
        torch.cuda.set_rng_state(state["rng"][1], run.device)
    return state["window"].to(run.device)


def _requests(run: _Run, phase_number: int, first: int, total: int) -> Iterator[data.Request]:
    """What the steps of a phase train on, as functions of seed and step: data sets on disk read ahead of them."""
    size, seed = run.recipe.batch_size, run.recipe.seed
    order = torch.empty(0, dtype=torch.int64)
    for step in range(first, total):
        epoch, position = divmod(step, run.steps_per_epoch)
        if position == 0 or step == first:
            order = torch.randperm(run.dataset.train_size, generator=_generator(seed, _ORDER, phase_number, epoch))
        yield order[position * size : (position + 1) * size], _generator(seed, _AUGMENT, phase_number, step)


def _train_phase(run: _Run, phase: str, optimizer, search, state: dict[str, Any] | None) -> None:
    """Train for the steps of ``phase`` (``float`` or ``csq``), from ``state`` on if it is given."""
    recipe, model, dataset = run.recipe, run.model, run.dataset
    phase_number = ("float", "csq").index(phase)
    total = run.float_steps if search is None else run.csq_steps
    # Loss, right predictions and all since the last line of metrics. On the device: nothing waits for it in between.
    window = torch.zeros(3, dtype=torch.float64, device=run.device)
    first = 0
    if state is not None:
        first = state["step"]
        window = _restore(state, run, optimizer, search)
    else:
        run.save(phase, 0, optimizer, search, window)
    batches = dataset.train_batches(_requests(run, phase_number, first, total))
    model.train()
    with open(run.out / METRICS, "a") as metrics:
        for step in range(first, total):
            stage = "float" if search is None else search.stage
            inputs, labels = next(batches)

            begin, end = _stage_steps(stage, search, total)
            factor = lr_factor(recipe.schedule.name, step - begin, end - begin, recipe.schedule.warmup)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

            logits = model(inputs)
            task = F.cross_entropy(logits, labels, label_smoothing=recipe.label_smoothing)
            loss = task if search is None else task + search.penalty()
            optimizer.zero_grad()
            loss.backward()
            if recipe.clip_grad_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
            optimizer.step()
            if search is not None:
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
            time_is_up = run.clock.time_is_up()
            if time_is_up or done == total or run.clock.save_is_due(recipe.checkpoint, done):
                os.fsync(metrics.fileno())
                run.save(phase, done, optimizer, search, window)
            if time_is_up:
                raise TimeUpError(f"stopped after step {done} of {total} of the {phase} phase")


def _stage_steps(stage: str, search, total: int) -> tuple[int, int]:
    """First step of the stage and first step after it: the schedule starts anew with each stage."""
    if stage == "search":
        return 0, search.search_steps
    return (0, total) if stage == "float" else (search.search_steps, total)


def _record(run: _Run, phase: str, stage: str, done: int, window: Tensor, factor: float, search) -> dict[str, Any]:
    loss, correct, samples = window.tolist()
    if not math.isfinite(loss):
        raise TrainingError(
            f"the loss is not finite at step {done} of the {phase} phase; lower optimizer.lr or set clip_grad_norm"
        )
    before = 0 if phase == "float" else run.float_steps
    record = {
        "iteration": before + done,
        "total_iterations": run.float_steps + run.csq_steps,
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
    record["seconds"] = round(run.clock.seconds(), 2)
    return record


def _truncate_metrics(path: Path, iteration: int) -> None:
    """Drop the lines after ``iteration``, which the resumed run writes again, and a half-written one."""
    kept = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["iteration"] > iteration:
            break
        kept.append(line + "\n")
    write_atomically(path, lambda file: file.write("".join(kept).encode()))


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + str(key): value}
    return flat


def _check_same_recipe(old: dict[str, Any], new: dict[str, Any], out: Path) -> None:
    before, after = _flat(old), _flat(new)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and not key.startswith(_CHANGEABLE):
            raise TrainingError(
                f"expected {key}={before.get(key)!r}, with which {out} was started, got {key}={after.get(key)!r}"
            )


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, for environment.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "numpy": np.__version__,
        "device": str(device),
        "device_name": name,
        "csq_kernels": csq.info(),
    }


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise TrainingError(f"expected device as one that works here, got {name!r}: {reason}") from None
    return device


def train(
    recipe: "Recipe",
    out: Path,
    *,
    resume: bool = False,
    device: str = "cpu",
    max_minutes: float | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Run a recipe and leave checkpoint, metrics and report in the folder ``out``.

    Args:
        recipe: what to train; any object with the attributes of ``recipe.Recipe``.
        out: folder of the run, made when missing.
        resume: go on from the checkpoint in ``out``.
        device: a torch device.
        max_minutes: stop after so many minutes, with a checkpoint.
        display: receives progress.

    Returns:
        The content of ``report.json``: accuracies (float, soft, hard) and the scheme.

    Raises:
        TrainingError, checkpoint.CheckpointError, data.DataNotFoundError, data.DataError: with a message for the user.
        TimeUpError: ``max_minutes`` are over.
    """
    display = display or Display()
    torch_device = _device(device)
    if torch_device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    state = checkpoint.load(out) if resume else None
    if state is None and (out / checkpoint.NAME).exists():
        raise TrainingError(
            f"expected a new folder, got {out} with a run; go on with it with --resume, or choose another"
        )
    if state is not None:
        _check_same_recipe(state["recipe"], recipe.dump(), out)
        if state["phase"] == "done":
            return json.loads((out / "report.json").read_text())

    dataset = runs.load_data(recipe, state).to(torch_device)
    if recipe.batch_size > dataset.train_size:
        raise TrainingError(f"expected batch_size of at most {dataset.train_size}, got {recipe.batch_size}")
    torch.manual_seed(recipe.seed)
    try:
        model = models.build(recipe.model.name, *dataset.sizes, **recipe.model.options)
    except ValueError as error:
        raise TrainingError(str(error)) from None
    # Convolutions of images are a quarter to a third faster with the channels last.
    model.to(torch_device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    clock = _Clock(0.0 if state is None else state["seconds"], max_minutes)
    run = _Run(recipe, out, dataset, model, torch_device, display, clock, {} if state is None else state["results"])
    _check_quantization(run)
    out.mkdir(parents=True, exist_ok=True)
    _write_text(out / "recipe.yaml", recipe.to_yaml())
    _write_text(out / "environment.json", json.dumps(environment(torch_device), indent=2) + "\n")
    done_before = 0
    if state is not None:
        done_before = state["step"] + (run.float_steps if state["phase"] == "csq" else 0)
        display.note(f"resumed {out} after {done_before} of {run.float_steps + run.csq_steps} steps")
    _truncate_metrics(out / METRICS, done_before)

    if run.float_steps and (state is None or state["phase"] == "float"):
        if state is not None:
            model.load_state_dict(state["model"])
        _train_phase(run, "float", _optimizer(recipe, model, quantized=False), None, state)
        _measure(run, "float")
        display.note(f"float accuracy {run.results['float_accuracy']:.2%}")
        state = None

    plan = csq.prepare_(model, recipe.quantization.config())
    if state is None:
        display.note(str(plan))
    else:
        model.load_state_dict(state["model"])
    # After the model's state: it decides which planes there are to optimize.
    optimizer = _optimizer(recipe, model, quantized=True)
    _train_phase(run, "csq", optimizer, _search(run, model, optimizer), state)
    return _finish(run)


def _measure(run: _Run, kind: str) -> None:
    """Put accuracy and loss on the test samples among the results."""
    run.results[f"{kind}_accuracy"], run.results[f"{kind}_loss"] = runs.evaluate(run.model, run.dataset)


def _finish(run: _Run) -> dict[str, Any]:
    """Measure the soft model, make the integers, measure them, write the packed file and the report."""
    # Both are measured with statistics of their own, estimated alike: what differs are the bits alone.
    run.estimate_statistics(FINAL_STATISTICS)
    _measure(run, "soft")
    report = csq.finalize_(run.model, data=run.statistics_batches(FINAL_STATISTICS), budget=run.recipe.budget)
    _measure(run, "hard")
    seconds = round(run.clock.seconds(), 1)
    packed = copy.deepcopy(run.model)
    csq.pack_(packed)
    size = csq.save_packed(packed, run.out / PACKED, runs.describe(run.recipe, run.dataset)).file_bytes
    result = {"recipe": run.recipe.name, "seconds": seconds, **run.results, "file_bytes": size}
    result |= {"scheme": report.to_dict()}
    written = f"{PACKED} of {size:,} bytes, {report.bytes:,} were promised"
    _write_text(run.out / "report.txt", f"{report}\n{written}\n\n{_accuracies(run.results)}\n")
    _write_text(run.out / "report.json", json.dumps(result, indent=2) + "\n")
    run.save("done", run.csq_steps)
    return result


def _accuracies(results: dict[str, float]) -> str:
    """Accuracy and loss of each model there was, and how far the exact integers are from the soft bits."""
    names = {"float": "float", "soft": "soft", "hard": "exact-integer"}
    shown = [kind for kind in names if f"{kind}_accuracy" in results]
    lines = [f"{names[kind] + ' accuracy':<24}{results[f'{kind}_accuracy']:7.2%}" for kind in shown]
    lines += [f"{names[kind] + ' loss':<24}{results[f'{kind}_loss']:7.4f}" for kind in shown]
    points, nats = (abs(results[f"soft_{figure}"] - results[f"hard_{figure}"]) for figure in ("accuracy", "loss"))
    lines.append(f"soft/hard gap           {100 * points:6.2f}  points, {nats:.4f} of loss")
    return "\n".join(lines)
