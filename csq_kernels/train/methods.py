"""What follows the float phase: CSQ to exact integers, or a baseline, and the report of either."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

import csq_kernels as csq
from csq_kernels.files import write_text_atomically
from csq_kernels.train import baselines, models, runs
from csq_kernels.train.paper import PaperSearch
from csq_kernels.train.phase import optimizer_for, search_for, train_phase
from csq_kernels.train.running import FINAL_STATISTICS, FLOAT, PACKED, SEARCHED, Run, TrainingError


def check_quantization(run: Run) -> None:
    """Raise ``TrainingError`` for rules or a budget that do not fit the model, now and not after the float phase."""
    recipe, copied = run.recipe, copy.deepcopy(run.model)
    try:
        if recipe.method == "csq":
            csq.prepare_(copied, recipe.quantization.config())
            runs.keep_workload(run.out, recipe, copied, run.dataset)
            search_for(run, copied, None)
        elif recipe.method != "float":
            baselines.round_(copied, recipe.bits, recipe.quantization.config())
    except ValueError as error:
        raise TrainingError(str(error)) from None


def _teacher(run: Run) -> nn.Module | None:
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


def _load_searched(run: Run, folder: Path) -> None:
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


def train_csq(run: Run, state: dict[str, Any] | None) -> dict[str, Any]:
    recipe, model = run.recipe, run.model
    plan = csq.prepare_(model, recipe.quantization.config())
    if state is not None:
        model.load_state_dict(state["model"])
    elif recipe.search_from is not None:
        _load_searched(run, Path(recipe.search_from).expanduser())
    else:
        run.display.note(str(plan))
    # After the model's state: it decides which planes there are to optimize.
    optimizer = optimizer_for(recipe, model, quantized=True)
    search = search_for(run, model, optimizer)
    if state is None and isinstance(search, PaperSearch):
        search.restart_()
    if state is None and recipe.search_from is not None:
        search.fix_scheme()
    train_phase(run, "csq", optimizer, search, state, _teacher(run))
    # Both are measured with statistics of their own, estimated alike: what differs are the bits alone.
    run.estimate_statistics(FINAL_STATISTICS)
    run.measure("soft")
    statistics = run.statistics_batches(FINAL_STATISTICS)
    report = csq.finalize_(
        model,
        data=statistics,
        budget=recipe.budget,
        meet_budget=recipe.preset is None,
        workload=runs.load_workload(run.out, recipe),
    )
    run.measure("hard")
    packed = copy.deepcopy(model)
    csq.pack_(packed)
    size = run.save_packed(packed)
    text = f"{report}\n{PACKED} of {size:,} bytes, {report.bytes:,} were promised"
    return _finish(run, report.to_dict(), text, size)


def train_baseline(run: Run, state: dict[str, Any] | None) -> dict[str, Any]:
    recipe, model = run.recipe, run.model
    if recipe.method == "float":
        for figure in ("accuracy", "loss"):
            run.results[f"hard_{figure}"] = run.results[f"float_{figure}"]
        return _finish(run, None, "float", (run.out / FLOAT).stat().st_size)
    if recipe.method == "lsq":
        baselines.learn_steps_(model, recipe.bits, recipe.quantization.config())
        if state is not None:
            model.load_state_dict(state["model"])
        train_phase(run, "lsq", optimizer_for(recipe, model, quantized=True), None, state, _teacher(run))
        run.estimate_statistics(FINAL_STATISTICS)
        run.measure("soft")
        baselines.pack_learnt_(model, recipe.bits)
    else:
        baselines.round_(model, recipe.bits, recipe.quantization.config())
    run.estimate_statistics(FINAL_STATISTICS)
    run.measure("hard")
    size = run.save_packed(model)
    scheme = baselines.scheme(model, size)
    return _finish(run, scheme.to_dict(), f"{scheme}\n{PACKED} of {size:,} bytes", size)


def _finish(run: Run, scheme: dict[str, Any] | None, text: str, size: int) -> dict[str, Any]:
    """Write the report, and mark the run as done."""
    recipe = run.recipe
    seconds = round(run.clock.seconds(), 1)
    result = {"recipe": recipe.name, "method": recipe.method, "seed": recipe.seed, "seconds": seconds}
    result |= {**run.results, "file_bytes": size, "scheme": scheme}
    write_text_atomically(run.out / "report.txt", f"{text}\n\n{_accuracies(run.results)}\n")
    write_text_atomically(run.out / "report.json", json.dumps(result, indent=2) + "\n")
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
