"""A run in progress: its folder, clock, data and model, and what a checkpoint of it holds."""

import math
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import csq_kernels as csq
from csq_kernels.files import write_atomically
from csq_kernels.train import checkpoint, data, measure, runs

if TYPE_CHECKING:
    from csq_kernels.train.recipe import Checkpoint, Recipe

METRICS = "metrics.jsonl"
PACKED = "model.safetensors"
# The weights that CSQ starts from, and the teacher's.
FLOAT = "float.safetensors"
# The model at the end of its search, from which another budget can be met without searching again.
SEARCHED = "searched.pt"
# Batches for batch-norm statistics: of the final models, after each epoch of the search, and of the hard model that is
# measured after each epoch, whose accuracy 20 batches would move by 0.2 points at most.
FINAL_STATISTICS, SEARCH_STATISTICS, HARD_STATISTICS = 100, 20, 8
# Numbers that keep the random streams apart.
ORDER, AUGMENT, STATISTICS = 0, 1, 2


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


def generator(seed: int, *path: int) -> torch.Generator:
    """A stream of its own for each purpose and step, so that a resumed run draws what the uninterrupted one draws."""
    word = np.random.SeedSequence([seed, *path]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(word >> np.uint64(1)))


class Clock:
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
class Run:
    """What every phase of one run shares: recipe, data, model, folder, clock, results so far."""

    recipe: "Recipe"
    out: Path
    dataset: data.Dataset
    model: nn.Module
    device: torch.device
    display: Display
    clock: Clock
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
        order = torch.randperm(self.dataset.train_size, generator=generator(self.recipe.seed, STATISTICS))
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

    def measure(self, kind: str) -> None:
        """Put accuracy and loss on the test samples among the results."""
        self.results[f"{kind}_accuracy"], self.results[f"{kind}_loss"] = runs.evaluate(self.model, self.dataset)

    def measure_hard(self, model: nn.Module) -> dict[str, Any]:
        """What an epoch of CSQ has come to: the integers that its bits would be, and how far they are from them."""
        batches = self.statistics_batches(HARD_STATISTICS)
        return measure.measure(model, batches, lambda hard: runs.evaluate(hard, self.dataset).accuracy)
