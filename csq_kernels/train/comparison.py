"""``csq compare``: finished runs side by side, on a terminal, as plain text, as CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from csq_kernels import table
from csq_kernels.files import write_text_atomically
from csq_kernels.train.loop import flat
from csq_kernels.train.results import Results

Row = tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """Rows of a name and a cell a run: ``results``, ``recipe`` where runs differ, stored bits of the ``layers``.

    ``different`` names the layers whose stored bits are not the same in every run that has them.
    """

    runs: list[str]
    results: list[Row]
    recipe: list[Row]
    layers: list[Row]
    different: set[str]

    def write_csv(self, path: Path) -> None:
        """Write all rows to one file; its first column says which part a row is of."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(("part", "name", *self.runs))
        for part in ("results", "recipe", "layers"):
            writer.writerows((part, *row) for row in getattr(self, part))
        write_text_atomically(path, buffer.getvalue())


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.2%}"


def _nats(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _results(run: Results) -> dict[str, str]:
    report, scheme = run.report, run.report.scheme
    budget = "" if scheme is None else scheme.asked
    if budget and scheme is not None and not scheme.budget_met:
        budget += ", NOT met"
    return {
        "recipe": report.recipe,
        "method": report.method,
        "seed": str(run.seed),
        "float accuracy": _percent(report.float_accuracy),
        "soft accuracy": _percent(report.soft_accuracy),
        "exact-integer accuracy": _percent(run.hard_accuracy),
        "float loss": _nats(report.float_loss),
        "soft loss": _nats(report.soft_loss),
        "exact-integer loss": _nats(None if report.method == "float" else report.hard_loss),
        "budget": budget,
        "stored bits": "" if scheme is None else f"{scheme.stored_bits:.4g}",
        "paper bits": "" if scheme is None else f"{scheme.paper_bits:.4g}",
        "file bytes": "" if report.file_bytes is None else str(report.file_bytes),
        "times smaller": "" if run.ratio is None else f"{run.ratio:.2f}",
        "seconds": f"{report.seconds:.1f}",
    }


def _cell(value: Any) -> str:
    return "none" if value is None else str(value)


def compare(runs: Sequence[Results]) -> Comparison:
    """Put runs side by side; a cell is empty where a run has no such key, layer or figure."""
    figures = [_results(run) for run in runs]
    recipes = [{key: _cell(value) for key, value in flat(run.recipe).items()} for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    schemes = [run.report.scheme for run in runs]
    bits = [{} if s is None else {layer.name: str(layer.stored_bits) for layer in s.layers} for s in schemes]
    names = dict.fromkeys(name for by_name in bits for name in by_name)
    return Comparison(
        runs=[str(run.folder) for run in runs],
        results=_rows(figures, figures[0]),
        recipe=[row for row in _rows(recipes, keys) if len(set(row[1:])) > 1],
        layers=_rows(bits, names),
        different={row[0] for row in _rows(bits, names) if len(set(filter(None, row[1:]))) > 1},
    )


def _rows(columns: Sequence[dict[str, str]], names: dict[str, Any]) -> list[Row]:
    return [(name, *(column.get(name, "") for column in columns)) for name in names]


def show(comparison: Comparison, console: Console) -> None:
    """Print tables on a terminal, and aligned plain text elsewhere."""
    marked = [(*row, "differs" if row[0] in comparison.different else "") for row in comparison.layers]
    show_table(console, "results", ("", *comparison.runs), comparison.results)
    if comparison.recipe:
        show_table(console, "recipe, where it differs", ("", *comparison.runs), comparison.recipe)
    else:
        print("\nrecipe: the same")
    if marked:
        show_table(console, "stored bits of each layer", ("", *comparison.runs, ""), marked)


def show_table(console: Console, title: str, heads: Row, rows: Sequence[Row]) -> None:
    """Print a table on a terminal, and aligned plain text elsewhere."""
    if not console.is_terminal:
        print("\n".join(["", title, *table.lines([heads, *rows])]))
        return
    shown = Table(title=title, title_justify="left", header_style="dim")
    for head in heads:
        shown.add_column(Text(head))
    for row in rows:
        # The names and values of a recipe are no markup.
        shown.add_row(*(Text(cell) for cell in row))
    console.print(shown)
