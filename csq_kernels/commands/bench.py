"""``csq bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from csq_kernels.commands import FAILED, USAGE, fail, missing


def bench(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A packed file that csq wrote.")],
    precision: Annotated[str, typer.Option(help="exact, high or int8.")] = "exact",
    batch: Annotated[int, typer.Option(min=1, help="Samples at once.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the processor; default: as PyTorch chooses.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
):
    """Time a packed network and each of its layers on the processor against the float network of equal weights.

    A line says which kernel the layer got: an instruction set with look-up, byte
    products or float products, or unpacked to PyTorch, where that is faster. Times
    are medians of interleaved rounds on random input, as good as the machine is quiet.

    Examples:

      csq bench runs/demo/model.safetensors

      csq bench runs/demo/model.safetensors --precision int8 --threads 1 --batch 8 --json

    Exit codes: 0 measured, 1 damaged file, 2 wrong option, or a file that csq did not train.
    """
    import torch

    from csq_kernels import packed
    from csq_kernels._ops import PRECISIONS

    if precision not in PRECISIONS:
        raise fail(f"expected --precision as one of {', '.join(PRECISIONS)}, got {precision!r}", USAGE)
    try:
        import rich.console

        from csq_kernels.train import comparison, models, runs
    except ImportError as error:
        raise missing(error) from None
    try:
        description = packed.inspect(file).extra
        model = runs.network(description)
        packed.load_packed(model, file, precision)
    except runs.RunError as error:
        raise fail(str(error), USAGE) from None
    except (packed.PackedFileError, OSError) as error:
        raise fail(str(error), FAILED) from None
    from csq_kernels.layer_times import layer_times

    if threads is not None:
        torch.set_num_threads(threads)
    channels, image_size, classes = description["sizes"]
    times = layer_times(model, models.example_input(description["model"], channels, image_size, classes, batch))
    about = {"precision": precision, "batch": batch, "threads": torch.get_num_threads()}
    if as_json:
        print(json.dumps({"file": str(file), **about, **times.to_dict()}, indent=2))
        return
    heads = ("layer", "shape", "stored bits", "kernel", "packed ms", "float ms", "ratio")
    rows = [
        (row.name, "x".join(map(str, row.shape)), str(row.stored_bits), row.kernel or "not called", *_cells(row))
        for row in times.layers
    ]
    rows.append(("whole network", "", "", "", *_cells(times)))
    title = ", ".join(f"{name} {value}" for name, value in about.items())
    comparison.show_table(rich.console.Console(), title, heads, rows)


def _cells(times) -> tuple[str, str, str]:
    ratio = "" if times.ratio is None else f"{times.ratio:.2f}x"
    return f"{times.packed_ms:.4f}", f"{times.float_ms:.4f}", ratio
