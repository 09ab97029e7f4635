"""``csq pack``, ``inspect``, ``verify`` and ``eval``: what happens to a network after its training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from csq_kernels.commands import FAILED, USAGE, fail, missing

_Run = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a finished csq train, or a checkpoint in it.")]
_File = Annotated[Path, typer.Argument(metavar="FILE", help="A packed file.")]
_Root = Annotated[Path | None, typer.Option(help="Folder or file of the data set; default: the usual places.")]


def _finished(run: Path, data_root: Path | None):
    """The recipe, data set and hard model of a run."""
    try:
        from csq_kernels.train import checkpoint, data, runs
    except ImportError as error:
        raise missing(error) from None
    try:
        return runs.load(run, data_root)
    except checkpoint.CheckpointError as error:
        raise fail(str(error), FAILED) from None
    except (runs.RunError, data.DataNotFoundError, data.DataError) as error:
        raise fail(str(error), USAGE) from None


def pack(
    run: _Run,
    out: Annotated[Path, typer.Option(help="The file to write.")],
    data_root: _Root = None,
):
    """Write the network of a finished run as one packed file of bit-planes; csq train has done so already.

    Examples:

      csq pack runs/demo --out demo.safetensors

    Exit codes: 0 written, 1 failed, 2 wrong run or data.
    """
    import csq_kernels as csq

    finished = _finished(run, data_root)
    from csq_kernels.train import runs

    csq.pack_(finished.model)
    try:
        written = csq.save_packed(finished.model, out, runs.describe(finished.recipe, finished.dataset))
    except OSError as error:
        raise fail(f"cannot write {out}: {error}", FAILED) from None
    print(written)


def inspect(file: _File, as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False):
    """Show what a packed file holds: bits, bytes and ratio of each layer. Reads and checks its header alone.

    Examples:

      csq inspect runs/demo/model.safetensors

      csq inspect runs/demo/model.safetensors --json

    Exit codes: 0 shown, 1 damaged or not a packed file.
    """
    from csq_kernels import packed

    try:
        content = packed.inspect(file)
    except (packed.PackedFileError, OSError) as error:
        raise fail(str(error), FAILED) from None
    print(json.dumps(content.to_dict(), indent=2) if as_json else content)


def _load(model, file: Path):
    from csq_kernels import packed

    try:
        return packed.load_packed(model, file)
    except (packed.PackedFileError, OSError) as error:
        raise fail(str(error), FAILED) from None


def verify(
    file: _File,
    against: Annotated[Path, typer.Option(metavar="RUN", help="Folder of the finished run, or a checkpoint in it.")],
    data_root: _Root = None,
):
    """Compare a packed file with the run it comes from: integer codes, outputs and predictions on the test samples.

    Examples:

      csq verify runs/demo/model.safetensors --against runs/demo

    Exit codes: 0 all codes and exact predictions are equal, 1 they are not, or the file is damaged,
    2 wrong run or data.
    """
    finished = _finished(against, data_root)
    from csq_kernels.train import runs

    model = runs.network(runs.describe(finished.recipe, finished.dataset))
    _load(model, file)
    comparison = runs.compare(model, finished.model, finished.dataset)
    print(comparison)
    if not comparison.equal:
        raise fail(f"expected {file} to be the network of {against}, got another", FAILED)


def evaluate(
    file: _File,
    precision: Annotated[str, typer.Option(help="exact, high, int8, or all of them.")] = "all",
    data_root: _Root = None,
):
    """Measure a packed network: accuracy and loss on the test part of its data set, time against the float network.

    Examples:

      csq eval runs/demo/model.safetensors

      csq eval runs/demo/model.safetensors --precision int8

    Exit codes: 0 measured, 1 damaged file, 2 wrong precision or data, or a file that csq did not train.
    """
    from csq_kernels import packed
    from csq_kernels._ops import PRECISIONS

    if precision not in (*PRECISIONS, "all"):
        raise fail(f"expected --precision as one of {', '.join(PRECISIONS)}, all, got {precision!r}", USAGE)
    try:
        from csq_kernels.train import data, runs
    except ImportError as error:
        raise missing(error) from None
    try:
        extra = packed.inspect(file).extra
    except (packed.PackedFileError, OSError) as error:
        raise fail(str(error), FAILED) from None
    try:
        model = runs.network(extra)
        dataset = runs.described_data(extra, data_root)
    except (runs.RunError, data.DataError, data.DataNotFoundError) as error:
        raise fail(str(error), USAGE) from None
    _load(model, file)
    print(runs.measure(model, dataset, PRECISIONS if precision == "all" else (precision,)))
