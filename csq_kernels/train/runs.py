"""What a run leaves behind: load a finished one, build the network of its packed file, compare and measure them."""

import copy
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import csq_kernels as csq
from csq_kernels import table
from csq_kernels._ops import PRECISIONS
from csq_kernels.files import write_text_atomically
from csq_kernels.nn import CSQLayer, PackedLayer
from csq_kernels.train import checkpoint, data, models

if TYPE_CHECKING:
    from csq_kernels.train.recipe import Recipe

EVALUATION_BATCH = 500
# What one test sample costs in a network of a run whose budget is in bit operations or milliseconds.
WORKLOAD = "workload.json"
# Samples at once, and seconds spent, when a network is timed.
_TIMED_BATCHES, _TIMED_SECONDS = (1, 100), 0.3


class RunError(ValueError):
    """A run is not finished, or a run or file does not say how to build its network; the message says what is wrong."""


@dataclass
class FinishedRun:
    """What a run was and what came out of it: a hard CSQ model in evaluation mode."""

    recipe: "Recipe"
    dataset: data.Dataset
    model: nn.Module


def load(path: Path, data_root: Path | None = None) -> FinishedRun:
    """Rebuild the hard model of a finished run from its folder or its checkpoint file.

    Raises:
        RunError: the run is not finished.
        checkpoint.CheckpointError, data.DataNotFoundError, data.DataError: with a message for the user.
    """
    from csq_kernels.train import recipe as recipes

    state = checkpoint.load(path) if path.is_dir() else checkpoint.read(path)
    if state["phase"] != "done":
        raise RunError(f"expected a finished run, got {path}; finish it with csq train ... --resume")
    try:
        recipe = recipes.make(state["recipe"], str(path))
    except recipes.RecipeError as error:
        raise RunError(str(error)) from None
    dataset = load_data(recipe, state, data_root)
    model = models.build(recipe.model.name, *dataset.sizes, **recipe.model.options)
    csq.prepare_(model, recipe.quantization.config())
    model.load_state_dict(state["model"])
    return FinishedRun(recipe, dataset, model.eval())


def load_data(recipe: "Recipe", state: dict[str, Any] | None, root: Path | None = None) -> data.Dataset:
    """The data set of a recipe; if there is the ``state`` of a checkpoint, with the vocabulary of that run.

    Raises:
        data.DataNotFoundError, data.DataError: with a message for the user.
    """
    options = recipe.data.options() | ({} if state is None else state.get("data_options", {}))
    return data.load(recipe.data.name, recipe.data.root if root is None else root, **options)


def describe(recipe: "Recipe", dataset: data.Dataset) -> dict[str, Any]:
    """What a packed file says besides its tensors: how to build the network, and what it was trained on."""
    description = {
        "model": recipe.model.name,
        "options": recipe.model.options,
        "sizes": list(dataset.sizes),
        "data": recipe.data.name,
    }
    # Most sets have none, and small files count every byte.
    return description | ({"data_options": dataset.options} if dataset.options else {})


def network(description: dict[str, Any]) -> nn.Module:
    """Build the network that ``describe`` described, on the meta device and in evaluation mode, for ``load_packed``.

    Raises:
        RunError: the description is not one.
    """
    keys = {"model": str, "options": dict, "sizes": list, "data": str}
    given = {key: type(value) for key, value in description.items() if key != "data_options"}
    if given != keys or len(description["sizes"]) != 3:
        raise RunError(f"expected a file that says {', '.join(keys)}, got {', '.join(description) or 'nothing'}")
    if any(type(size) is not int or size < 1 for size in description["sizes"]):
        raise RunError(f"expected sizes as positive integers, got {description['sizes']}")
    try:
        models.check_input(description["model"], description["data"])
        with torch.device("meta"):
            return models.build(description["model"], *description["sizes"], **description["options"]).eval()
    except (ValueError, TypeError, RuntimeError) as error:
        raise RunError(str(error)) from None


def described_data(description: dict[str, Any], root: Path | None = None) -> data.Dataset:
    """Load the data set that ``describe`` described, for the network that ``network`` built.

    Raises:
        RunError: the description is not one, or the data there are not of its sizes.
        data.DataNotFoundError, data.DataError: with a message for the user.
    """
    options = description.get("data_options", {})
    if not isinstance(options, dict):
        raise RunError(f"expected data_options as options of a data set, got {options!r}")
    try:
        dataset = data.load(description["data"], root, **options)
    except data.DataError:
        raise
    except ValueError as error:
        raise RunError(str(error)) from None
    if list(dataset.sizes) != description["sizes"]:
        raise RunError(f"expected data set {dataset.name} of sizes {description['sizes']}, got {list(dataset.sizes)}")
    return dataset


def keep_workload(out: Path, recipe: "Recipe", model: nn.Module, dataset: data.Dataset) -> None:
    """Count, and time if need be, what one test sample costs, and write it into the folder ``out`` of a run.

    Only where the budget needs it, and once in a run: times that are measured again would be others, and a scheme that
    met the budget would no longer.
    """
    budgets = csq.Budget.parse_all(recipe.budget)
    if not any(budget.needs_workload for budget in budgets):
        return
    if checkpoint.exists(out) and (out / WORKLOAD).exists():
        return
    sample = next(iter(dataset.test_batches(1)))[0]
    counted = csq.workload(model, sample, latency=any(budget.needs_latency for budget in budgets))
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(counted.to_dict(), indent=2) + "\n"
    write_text_atomically(out / WORKLOAD, text)


