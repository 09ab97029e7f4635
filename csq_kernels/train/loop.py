"""The training loop of ``csq train``: a float baseline, then one ``Search`` from soft bits to exact integers.

Data order and augmentation are functions of the seed and the step, and a checkpoint holds the rest: on the CPU, two
runs with one seed are equal bit for bit, and so is a run that was killed and resumed.
"""

import copy
import json
import math
import os
import pickle
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import csq_kernels as csq
from csq_kernels.files import remove_left_over, write_atomically
from csq_kernels.nn import CSQLayer
from csq_kernels.train import baselines, checkpoint, data, measure, models, runs
from csq_kernels.train.paper import PaperSearch

if TYPE_CHECKING:
    from csq_kernels.train.recipe import Checkpoint, Recipe

METRICS = "metrics.jsonl"
PACKED = "model.safetensors"
# The weights that CSQ starts from, and the teacher's.
FLOAT = "float.safetensors"
# The model at the end of its search, from which another budget can be met without searching again.
SEARCHED = "searched.pt"
# Seconds of steps that are timed before a run that must end in time, and the share of the time that is planned for.
_TIMED_SECONDS, _PLANNED_SHARE = 3.0, 0.9
# Batches for batch-norm statistics: of the final models, after each epoch of the search, and of the hard model that is
# measured after each epoch, whose accuracy 20 batches would move by 0.2 points at most.
FINAL_STATISTICS, SEARCH_STATISTICS, HARD_STATISTICS = 100, 20, 8
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
    # What is not a CSQ model is trained as the float model is, by torch.optim.
    quantized = quantized and recipe.method == "csq"
    options = recipe.csq_optimizer if quantized and recipe.csq_optimizer is not None else recipe.optimizer
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
    """Seconds spent in a run, across interruptions, and the moments to save, to pause and to come to an end."""

    def __init__(self, spent: float, pause_after: float | None, max_minutes: float | None):
        now = time.monotonic()
        self._start = now - spent
        self._saved = now
        self._pause = math.inf if pause_after is None else now + 60 * pause_after
        self.end = math.inf if max_minutes is None else self._start + 60 * max_minutes

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def saved(self) -> None:
        self._saved = time.monotonic()

    def save_is_due(self, options: "Checkpoint", step: int) -> bool:
        by_step = options.steps is not None and step % options.steps == 0
        return by_step or time.monotonic() - self._saved >= 60 * options.minutes

    def seconds_left(self) -> float:
        """Until the run must have ended, with a model."""
        return self.end - time.monotonic()

    def pause_is_due(self) -> bool:
        return time.monotonic() >= self._pause


@dataclass(frozen=True)
class Steps:
    """Optimizer steps of each stage; LSQ trains through both of the last."""

    float_: int
    search: int
    finetune: int

    @property
    def quantized(self) -> int:
        return self.search + self.finetune

    @property
    def total(self) -> int:
        return self.float_ + self.quantized

    def shortened(self, share: float) -> "Steps":
        """So much of each stage, and one step at least of a stage that has any."""
        return Steps(*(min(count, max(1, int(share * count))) for count in astuple(self)))


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
    steps: Steps = Steps(0, 0, 0)
    # Of the time that is left, for what comes after the last step.
    seconds_to_finish: float = 0.0

    @property
    def steps_per_epoch(self) -> int:
        return self.dataset.train_size // self.recipe.batch_size

    def planned_steps(self) -> Steps:
        """What the recipe asks for."""
        epochs, method = self.recipe.epochs, self.recipe.method
        stages = (epochs.float_, epochs.search, epochs.finetune)
        used = (
            self.recipe.search_from is None,
            method in ("csq", "lsq") and self.recipe.search_from is None,
            method in ("csq", "lsq"),
        )
        return Steps(*(count * self.steps_per_epoch * is_used for count, is_used in zip(stages, used, strict=True)))

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

    def autocast(self):
        """The precision of the forward pass in training."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.precision == "bfloat16")

    def distil(self, task: Tensor, logits: Tensor, images: Tensor, teacher: nn.Module) -> Tensor:
        """Mix the loss of the labels with the distance from the teacher's answers (Hinton et al. 2015)."""
        options = self.recipe.distillation
        assert options is not None
        with torch.no_grad(), self.autocast():
            wanted = (teacher(images).float() / options.temperature).log_softmax(1)
        student = (logits / options.temperature).log_softmax(1)
        distance = F.kl_div(student, wanted, reduction="none", log_target=True).sum(1).mean()
        return (1 - options.weight) * task + options.weight * options.temperature**2 * distance

    def load_float(self, path: Path) -> None:
        """Load float weights from a run's folder or a safetensors file."""
        file = path / FLOAT if path.is_dir() else path
        try:
            self.model.load_state_dict(safetensors.torch.load_file(file))
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise TrainingError(
                f"expected init with the weights of {self.recipe.model.name}, got {file}: {reason}"
            ) from None

    def save_packed(self, packed: nn.Module) -> int:
        """Write the packed file of a packed model and return its size."""
        return csq.save_packed(packed, self.out / PACKED, runs.describe(self.recipe, self.dataset)).file_bytes

    def save_float(self) -> None:
        state = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        write_atomically(self.out / FLOAT, lambda file: file.write(safetensors.torch.save(state)))

    def save_searched(self) -> None:
        state = {"model": self.model.state_dict(), "recipe": self.recipe.dump(), "results": self.results}
        checkpoint.write(self.out / SEARCHED, state)

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
            "steps": astuple(self.steps),
            "rng": rng,
            "results": self.results,
            "seconds": self.clock.seconds(),
            "recipe": self.recipe.dump(),
            "data_options": self.dataset.options,
        }
        checkpoint.save(self.out, state)
        self.clock.saved()


