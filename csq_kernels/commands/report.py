"""``csq report`` and ``csq compare``: what finished runs came to, as a page and side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from csq_kernels.commands import FAILED, USAGE, fail, missing


def _read(folders: list[Path]):
    """The results of finished runs."""
    try:
        from csq_kernels.train import results
        from csq_kernels.train.runs import RunError
    except ImportError as error:
        raise missing(error) from None
    try:
        return [results.read(folder) for folder in folders]
    except RunError as error:
        raise fail(str(error), USAGE) from None


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished csq train.")],
    against: Annotated[
        list[Path] | None, typer.Option(metavar="RUN", help="Another run on the same data, to compare; repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The page; default: RUN/report.html.")] = None,
):
    """Write a page about a finished run: what it came to, its bits, its training, and how to repeat it.

    The page is one file that needs no network. Its pictures as PNG and the table
    of the layers, table.csv, are written beside it and replace files of these names.

    Examples:

      csq report runs/demo

      csq report runs/demo --against runs/lsq --against runs/float --out pages/demo.html

    Exit codes: 0 written, 1 failed, 2 wrong or unfinished run.
    """
    results, *others = _read([run, *(against or [])])
    try:
        from csq_kernels.train import page
    except ImportError as error:
        raise missing(error) from None
    from csq_kernels.train.runs import RunError

    try:
        written = page.write(results, others, out)
    except RunError as error:
        raise fail(str(error), USAGE) from None
    except OSError as error:
        raise fail(f"cannot write {out or run}: {error}", FAILED) from None
    print(f"{written[0]}; beside it: {', '.join(path.name for path in written[1:])}")


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN RUN...", help="Folders of finished csq train.")],
    csv: Annotated[Path | None, typer.Option(help="Write the comparison to this file as well.")] = None,
):
    """Show finished runs side by side: their results, what differs in their recipes, the bits of their layers.

    Examples:

      csq compare runs/demo runs/demo-2

      csq compare runs/seed0 runs/seed1 runs/seed2 --csv seeds.csv

    Exit codes: 0 shown, 1 failed, 2 wrong or unfinished run.
    """
    if len(runs) < 2:
        raise fail(f"expected at least two runs, got {runs[0]} alone", USAGE)
    results = _read(runs)
    import rich.console

    from csq_kernels.train import comparison

    compared = comparison.compare(results)
    comparison.show(compared, rich.console.Console())
    if csv is not None:
        try:
            compared.write_csv(csv)
        except OSError as error:
            raise fail(f"cannot write {csv}: {error}", FAILED) from None
