"""``csq data``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from csq_kernels.commands import FAILED, USAGE, fail


def data(
    name: Annotated[str | None, typer.Argument(help="Show one data set in detail.")] = None,
    root: Annotated[Path | None, typer.Option(help="Look in this folder or file instead of the usual places.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
):
    """List the data sets, whether they are on this machine, and how to get them. Downloads nothing.

    Examples:

      csq data

      csq data fashion-mnist --root ~/downloads/fashion

    Exit codes: 0 found (or a list was asked for), 1 not found, 2 no such data set.
    """
    from csq_kernels.train import data as sets

    if name is not None and name not in sets.SOURCES:
        raise fail(f"expected NAME of {', '.join(sets.SOURCES)}, got {name!r}", USAGE)
    names = list(sets.SOURCES) if name is None else [name]
    found = {each: sets.find(each, root) for each in names}
    if as_json:
        print(json.dumps({each: None if path is None else str(path) for each, path in found.items()}, indent=2))
    else:
        for each, path in found.items():
            print(f"{each}: {sets.SOURCES[each].description}")
            print(f"  {'found: ' + str(path) if path is not None else 'not found'}")
            if name is not None or path is None:
                print(f"  looked in: {', '.join(sets.places(each, root))}")
                print("\n".join(["  to get it:"] + [f"  - {way}" for way in sets.SOURCES[each].ways]))
    if name is not None and found[name] is None:
        raise typer.Exit(FAILED)
