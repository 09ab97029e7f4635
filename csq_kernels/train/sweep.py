"""Several budgets from one search: each is met anew from the gates that the search left, and trained a little more."""

import csv
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from csq_kernels import table
from csq_kernels.files import write_text_atomically
from csq_kernels.train import checkpoint, loop, running
from csq_kernels.train import recipe as recipes

_COLUMNS = ("budget", "stored_bits", "file_bytes", "float_accuracy", "hard_accuracy", "seconds")


def folder_of(folder: Path, budget: str) -> Path:
    """Where ``budget`` is trained, within the folder of the run that was searched."""
    return folder / "sweep" / re.sub(r"[^0-9A-Za-z.]+", "-", budget)


def recipe_for(folder: Path, budget: str, epochs: int | None = None) -> recipes.Recipe:
    """The recipe that meets ``budget`` from the search of the run in ``folder``; ``epochs`` of finetuning.

    Raises:
        recipe.RecipeError, checkpoint.CheckpointError: there is no such run, or it does not fit; the message says why.
    """
    content = checkpoint.load(folder)["recipe"]
    content |= {"search_from": str(folder), "init": None, "budget": budget}
    if epochs is not None:
        content["epochs"] |= {"finetune": epochs}
    return recipes.make(content, str(folder))


def sweep(
    folder: Path,
    budgets: Sequence[str],
    *,
    epochs: int | None = None,
    device: str = "cpu",
    display: running.Display | None = None,
) -> list[dict[str, Any]]:
    """Train the run in ``folder`` for each budget, in ``folder/sweep/BUDGET``, and write ``folder/sweep.csv``.

    A budget that was trained before is not trained again, and one that was interrupted goes on.

    Args:
        folder: a run whose search is over.
        budgets: as ``Search`` accepts them.
        epochs: of finetuning for each; default: those of the run.
        device: a torch device.
        display: receives progress.

    Returns:
        One row for each budget: ``budget``, ``stored_bits``, ``file_bytes``, the accuracies, ``seconds``.

    Raises:
        As ``loop.train``.
    """
    display = display or running.Display()
    rows = []
    for budget in budgets:
        chosen = recipe_for(folder, budget, epochs)
        out = folder_of(folder, budget)
        display.note(f"{budget}: {out}")
        result = loop.train(chosen, out, resume=checkpoint.exists(out), device=device, display=display)
        row = {"budget": budget, "stored_bits": result["scheme"]["stored_bits"]}
        rows.append(row | {key: result.get(key) for key in _COLUMNS[2:]})
    _write(folder / "sweep.csv", rows)
    return rows


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomically(path, text.getvalue())


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a table in plain text."""
    lines = [("budget", "stored bits", "file bytes", "exact-integer accuracy", "seconds")]
    for row in rows:
        accuracy, seconds = f"{row['hard_accuracy']:.2%}", f"{row['seconds']:.0f}"
        lines.append((row["budget"], f"{row['stored_bits']:.3f}", f"{row['file_bytes']:,}", accuracy, seconds))
    return "\n".join(table.lines(lines))
