"""A finished run and its packed file: load the one, build the network of the other, compare and measure them."""

import copy
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import csq_kernels as csq
from csq_kernels import table
from csq_kernels._ops import PRECISIONS
from csq_kernels.nn import CSQLayer, PackedLayer
from csq_kernels.train import checkpoint, data, models

if TYPE_CHECKING:
    from csq_kernels.train.recipe import Recipe

EVALUATION_BATCH = 500
# Images at once, and seconds spent, when a network is timed.
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
    dataset = data.load(recipe.data.name, recipe.data.root if data_root is None else data_root)
    sizes = (dataset.channels, dataset.image_size, dataset.classes)
    model = models.build(recipe.model.name, *sizes, **recipe.model.options)
    csq.prepare_(model, recipe.quantization.config())
    model.load_state_dict(state["model"])
    return FinishedRun(recipe, dataset, model.eval())


def describe(recipe: "Recipe", dataset: data.Dataset) -> dict[str, Any]:
    """What a packed file says besides its tensors: how to build the network, and what it was trained on."""
    return {
        "model": recipe.model.name,
        "options": recipe.model.options,
        "sizes": [dataset.channels, dataset.image_size, dataset.classes],
        "data": recipe.data.name,
    }


def network(description: dict[str, Any]) -> nn.Module:
    """Build the network that ``describe`` described, on the meta device and in evaluation mode, for ``load_packed``.

    Raises:
        RunError: the description is not one.
    """
    keys = {"model": str, "options": dict, "sizes": list, "data": str}
    if {key: type(value) for key, value in description.items()} != keys or len(description["sizes"]) != 3:
        raise RunError(f"expected a file that says {', '.join(keys)}, got {', '.join(description) or 'nothing'}")
    if any(type(size) is not int or size < 1 for size in description["sizes"]):
        raise RunError(f"expected sizes as positive integers, got {description['sizes']}")
    try:
        with torch.device("meta"):
            return models.build(description["model"], *description["sizes"], **description["options"]).eval()
    except (ValueError, TypeError, RuntimeError) as error:
        raise RunError(str(error)) from None


@dataclass(frozen=True)
class Comparison:
    """How a packed network differs from the hard model. ``print(comparison)`` shows it.

    ``predictions`` and ``differences`` say, for each precision, how many predictions are equal and how far the outputs
    are apart at most, relative to the largest output.
    """

    layers: int
    different: list[str]
    images: int
    predictions: dict[str, int]
    differences: dict[str, float]

    @property
    def equal(self) -> bool:
        """All codes and scales are equal, and so is every prediction in ``exact``."""
        return not self.different and self.predictions["exact"] == self.images

    def __str__(self) -> str:
        codes = f"integer codes and scales: equal in {self.layers - len(self.different)} of {self.layers} layers"
        lines = [codes + "".join(f"\n  {name}: different" for name in self.different)]
        rows = [("precision", "predictions equal", "largest difference")]
        for precision in PRECISIONS:
            equal = f"{self.predictions[precision]:,} of {self.images:,}"
            rows.append((precision, equal, f"{self.differences[precision]:.1e} of the largest output"))
        return "\n".join(lines + table.lines(rows))


@torch.no_grad()
def _outputs(model: nn.Module, dataset: data.Dataset) -> Tensor:
    return torch.cat([model(images) for images, _ in dataset.test_batches(EVALUATION_BATCH)])


def compare(packed: nn.Module, hard: nn.Module, dataset: data.Dataset) -> Comparison:
    """Compare a packed model with the hard CSQ model on the test images; its precision ends as ``exact``."""
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
        predictions[precision] = int((outputs.argmax(1) == expected.argmax(1)).sum())
        differences[precision] = float((outputs - expected).abs().max() / expected.abs().max())
    return Comparison(len(hard_layers), different, len(expected), predictions, differences)


@torch.inference_mode()
def _milliseconds(model: nn.Module, images: Tensor) -> float:
    """Median time of a call."""
    model(images)
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - start < _TIMED_SECONDS:
        begin = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def measure(packed: nn.Module, dataset: data.Dataset, precisions: Sequence[str]) -> str:
    """A table of accuracy and time of a packed network in each precision, and of the float network of equal weights."""
    unpacked = copy.deepcopy(packed)
    csq.unpack_(unpacked)
    images = next(dataset.test_batches(max(_TIMED_BATCHES)))[0]
    times = [f"{batch} image{'s' if batch > 1 else ''}" for batch in _TIMED_BATCHES]
    rows = [("weights", "accuracy", *times)]
    floats = [_milliseconds(unpacked, images[:batch]) for batch in _TIMED_BATCHES]
    rows.append(("float32", f"{_accuracy(unpacked, dataset):.2%}", *(f"{time:.3f} ms" for time in floats)))
    for precision in precisions:
        csq.set_precision_(packed, precision)
        timed = [_milliseconds(packed, images[:batch]) for batch in _TIMED_BATCHES]
        cells = [f"{time:.3f} ms ({before / time:.2f}x)" for time, before in zip(timed, floats, strict=True)]
        rows.append((f"packed, {precision}", f"{_accuracy(packed, dataset):.2%}", *cells))
    return "\n".join(table.lines(rows))


def _accuracy(model: nn.Module, dataset: data.Dataset) -> float:
    return float((_outputs(model, dataset).argmax(1) == dataset.test_labels).float().mean())
