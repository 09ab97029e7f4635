"""The three pictures of a run, made from its ``metrics.jsonl`` and ``report.json``."""

import json
from pathlib import Path
from typing import Any

_PHASES = {"float": "float baseline", "search": "search", "finetune": "fine-tuning"}


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _mark_phases(axes, records: list[dict[str, Any]]) -> None:
    """A dotted line and a name where each phase begins."""
    starts: dict[str, float] = {}
    begin = records[0]["epoch"]
    for record in records:
        starts.setdefault(record["phase"], begin)
        begin = record["epoch"]
    for phase, epoch in starts.items():
        if len(starts) > 1:
            axes.axvline(epoch, color="0.6", linestyle=":", linewidth=1)
        axes.annotate(_PHASES[phase], (epoch, 1.01), xycoords=("data", "axes fraction"), fontsize=8, color="0.4")


def _bits_per_layer(figure, result: dict[str, Any]) -> None:
    axes = figure.subplots()
    layers = result["scheme"]["layers"]
    positions = list(range(len(layers)))
    bars = ((-0.2, "paper_bits", "paper bits (active gates)"), (0.2, "stored_bits", "stored bits (planes)"))
    for shift, key, label in bars:
        axes.bar([position + shift for position in positions], [row[key] for row in layers], 0.4, label=label)
    average = result["scheme"]["stored_bits"]
    axes.axhline(average, color="0.4", linestyle="--", linewidth=1, label="stored, average over weights")
    axes.set_xticks(positions, [row["name"] for row in layers], rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("bits a weight")
    axes.set_title(f"{result['recipe']}: precision of each layer")
    axes.legend(fontsize=8)


def _bits_over_time(figure, records: list[dict[str, Any]]) -> None:
    records = [record for record in records if "layer_bits" in record]
    axes = figure.subplots()
    epochs = [record["epoch"] for record in records]
    for number, name in enumerate(records[0]["layer_bits"]):
        # Layers often share a precision: wide lines below narrow ones keep both visible.
        width = 5 - 4 * number / len(records[0]["layer_bits"])
        bits = [record["layer_bits"][name]["stored"] for record in records]
        axes.step(epochs, bits, where="post", linewidth=width, label=name)
    average = [record["stored_bits"] for record in records]
    axes.step(epochs, average, "--", where="post", color="black", linewidth=1.5, label="average over weights")
    axes.set_xlabel("epoch")
    axes.set_ylabel("stored bits a weight")
    axes.set_ylim(bottom=0)
    _mark_phases(axes, records)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=7)


def _training(figure, records: list[dict[str, Any]], result: dict[str, Any]) -> None:
    above, below = figure.subplots(2, 1, sharex=True)
    epochs = [record["epoch"] for record in records]
    tested = [record for record in records if "test_accuracy" in record]
    tested_epochs = [record["epoch"] for record in tested]
    above.plot(epochs, [record["loss"] for record in records], linewidth=1, label="training")
    above.plot(tested_epochs, [record["test_loss"] for record in tested], "o-", markersize=3, label="test")
    above.set_ylabel("loss")
    above.set_yscale("log")
    above.legend(fontsize=8, loc="upper right")
    _mark_phases(above, records)
    below.plot(epochs, [100 * r["train_accuracy"] for r in records], linewidth=1, label="training")
    accuracies = [100 * record["test_accuracy"] for record in tested]
    below.plot(tested_epochs, accuracies, "o-", markersize=3, label="test")
    hard = 100 * result["hard_accuracy"]
    below.plot([epochs[-1]], [hard], "*", markersize=10, color="black", label=f"exact integers, {hard:.1f} %")
    # The first epochs would squeeze everything that matters into a line.
    below.set_ylim(max(0.0, min(sorted(accuracies)[len(accuracies) // 5], hard) - 5), 100.5)
    below.set_xlabel("epoch")
    below.set_ylabel("accuracy, %")
    below.legend(fontsize=8, loc="lower right")


def write(folder: Path) -> list[Path]:
    """Draw ``bits_per_layer.png``, ``bits_over_time.png`` and ``training.png`` of a finished run; needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = _records(folder)
    result = json.loads((folder / "report.json").read_text())
    pictures = {
        "bits_per_layer": lambda figure: _bits_per_layer(figure, result),
        "bits_over_time": lambda figure: _bits_over_time(figure, records),
        "training": lambda figure: _training(figure, records, result),
    }
    paths = []
    for name, draw in pictures.items():
        figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1])
    return paths
