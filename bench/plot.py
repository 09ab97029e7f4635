"""Plots of the results, a PNG and an SVG a shape.

``python bench/plot.py bitserial`` draws time against stored bits, ``step`` the time and the memory of training steps.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

RESULTS = Path(__file__).parent / "results"
PRECISIONS = {"csq int8": "C0", "csq high": "C1", "csq exact": "C2"}
FAMILIES = {"torch": ("s", "C5"), "onnxruntime": ("^", "C3"), "ggml": ("D", "C4")}
WIDEST = 8  # wider peers are a line, the fp32 layer, or left out

Row = dict[str, Any]


def latest(rows: Iterable[Row], names: tuple[str, ...]) -> list[Row]:
    """The last line of each measurement that was repeated: of those in which these fields are the same."""
    return list({json.dumps([row[name] for name in names]): row for row in rows}.values())


def draw(axes: Axes, rows: list[Row]) -> None:
    """One batch and number of threads."""
    ours: dict[str, list[Row]] = defaultdict(list)
    peers: dict[int, list[Row]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: (row["stored_bits"], row["seconds"]["median"])):
        if row["family"] == "csq":
            ours[row["provider"]].append(row)
        elif row["stored_bits"] <= WIDEST:
            peers[row["stored_bits"]].append(row)
        elif row["provider"] == "torch fp32":
            axes.axhline(1e3 * row["seconds"]["median"], color="0.4", ls="--", label="torch fp32")
    for name, color in PRECISIONS.items():
        if name in ours:
            bits, times = zip(
                *((row["stored_bits"], 1e3 * row["seconds"]["median"]) for row in ours[name]), strict=True
            )
            axes.plot(bits, times, "o-", color=color, label=name, ms=4)
    labelled = set()
    for bits, group in peers.items():
        for row in group:
            marker, color = FAMILIES[row["family"]]
            label = row["family"] if row["family"] not in labelled else None
            labelled.add(row["family"])
            axes.plot(bits, 1e3 * row["seconds"]["median"], marker, color=color, ms=5, mfc="none", ls="", label=label)
        best = group[0]
        place = (bits, 1e3 * best["seconds"]["median"])
        short = best["provider"].removeprefix("ggml ").removeprefix("ort ").removeprefix("torch ")
        box = {"boxstyle": "square,pad=0.05", "color": "white", "alpha": 0.7}
        axes.annotate(short, place, xytext=(4, -9), textcoords="offset points", fontsize=6, color="0.25", bbox=box)
    n, k = rows[0]["shape"]
    floor = [1e3 * bits * n * k / 8 / rows[0]["read_bytes_per_second"] for bits in range(1, WIDEST + 1)]
    axes.plot(range(1, WIDEST + 1), floor, ":", color="black", label="weights at the read ceiling")
    axes.set(yscale="log", xticks=range(1, WIDEST + 1), xlim=(0.5, WIDEST + 2))
    axes.tick_params(labelsize=8)
    axes.set_title(f"batch {rows[0]['batch']}, threads {rows[0]['threads']}", fontsize=9)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.minorticks_off()
    axes.grid(alpha=0.3)


def bitserial(rows: list[Row], folder: Path) -> list[Path]:
    """Time against stored bits: a figure a shape, a column a batch, a row a number of threads; the peers as points."""
    written = []
    shapes: dict[tuple[int, ...], dict[tuple[int, int], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in latest(rows, ("provider", "stored_bits", "shape", "batch", "threads")):
        shapes[tuple(row["shape"])][row["threads"], row["batch"]].append(row)
    for shape, panels in shapes.items():
        threads, batches = (sorted({key[i] for key in panels}) for i in range(2))
        size = (1 + 4 * len(batches), 1 + 3 * len(threads))
        figure, grid = plt.subplots(len(threads), len(batches), figsize=size, squeeze=False, layout="constrained")
        for (thread, batch), panel in panels.items():
            draw(grid[threads.index(thread)][batches.index(batch)], panel)
        legends = [axes.get_legend_handles_labels() for axes in grid.flat]
        handles = {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8)
        for axes in grid[-1]:
            axes.set_xlabel("stored bits", fontsize=9)
        for axes in grid[:, 0]:
            axes.set_ylabel("ms a layer", fontsize=9)
        name = "x".join(map(str, shape))
        figure.suptitle(f"{name}, cold weights, {next(iter(panels.values()))[0]['machine']['isa']}", fontsize=10)
        written += save(figure, folder / f"bitserial-{name}")
    return written


def step(rows: list[Row], folder: Path) -> list[Path]:
    """Time and bytes of a training step: a figure a shape, a column a rule and kind of gates, a bar a provider."""
    written = []
    shapes: dict[tuple[int, ...], dict[tuple[str, str], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in latest(rows, ("provider", "rule", "gates", "shape")):
        shapes[tuple(row["shape"])][row["rule"], row["gates"]].append(row)
    for shape, panels in shapes.items():
        size = (1.5 + 3 * len(panels), 4)
        figure, grid = plt.subplots(2, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
        for (rule, gates), panel, (times, sizes) in zip(panels, panels.values(), grid.T, strict=True):
            names = [row["provider"] for row in panel]
            times.barh(names, [1e3 * row["seconds"]["median"] for row in panel], color="C0", label="median")
            floors = [1e3 * row["floor_seconds"] for row in panel]
            times.plot(floors, names, "|", color="black", ms=14, mew=2, label="copy floor")
            sizes.barh(names, [row["peak_bytes_per_weight"] for row in panel], color="C1", alpha=0.4, label="peak")
            sizes.barh(names, [row["state_bytes_per_weight"] for row in panel], color="C1", label="held after a step")
            times.set_title(f"{rule}, gates {gates}", fontsize=9)
            times.set_xlabel("ms a step", fontsize=9)
            sizes.set_xlabel("bytes a weight", fontsize=9)
            for axes in (times, sizes):
                axes.tick_params(labelsize=8)
                axes.grid(axis="x", alpha=0.3)
        grid[0, 0].invert_yaxis()
        legends = [axes.get_legend_handles_labels() for axes in grid[:, 0]]
        handles = {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), fontsize=8)
        name = "x".join(map(str, shape))
        machine = next(iter(panels.values()))[0]["machine"]
        figure.suptitle(f"a training step of {name}, {machine['isa']}, {machine['threads']} threads", fontsize=10)
        written += save(figure, folder / f"step-{name}")
    return written


def save(figure: Figure, path: Path) -> list[Path]:
    """The two images, and no figure left open."""
    written = [path.with_suffix(f".{suffix}") for suffix in ("png", "svg")]
    for image in written:
        figure.savefig(image, dpi=150)
    plt.close(figure)
    return written


PLOTS = {"bitserial": bitserial, "step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("op", choices=PLOTS)
    parser.add_argument("--results", type=Path, help="JSON lines of run.py; default results/OP.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the images")
    options = parser.parse_args()
    lines = (options.results or RESULTS / f"{options.op}.jsonl").read_text().splitlines()
    options.out.mkdir(parents=True, exist_ok=True)
    for path in PLOTS[options.op]([json.loads(line) for line in lines], options.out):
        print(path)


if __name__ == "__main__":
    main()
