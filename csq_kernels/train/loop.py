"""The training loop of ``csq train``: a float baseline, then one ``Search`` from soft bits to exact integers.

Data order and augmentation are functions of the seed and the step, and a checkpoint holds the rest: on the CPU, two
runs with one seed are equal bit for bit, and so is a run that was killed and resumed.
"""

import json
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import csq_kernels as csq
from csq_kernels.files import remove_left_over, write_text_atomically
from csq_kernels.train import checkpoint, models, runs
from csq_kernels.train.methods import check_quantization, train_baseline, train_csq
from csq_kernels.train.phase import optimizer_for, train_phase
from csq_kernels.train.running import METRICS, Clock, Display, Run, Steps, TrainingError
from csq_kernels.train.timing import fit_into_time

if TYPE_CHECKING:
    from csq_kernels.train.recipe import Recipe

# What a resumed run may change without becoming another run.
_CHANGEABLE = ("checkpoint.", "data.root", "data.workers")


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
    write_text_atomically(path, "".join(kept))


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
    clock = Clock(0.0 if state is None else state["seconds"], pause_after, max_minutes)
    run = Run(recipe, out, dataset, model, torch_device, display, clock, {} if state is None else state["results"])
    run.steps = run.planned_steps() if state is None else Steps(*state["steps"])
    check_quantization(run)
    if max_minutes is not None:
        fit_into_time(run, shorten=state is None)
    out.mkdir(parents=True, exist_ok=True)
    remove_left_over(out)
    write_text_atomically(out / "recipe.yaml", recipe.to_yaml())
    write_text_atomically(out / "environment.json", json.dumps(environment(torch_device), indent=2) + "\n")
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
            train_phase(run, "float", optimizer_for(recipe, model, quantized=False), None, state)
        if run.steps.float_ or recipe.init is not None:
            run.measure("float")
            run.save_float()
            display.note(f"float accuracy {run.results['float_accuracy']:.2%}")
        state = None

    if recipe.method == "csq":
        return train_csq(run, state)
    return train_baseline(run, state)