def _search(run: _Run, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> csq.Search:
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


def _seconds_per_step(run: _Run, optimizer, model: nn.Module, penalty: Callable[[], Tensor | float] = float) -> float:
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
        _measured(run, model)
    return step + (time.monotonic() - start) / run.steps_per_epoch


def _fit_into_time(run: _Run, shorten: bool) -> None:
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
            optimizer = _optimizer(recipe, copied, quantized=False)
            needed += steps.float_ * _seconds_per_step(run, optimizer, copied)
        if steps.quantized:
            copied = copy.deepcopy(run.model)
            penalty: Callable[[], Tensor | float] = float
            if recipe.method == "csq":
                csq.prepare_(copied, config)
                penalty = _search(run, copied, None).penalty
            else:
                baselines.learn_steps_(copied, recipe.bits, config)
            optimizer = _optimizer(recipe, copied, quantized=True)
            needed += steps.quantized * _seconds_per_step(run, optimizer, copied, penalty)
    left = run.clock.seconds_left() - run.seconds_to_finish
    if left <= 0:
        raise TrainingError(f"expected max_minutes that leave time to train, got {-left / 60:.1f} minutes too few")
    if needed > _PLANNED_SHARE * left:
        run.steps = steps.shortened(_PLANNED_SHARE * left / needed)
        run.display.note(
            f"{needed / 60:.1f} minutes would be needed: trains {run.steps.total} of {steps.total} steps to end in time"
        )


def _check_quantization(run: _Run) -> None:
    """Raise ``TrainingError`` for rules or a budget that do not fit the model, now and not after the float phase."""
    recipe, copied = run.recipe, copy.deepcopy(run.model)
    try:
        if recipe.method == "csq":
            csq.prepare_(copied, recipe.quantization.config())
            runs.keep_workload(run.out, recipe, copied, run.dataset)
            _search(run, copied, None)
        elif recipe.method != "float":
            baselines.round_(copied, recipe.bits, recipe.quantization.config())
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


def _train_phase(
    run: _Run, phase: str, optimizer, search, state: dict[str, Any] | None, teacher: nn.Module | None = None
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


def _measured(run: _Run, model: nn.Module) -> dict[str, Any]:
    """What an epoch of CSQ has come to."""
    batches = run.statistics_batches(HARD_STATISTICS)
    return measure.measure(model, batches, lambda hard: runs.evaluate(hard, run.dataset).accuracy)


def _check_finite(what: str, values: Iterable[Tensor], done: int, phase: str) -> None:
    """Raise ``TrainingError`` where neither a line of metrics nor a checkpoint would be worth keeping."""
    if not all(value.isfinite().all() for value in values):
        raise TrainingError(
            f"the {what} not finite at step {done} of the {phase} phase; lower optimizer.lr or set clip_grad_norm"
        )


def _record(run: _Run, phase: str, stage: str, done: int, window: Tensor, factor: float, search) -> dict[str, Any]:
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
        record |= _measured(run, run.model)
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


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A mapping of mappings as one with dotted keys.

    >>> flat({"optimizer": {"lr": 0.1}, "seed": 0})
    {'optimizer.lr': 0.1, 'seed': 0}
    """
    dotted: dict[str, Any] = {}
    for key, value in content.items():
        dotted |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + str(key): value}
    return dotted


def _check_same_recipe(old: dict[str, Any], new: dict[str, Any], out: Path) -> None:
    before, after = flat(old), flat(new)
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
    pause_after: float | None = None,
    display: Display | None = None,
) -> dict[str, Any]:
    """Run a recipe and leave checkpoint, metrics and report in the folder ``out``.

    Args:
        recipe: what to train; any object with the attributes of ``recipe.Recipe``.
        out: folder of the run, made when missing.
        resume: go on from the checkpoint in ``out``.
        device: a torch device.
        max_minutes: end within so many minutes, with a whole model: where the recipe would take longer, its stages are
            shortened alike before the start.
        pause_after: stop after so many minutes, with a checkpoint to go on from.
        display: receives progress.

    Returns:
        The content of ``report.json``: accuracies (float, soft, hard) and the scheme.

    Raises:
        TrainingError, checkpoint.CheckpointError, data.DataNotFoundError, data.DataError: with a message for the user.
        TimeUpError: ``pause_after`` minutes are over, or ``max_minutes`` before the float model was trained.
    """
    display = display or Display()
    torch_device = _device(device)
    if torch_device.type == "cuda":
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.benchmark = False
    state = checkpoint.load(out) if resume else None
    if state is None and checkpoint.exists(out):
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
    clock = _Clock(0.0 if state is None else state["seconds"], pause_after, max_minutes)
    run = _Run(recipe, out, dataset, model, torch_device, display, clock, {} if state is None else state["results"])
    run.steps = run.planned_steps() if state is None else Steps(*state["steps"])
    _check_quantization(run)
    if max_minutes is not None:
        _fit_into_time(run, shorten=state is None)
    out.mkdir(parents=True, exist_ok=True)
    remove_left_over(out)
    _write_text(out / "recipe.yaml", recipe.to_yaml())
    _write_text(out / "environment.json", json.dumps(environment(torch_device), indent=2) + "\n")
    done_before = 0
    if state is not None:
        done_before = state["step"] + (run.steps.float_ if state["phase"] != "float" else 0)
        display.note(f"resumed {out} after {done_before} of {run.steps.total} steps")
    _truncate_metrics(out / METRICS, done_before)

    if state is None or state["phase"] == "float":
        if state is not None:
            model.load_state_dict(state["model"])
        elif recipe.init is not None:
            run.load_float(Path(recipe.init).expanduser())
        if run.steps.float_:
            _train_phase(run, "float", _optimizer(recipe, model, quantized=False), None, state)
        if run.steps.float_ or recipe.init is not None:
            _measure(run, "float")
            run.save_float()
            display.note(f"float accuracy {run.results['float_accuracy']:.2%}")
        state = None

    if recipe.method == "csq":
        return _train_csq(run, state)
    return _train_baseline(run, state)


def _teacher(run: _Run) -> nn.Module | None:
    """The float model of this run, if it is to teach."""
    if run.recipe.distillation is None:
        return None
    teacher = models.build(run.recipe.model.name, *run.dataset.sizes, **run.recipe.model.options)
    folder = run.out if run.recipe.search_from is None else Path(run.recipe.search_from).expanduser()
    try:
        teacher.load_state_dict(safetensors.torch.load_file(folder / FLOAT))
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        raise TrainingError(f"expected the teacher's weights, got {folder / FLOAT}: {error}") from None
    return teacher.to(run.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]


def _load_searched(run: _Run, folder: Path) -> None:
    """Take the model as another run's search left it."""
    file = folder / SEARCHED
    try:
        state = torch.load(file, map_location=run.device, weights_only=True)
        run.model.load_state_dict(state["model"])
    except (OSError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TrainingError(
            f"expected search_from with a search of {run.recipe.model.name}, got {file}: {reason}"
        ) from None
    run.results |= {key: value for key, value in state["results"].items() if key.startswith("float_")}


def _measure(run: _Run, kind: str) -> None:
    """Put accuracy and loss on the test samples among the results."""
    run.results[f"{kind}_accuracy"], run.results[f"{kind}_loss"] = runs.evaluate(run.model, run.dataset)


def _train_csq(run: _Run, state: dict[str, Any] | None) -> dict[str, Any]:
    recipe, model = run.recipe, run.model
    plan = csq.prepare_(model, recipe.quantization.config())
    if state is not None:
        model.load_state_dict(state["model"])
    elif recipe.search_from is not None:
        _load_searched(run, Path(recipe.search_from).expanduser())
    else:
        run.display.note(str(plan))
    # After the model's state: it decides which planes there are to optimize.
    optimizer = _optimizer(recipe, model, quantized=True)
    search = _search(run, model, optimizer)
    if state is None and isinstance(search, PaperSearch):
        search.restart_()
    if state is None and recipe.search_from is not None:
        search.fix_scheme()
    _train_phase(run, "csq", optimizer, search, state, _teacher(run))
    # Both are measured with statistics of their own, estimated alike: what differs are the bits alone.
    run.estimate_statistics(FINAL_STATISTICS)
    _measure(run, "soft")
    statistics = run.statistics_batches(FINAL_STATISTICS)
    report = csq.finalize_(
        model,
        data=statistics,
        budget=recipe.budget,
        meet_budget=recipe.preset is None,
        workload=runs.load_workload(run.out, recipe),
    )
    _measure(run, "hard")
    packed = copy.deepcopy(model)
    csq.pack_(packed)
    size = run.save_packed(packed)
    text = f"{report}\n{PACKED} of {size:,} bytes, {report.bytes:,} were promised"
    return _finish(run, report.to_dict(), text, size)


def _train_baseline(run: _Run, state: dict[str, Any] | None) -> dict[str, Any]:
    recipe, model = run.recipe, run.model
    if recipe.method == "float":
        for figure in ("accuracy", "loss"):
            run.results[f"hard_{figure}"] = run.results[f"float_{figure}"]
        return _finish(run, None, "float", (run.out / FLOAT).stat().st_size)
    if recipe.method == "lsq":
        baselines.learn_steps_(model, recipe.bits, recipe.quantization.config())
        if state is not None:
            model.load_state_dict(state["model"])
        _train_phase(run, "lsq", _optimizer(recipe, model, quantized=True), None, state, _teacher(run))
        run.estimate_statistics(FINAL_STATISTICS)
        _measure(run, "soft")
        baselines.pack_learnt_(model, recipe.bits)
    else:
        baselines.round_(model, recipe.bits, recipe.quantization.config())
    run.estimate_statistics(FINAL_STATISTICS)
    _measure(run, "hard")
    size = run.save_packed(model)
    scheme = baselines.scheme(model, size)
    return _finish(run, scheme.to_dict(), f"{scheme}\n{PACKED} of {size:,} bytes", size)


def _finish(run: _Run, scheme: dict[str, Any] | None, text: str, size: int) -> dict[str, Any]:
    """Write the report, and mark the run as done."""
    recipe = run.recipe
    seconds = round(run.clock.seconds(), 1)
    result = {"recipe": recipe.name, "method": recipe.method, "seed": recipe.seed, "seconds": seconds}
    result |= {**run.results, "file_bytes": size, "scheme": scheme}
    _write_text(run.out / "report.txt", f"{text}\n\n{_accuracies(run.results)}\n")
    _write_text(run.out / "report.json", json.dumps(result, indent=2) + "\n")
    run.save("done", run.steps.quantized)
    return result


def _accuracies(results: dict[str, float]) -> str:
    """Accuracy and loss of each model there was, and how far the exact integers are from the soft bits."""
    names = {"float": "float", "soft": "soft", "hard": "exact-integer"}
    shown = [kind for kind in names if f"{kind}_accuracy" in results]
    lines = [f"{names[kind] + ' accuracy':<24}{results[f'{kind}_accuracy']:7.2%}" for kind in shown]
    lines += [f"{names[kind] + ' loss':<24}{results[f'{kind}_loss']:7.4f}" for kind in shown]
    if "soft_accuracy" in results:
        points, nats = (abs(results[f"soft_{figure}"] - results[f"hard_{figure}"]) for figure in ("accuracy", "loss"))
        lines.append(f"soft/hard gap           {100 * points:6.2f}  points, {nats:.4f} of loss")
    return "\n".join(lines)
