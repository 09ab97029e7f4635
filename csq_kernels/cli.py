"""The command ``csq``: train a recipe, pack what comes out, find data, say what runs on this machine."""

import sys
from collections.abc import Callable
from typing import Any

try:
    import typer
except ImportError:
    typer = None  # type: ignore[assignment]


def app() -> "typer.Typer":
    """The command with its sub-commands."""
    from csq_kernels.commands import bench, data, info, packed, report, train

    command = typer.Typer(
        name="csq",
        help="Train mixed-precision networks with CSQ, pack them, and see what they use.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    functions: dict[str, Callable[..., Any]] = {
        "train": train.train,
        "sweep": train.sweep,
        "report": report.report,
        "compare": report.compare,
        "pack": packed.pack,
        "inspect": packed.inspect,
        "verify": packed.verify,
        "eval": packed.evaluate,
        "bench": bench.bench,
        "data": data.data,
        "info": info.info,
    }
    for name, function in functions.items():
        command.command(name)(function)
    return command


def main() -> None:
    """Entry point of ``csq``."""
    if typer is None:
        sys.exit('error: csq needs typer, which is not installed: pip install "csq_kernels[train]"')
    app()()


if __name__ == "__main__":
    main()
