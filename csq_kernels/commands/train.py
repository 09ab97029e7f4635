"""``csq train`` and ``csq sweep``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from csq_kernels.commands import FAILED, INTERRUPTED, TIME_UP, USAGE, fail, missing


def _free_folder(name: str) -> Path:
    """The first of runs/name, runs/name-2, ... that does not exist."""
    folder, number = Path("runs") / name, 2
    while folder.exists():
        folder, number = Path("runs") / f"{name}-{number}", number + 1
    return folder


def _stands(folder: Path) -> str:
    from csq_kernels.train import checkpoint

    return f"; the last checkpoint in {folder} stands" if checkpoint.exists(folder) else ""


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    """Turn what can go wrong in training into one line and an exit code."""
    import torch

    from csq_kernels.train import checkpoint, data, running
    from csq_kernels.train import recipe as recipes

    try:
        yield
    except (recipes.RecipeError, running.TrainingError, data.DataNotFoundError, data.DataError) as error:
        raise fail(str(error), USAGE) from None
    except checkpoint.CheckpointError as error:
        raise fail(str(error), FAILED) from None
    except OSError as error:
        raise fail(f"cannot write to {folder}: {error}{_stands(folder)}", FAILED) from None
    except (MemoryError, RuntimeError) as error:
        # torch has an exception of its own for devices only.
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        reason = (str(error).strip().splitlines() or ["of the process"])[0]
        raise fail(f"out of memory: {reason}; lower batch_size or data.workers{_stands(folder)}", FAILED) from None
    except running.TimeUpError as error:
        print(f"{error}; go on with --out {folder} --resume")
        raise typer.Exit(TIME_UP) from None
    except KeyboardInterrupt:
        raise fail(f"interrupted; go on from the last checkpoint with --out {folder} --resume", INTERRUPTED) from None


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
        float | None, typer.Option(min=0, help="End within so many minutes with a whole model: shorten what is longer.")
    ] = None,
    pause_after: Annotated[
        float | None, typer.Option(min=0, help="Stop after so many minutes, with a checkpoint to resume from.")
    ] = None,
):
    """Train a network with CSQ: a float baseline, the search for bits within a budget, exact integers.

    The folder of the run holds its recipe, metrics.jsonl, report.txt and .json,
    environment.json, the checkpoint, and report.html with its pictures. A run that
    was killed goes on with --resume and ends with the very same bits.

    Examples:

      csq train demo

      csq train digits_mlp budget="2.5 bits" epochs.search=10 --out runs/small --seed 1

      csq train runs/small/recipe.yaml --out runs/small --resume

      csq train fashion_mnist_resnet20 data.root=/data/fashion --device cuda

    Exit codes: 0 finished, 1 failed, 2 wrong recipe, option or data, 3 out of time, 130 interrupted.
    """
    try:
        import rich.console

        from csq_kernels.train import display, loop
        from csq_kernels.train import recipe as recipes
    except ImportError as error:
        raise missing(error) from None
    if resume and out is None:
        raise fail("--resume needs --out, the folder of the run to go on with", USAGE)
    try:
        chosen = recipes.load(recipe, overrides, seed)
    except recipes.RecipeError as error:
        raise fail(str(error), USAGE) from None
    folder = out if out is not None else _free_folder(chosen.name)
    console = rich.console.Console()
    with _explained(folder), display.make(console) as shown:
        times = {"max_minutes": max_minutes, "pause_after": pause_after}
        result = loop.train(chosen, folder, resume=resume, device=device, display=shown, **times)
    pages = _write_page(folder)
    print((folder / "report.txt").read_text())
    print(f"{result['seconds']:.0f} s; everything is in {folder}{pages}")


def _write_page(folder: Path, against: Sequence[Path] = ()) -> str:
    """What to say of the page and its pictures; they need matplotlib, and training does not."""
    from csq_kernels.train import results, runs

    try:
        from csq_kernels.train import page

        others = [results.read(other) for other in against]
        return f": {', '.join(path.name for path in page.write(results.read(folder), others))}"
    except (ImportError, OSError, runs.RunError) as error:
        return f" (no report.html: {error})"


def sweep(
    run: Annotated[Path, typer.Argument(help="Folder of a run whose search is over.")],
    budgets: Annotated[list[str], typer.Argument(metavar="BUDGET...", help='Such as "2 bits" "2.5 bits" "0.05 MB".')],
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Of finetuning for each budget; default: those of the run.")
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
):
    """Meet several budgets from one search: a finetuned network for each, and a table.

    The search of the run is not repeated: its gates say which bits each budget
    keeps. What is finished already is not trained again.

    Example:

      csq sweep runs/demo "2 bits" "2.5 bits" "4 bits" --epochs 3

    Exit codes: 0 finished, 1 failed, 2 wrong run or budget, 130 interrupted.
    """
    try:
        import rich.console

        from csq_kernels.train import display
        from csq_kernels.train import sweep as sweeps
    except ImportError as error:
        raise missing(error) from None
    with _explained(run), display.make(rich.console.Console()) as shown:
        rows = sweeps.sweep(run, budgets, epochs=epochs, device=device, display=shown)
    print(sweeps.show(rows))
    pages = _write_page(run, [sweeps.folder_of(run, budget) for budget in budgets])
    print(f"everything is in {run}: sweep.csv and, with these networks beside the run's own{pages}")