def load_workload(out: Path, recipe: "Recipe") -> csq.Workload | None:
    """What ``keep_workload`` wrote, ``None`` where the budget does not need it."""
    if not any(budget.needs_workload for budget in csq.Budget.parse_all(recipe.budget)):
        return None
    return csq.Workload.from_dict(json.loads((out / WORKLOAD).read_text()))


class Score(NamedTuple):
    """How good a model is on the test samples: share of right predictions, and cross-entropy in nats a prediction."""

    accuracy: float
    loss: float


@torch.no_grad()
def evaluate(model: nn.Module, dataset: data.Dataset) -> Score:
    """Measure a model on the test samples, in evaluation mode; it is left in the mode it was in."""
    training = model.training
    model.eval()
    correct, loss, count = 0, 0.0, 0
    for inputs, labels in dataset.test_batches(EVALUATION_BATCH):
        logits = model(inputs)
        correct += int((logits.argmax(1) == labels).sum())
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        count += labels.numel()
    model.train(training)
    return Score(correct / count, loss / count)


@dataclass(frozen=True)
class Comparison:
    """How a packed network differs from the hard model. ``print(comparison)`` shows it.

    ``predictions`` and ``differences`` say, for each precision, how many of ``count`` predictions are equal and how far
    the outputs are apart at most, relative to the largest output.
    """

    layers: int
    different: list[str]
    count: int
    predictions: dict[str, int]
    differences: dict[str, float]

    @property
    def equal(self) -> bool:
        """All codes and scales are equal, and so is every prediction in ``exact``."""
        return not self.different and self.predictions["exact"] == self.count

    def __str__(self) -> str:
        codes = f"integer codes and scales: equal in {self.layers - len(self.different)} of {self.layers} layers"
        lines = [codes + "".join(f"\n  {name}: different" for name in self.different)]
        rows = [("precision", "predictions equal", "largest difference")]
        for precision in PRECISIONS:
            equal = f"{self.predictions[precision]:,} of {self.count:,}"
            rows.append((precision, equal, f"{self.differences[precision]:.1e} of the largest output"))
        return "\n".join(lines + table.lines(rows))


@torch.no_grad()
def _outputs(model: nn.Module, dataset: data.Dataset) -> Tensor:
    return torch.cat([model(inputs) for inputs, _ in dataset.test_batches(EVALUATION_BATCH)])


def compare(packed: nn.Module, hard: nn.Module, dataset: data.Dataset) -> Comparison:
    """Compare a packed model with the hard CSQ model on the test samples; its precision ends as ``exact``."""
    hard_layers = {name: module for name, module in hard.named_modules() if isinstance(module, CSQLayer)}
    modules = dict(packed.named_modules())
    different = []
    for name, layer in hard_layers.items():
        other = modules[name]
        same = isinstance(other, PackedLayer) and torch.equal(other.integer_codes(), layer.integer_codes().int())
        if not same or other.n_bits != layer.n_bits or not torch.equal(other.scale, layer.scale.detach()):
            different.append(name)
    expected = _outputs(hard, dataset)
    predictions, differences = {}, {}
    for precision in reversed(PRECISIONS):
        csq.set_precision_(packed, precision)
        outputs = _outputs(packed, dataset)
        equal = outputs.argmax(1) == expected.argmax(1)
        predictions[precision] = int(equal.sum())
        differences[precision] = float((outputs - expected).abs().max() / expected.abs().max())
    return Comparison(len(hard_layers), different, equal.numel(), predictions, differences)


@torch.inference_mode()
def _milliseconds(model: nn.Module, inputs: Tensor) -> float:
    """Median time of a call."""
    model(inputs)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - start < _TIMED_SECONDS:
        begin = time.perf_counter()
        model(inputs)
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def measure(packed: nn.Module, dataset: data.Dataset, precisions: Sequence[str]) -> str:
    """A table of accuracy, loss, time of a packed network in each precision, and of the float one of equal weights."""
    unpacked = copy.deepcopy(packed)
    csq.unpack_(unpacked)
    inputs = next(dataset.test_batches(max(_TIMED_BATCHES)))[0]
    times = [f"{batch} {dataset.unit}{'s' if batch > 1 else ''}" for batch in _TIMED_BATCHES]
    rows = [("weights", "accuracy", "loss", *times)]
    floats = [_milliseconds(unpacked, inputs[:batch]) for batch in _TIMED_BATCHES]
    rows.append(("float32", *_cells(evaluate(unpacked, dataset)), *(f"{time:.3f} ms" for time in floats)))
    for precision in precisions:
        csq.set_precision_(packed, precision)
        timed = [_milliseconds(packed, inputs[:batch]) for batch in _TIMED_BATCHES]
        cells = [f"{time:.3f} ms ({before / time:.2f}x)" for time, before in zip(timed, floats, strict=True)]
        rows.append((f"packed, {precision}", *_cells(evaluate(packed, dataset)), *cells))
    return "\n".join(table.lines(rows))


def _cells(score: Score) -> tuple[str, str]:
    return f"{score.accuracy:.2%}", f"{score.loss:.4f}"
