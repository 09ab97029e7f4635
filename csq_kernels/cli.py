"""The command ``csq``: train a recipe, find data, say what runs on this machine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
except ImportError:
    typer = None  # type: ignore[assignment]

INSTALL = 'pip install "csq_kernels[train]"'
# Exit codes, besides 0.
FAILED, USAGE, TIME_UP, INTERRUPTED = 1, 2, 3, 130


def _fail(message: str, code: int) -> typer.Exit:
    """Print one line and return what to raise."""
    print(f"error: {message}", file=sys.stderr)
    return typer.Exit(code)


def _missing(error: ImportError) -> typer.Exit:
    return _fail(f"{error}; the training commands need more packages: {INSTALL}", FAILED)


def _free_folder(name: str) -> Path:
    """The first of runs/name, runs/name-2, ... that does not exist."""
    folder, number = Path("runs") / name, 2
    while folder.exists():
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder


def train(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="Name of a recipe that comes with the package, or a YAML file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to the recipe.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run; default: runs/NAME, numbered if taken.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
    seed: Annotated[int | None, typer.Option(min=0, help="Replaces the recipe's seed.")] = None,
    max_minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop after so many minutes, with a checkpoint.")
    ] = None,
):
    """Train a network with CSQ: a float baseline, the search for bits within a budget, exact integers.

    The folder of the run holds its recipe, metrics.jsonl, report.txt and .json,
    environment.json, pictures and the checkpoint. A run that was killed goes on
    with --resume and ends with the very same bits.

    Examples:

      csq train demo

      csq train digits_mlp budget="2.5 bits" epochs.search=10 --out runs/small --seed 1

      csq train runs/small/recipe.yaml --out runs/small --resume

      csq train fashion_mnist_resnet20 data.root=/data/fashion --device cuda

    Exit codes: 0 finished, 1 failed, 2 wrong recipe, option or data, 3 --max-minutes over, 130 interrupted.
    """
    try:
        import rich.console

        from csq_kernels.train import checkpoint, data, display, loop, plots
        from csq_kernels.train import recipe as recipes
    except ImportError as error:
        raise _missing(error) from None
    if resume and out is None:
        raise _fail("--resume needs --out, the folder of the run to go on with", USAGE)
    try:
        chosen = recipes.load(recipe, overrides, seed)
    except recipes.RecipeError as error:
        raise _fail(str(error), USAGE) from None
    folder = out if out is not None else _free_folder(chosen.name)
    console = rich.console.Console()
    try:
        with display.make(console) as shown:
            result = loop.train(chosen, folder, resume=resume, device=device, max_minutes=max_minutes, display=shown)
        pictures = _draw(plots, folder)
    except (loop.TrainingError, data.DataNotFoundError, data.DataError) as error:
        raise _fail(str(error), USAGE) from None
    except checkpoint.CheckpointError as error:
        raise _fail(str(error), FAILED) from None
    except OSError as error:
        raise _fail(f"cannot write to {folder}: {error}; its last checkpoint stands", FAILED) from None
    except loop.TimeUpError as error:
        print(f"{error}; go on with --out {folder} --resume")
        raise typer.Exit(TIME_UP) from None
    except KeyboardInterrupt:
        raise _fail(f"interrupted; go on from the last checkpoint with --out {folder} --resume", INTERRUPTED) from None
    print((folder / "report.txt").read_text())
    print(f"{result['seconds']:.0f} s; everything is in {folder}{pictures}")


def _draw(plots, folder: Path) -> str:
    try:
        return f": {', '.join(path.name for path in plots.write(folder))}"
    except ImportError as error:
        return f" (no pictures: {error})"


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

    if name is not None and name not in sets.DESCRIPTIONS:
        raise _fail(f"expected NAME of {', '.join(sets.DESCRIPTIONS)}, got {name!r}", USAGE)
    names = list(sets.DESCRIPTIONS) if name is None else [name]
    found = {each: sets.find(each, root) for each in names}
    if as_json:
        print(json.dumps({each: None if path is None else str(path) for each, path in found.items()}, indent=2))
    else:
        for each, path in found.items():
            print(f"{each}: {sets.DESCRIPTIONS[each]}")
            print(f"  {'found: ' + str(path) if path is not None else 'not found'}")
            if name is not None or path is None:
                print(f"  looked in: {', '.join(sets.places(each, root))}")
                print("\n".join(["  to get it:"] + [f"  - {way}" for way in sets.ways(each)]))
    if name is not None and found[name] is None:
        raise typer.Exit(FAILED)


def info(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False):
    """Say what this installation consists of and which backend serves each operation, and why.

    Examples:

      csq info

      csq info --json
    """
    import csq_kernels

    content = csq_kernels.info()
    if as_json:
        print(json.dumps(content, indent=2))
        return
    operations = content.pop("ops")
    width = max(map(len, content))
    for key, value in content.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        print(f"{key:<{width}}  {'none' if shown in (None, '') else shown}")
    for choice in operations:
        why = f" ({'; '.join(choice['missing'])})" if choice["missing"] else ""
        print(f"{choice['op']} on {choice['device']}: {choice['backend']}{why}")


def app() -> typer.Typer:
    """The command with its sub-commands."""
    command = typer.Typer(
        name="csq",
        help="Train mixed-precision networks with CSQ and see what they use.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    for function in (train, data, info):
        command.command()(function)
    return command


def main() -> None:
    """Entry point of ``csq``."""
    if typer is None:
        sys.exit(f"error: csq needs typer, which is not installed: {INSTALL}")
    app()()


if __name__ == "__main__":
    main()
