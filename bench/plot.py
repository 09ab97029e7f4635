"""Plots of the results, each a PNG and an SVG: ``python bench/plot.py`` draws all of which there are lines.

``bitserial``: time against stored bits, a figure a shape. ``roofline``: the same lines as operations a second against
operations a byte. ``step``: time of training steps, a figure a shape. ``bytes``: bytes a weight of training steps.
``scaling``: time and memory against weights, bits, threads and batch.
"""

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

plt.rcParams["svg.hashsalt"] = "csq"
RESULTS = Path(__file__).parent / "results"
PRECISIONS = {"csq int8": "C0", "csq high": "C1", "csq exact": "C2"}
FAMILIES = {"torch": ("s", "C5"), "onnxruntime": ("^", "C3"), "ggml": ("D", "C4")}
BATCH_MARKERS = {1: "o", 8: "s", 64: "^"}
STEP_PROVIDERS = ("reference", "reference-compiled", "eager", "compiled", "separate", "single-pass")
STEP_PROVIDERS += ("single-pass-narrow",)
WIDEST = 8  # wider peers are a line, the fp32 layer, or left out

Row = dict[str, Any]
# What the suite scaling varies, one at a time.
AXES: dict[str, Callable[[Row], int]] = {
    "weights": lambda row: math.prod(row["shape"]),
    "bits": lambda row: row["n_bits"] if row["mode"] == "step" else row["stored_bits"],
    "threads": lambda row: row["threads"],
    "batch": lambda row: row.get("batch", 1),
}


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
    plain(axes.yaxis)
    axes.grid(alpha=0.3)


def plain(axis: Axis) -> None:
    """Numbers as one reads them on a logarithmic axis."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


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
        machine = next(iter(panels.values()))[0]["machine"]
        figure.suptitle(f"{name}, weights from memory: {machine['cpu']}, {machine['isa']}", fontsize=10)
        written += save(figure, folder / f"bitserial-{name}")
    return written


def roofline(rows: list[Row], folder: Path) -> list[Path]:
    """Operations a second against operations a byte of weight: a figure a shape, a panel a number of threads.

    The roof is the memory's, at the bandwidth with which it was read in the same run; above it there is a cache.
    """
    written = []
    shapes: dict[tuple[int, ...], dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in latest(rows, ("provider", "stored_bits", "shape", "batch", "threads")):
        shapes[tuple(row["shape"])][row["threads"]].append(row)
    providers = {**PRECISIONS, "torch fp32": "0.4"}
    for shape, panels in shapes.items():
        size = (1 + 5 * len(panels), 4.6)
        figure, grid = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
        for axes, (threads, panel) in zip(grid[0], sorted(panels.items()), strict=True):
            reached = 0.0
            for row in panel:
                if row["provider"] not in providers:
                    continue
                marker = BATCH_MARKERS.get(row["batch"], "x")
                operations = 2 * shape[0] * shape[1] * row["batch"]
                rate = operations / row["seconds"]["median"] / 1e9
                reached = max(reached, rate)
                color = providers[row["provider"]]
                axes.plot(operations / row["weight_bytes"], rate, marker, color=color, ms=4 + row["stored_bits"] / 4)
            bandwidth = statistics.median(row["read_bytes_per_second"] for row in panel) / 1e9
            roof = [0.3, 1.5 * reached / bandwidth]
            axes.plot(roof, [bandwidth * x for x in roof], "k:")
            axes.set(xscale="log", yscale="log")
            axes.set_title(f"threads {threads}, memory read at {bandwidth:.0f} GB/s", fontsize=9)
            axes.set_xlabel("operations a byte of weight", fontsize=9)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator())
                plain(axis)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3)
        grid[0, 0].set_ylabel("10^9 additions and multiplications a second", fontsize=9)
        legend = [Line2D([], [], marker="o", ls="", color=color, label=name) for name, color in providers.items()]
        legend += [
            Line2D([], [], marker=marker, ls="", color="0.2", mfc="none", label=f"batch {batch}")
            for batch, marker in BATCH_MARKERS.items()
        ]
        legend.append(Line2D([], [], ls=":", color="black", label="memory"))
        figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), fontsize=8)
        name = "x".join(map(str, shape))
        machine = panel[0]["machine"]
        title = f"{name}, weights from memory, 1 to 8 bits (the larger, the more) and float32"
        figure.suptitle(f"{title}: {machine['cpu']}, {machine['isa']}", fontsize=10)
        written += save(figure, folder / f"roofline-{name}")
    return written


def step(rows: list[Row], folder: Path) -> list[Path]:
    """Time of a training step: a figure a shape, a column a rule and kind of gates, a line a provider."""
    written = []
    shapes: dict[tuple[int, ...], dict[tuple[str, str], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        panel = shapes[tuple(row["shape"])][row["rule"], row["gates"]]
        # Times of different runs are not comparable: the last one counts.
        if panel and (panel[-1]["commit"], panel[-1]["machine"]) != (row["commit"], row["machine"]):
            panel.clear()
        panel.append(row)
    for shape, panels in shapes.items():
        size = (1.5 + 3 * len(panels), 2.8)
        figure, grid = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True, layout="constrained")
        names = [name for name in STEP_PROVIDERS if any(row["provider"] == name for p in panels.values() for row in p)]
        for (rule, gates), panel, axes in zip(panels, panels.values(), grid[0], strict=True):
            found = {row["provider"]: row for row in panel}
            measured = [name for name in names if name in found]
            heights = [names.index(name) for name in measured]
            times = [1e3 * found[name]["seconds"]["median"] for name in measured]
            axes.scatter(times, heights, color=[ours_or_not(name) for name in measured], zorder=3)
            for time, height in zip(times, heights, strict=True):
                label = f"{time:.0f}" if time >= 100 else f"{time:.3g}"
                axes.annotate(label, (time, height), xytext=(7, -3), textcoords="offset points", fontsize=8)
            floors = [1e3 * found[name]["floor_seconds"] for name in measured]
            axes.plot(floors, heights, "|", color="black", ms=10, mew=1.5, label="copy floor")
            for name in set(names) - set(measured):
                axes.text(min(floors), names.index(name), "not measured", fontsize=7, va="center", color="0.5")
            axes.set(
                xscale="log", xlim=(0.7 * min(floors), 2.5 * max(times)), yticks=range(len(names)), yticklabels=names
            )
            axes.set_title(f"{rule}, gates {gates}\n{panel[-1]['machine']['isa']}, {panel[-1]['commit']}", fontsize=8)
            axes.set_xlabel("ms a step", fontsize=9)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            plain(axes.xaxis)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3)
        grid[0, 0].set_ylim(len(names) - 0.5, -0.5)
        grid[0, 0].legend(fontsize=7, loc="lower right")
        name = "x".join(map(str, shape))
        machine = next(iter(panels.values()))[0]["machine"]
        figure.suptitle(f"a training step of {name}, {machine['cpu']}, {machine['threads']} threads", fontsize=10)
        written += save(figure, folder / f"step-{name}")
    return written


def ours_or_not(provider: str) -> str:
    """The colour of a provider."""
    return "C0" if provider.startswith(("single-pass", "separate")) else "0.5"


def bytes_per_weight(rows: list[Row], folder: Path) -> list[Path]:
    """What a provider holds when a step has ended, and at most within it: a panel a rule; the largest shape counts."""
    rows = sorted((row for row in rows if row["gates"] == "moving"), key=lambda row: math.prod(row["shape"]))
    panels: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        panels[row["rule"]][row["provider"]] = row
    if not panels:
        return []
    size = (1.5 + 4 * len(panels), 3.2)
    figure, grid = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharex=True, layout="constrained")
    for axes, (rule, found) in zip(grid[0], panels.items(), strict=True):
        names = [name for name in STEP_PROVIDERS if name in found]
        peaks = [found[name]["peak_bytes_per_weight"] for name in names]
        held = [found[name]["state_bytes_per_weight"] for name in names]
        bars = axes.barh(names, peaks, color="C1", alpha=0.4, label="at most within a step")
        axes.barh(names, held, color="C1", label="held after a step")
        labels = [f"{h:.0f}" if p - h < 0.5 else f"{h:.0f}, {p:.0f}" for h, p in zip(held, peaks, strict=True)]
        axes.bar_label(bars, labels, fontsize=8, padding=3)
        axes.set_title(f"{rule}, gates moving", fontsize=9)
        axes.set_xlabel("bytes a weight of 8 bits", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(axis="x", alpha=0.3)
        axes.margins(x=0.25)
        axes.invert_yaxis()
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return save(figure, folder / "bytes-per-weight")


def scaling(rows: list[Row], folder: Path) -> list[Path]:
    """A figure an operation: above time, below bytes a weight; a column for each of ``AXES`` that was swept."""
    written = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        points = [(row, {name: value(row) for name, value in AXES.items()}) for row in rows if row["mode"] == mode]
        swept = [name for name in AXES if any(row["sweep"] == name for row, _ in points)]
        size = (1 + 3.4 * len(swept), 6)
        figure, grid = plt.subplots(2, len(swept), figsize=size, squeeze=False, sharey="row", layout="constrained")
        for name, (times, sizes) in zip(swept, grid.T, strict=True):
            # Where the others stand; a case that belongs to two sweeps was measured in one of them.
            others = next({**at, name: None} for row, at in points if row["sweep"] == name)
            line: dict[str, dict[float, Row]] = defaultdict(dict)
            for row, at in points:
                if {**at, name: None} == others:
                    line[row["provider"]][at[name]] = row
            for color, (provider, found) in enumerate(sorted(line.items())):
                at = sorted(found)
                style = {"color": f"C{color}", "label": provider, "ms": 3.5}
                times.plot(at, [1e3 * found[x]["seconds"]["median"] for x in at], "o-", **style)
                sizes.plot(at, [peak_of(found[x]) for x in at], "o-", **style)
            for axes in (times, sizes):
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
                plain(axes.yaxis)
                axes.grid(alpha=0.3)
                axes.tick_params(labelsize=8)
                if name in ("weights", "batch"):
                    axes.set_xscale("log", base=2)
                else:
                    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
                axes.set_xlabel(name, fontsize=9)
            rest = (f"{key} {number:,}" for key, number in others.items() if number is not None and key in swept)
            times.set_title(", ".join(rest), fontsize=8)
        grid[0, 0].set_ylabel("ms", fontsize=9)
        grid[1, 0].set_ylabel("bytes a weight, at most", fontsize=9)
        handles, labels = grid[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8)
        machine = points[-1][0]["machine"]
        figure.suptitle(f"{mode}: {machine['cpu']}, {machine['isa']}", fontsize=10)
        written += save(figure, folder / f"scaling-{mode}")
    return written


def peak_of(row: Row) -> float:
    """Most bytes a weight at a time, those of the weight included."""
    if "peak_bytes_per_weight" in row:
        return row["peak_bytes_per_weight"]
    return (row["weight_bytes"] + row["peak_bytes"]) / math.prod(row["shape"])


def save(figure: Figure, path: Path) -> list[Path]:
    """The two images, and no figure left open."""
    written = [path.with_suffix(f".{suffix}") for suffix in ("png", "svg")]
    for image in written:
        # The same lines make the same file.
        figure.savefig(image, dpi=150, metadata={"Date": None} if image.suffix == ".svg" else None)
    plt.close(figure)
    return written


# The file of the lines, and what draws them.
PLOTS = {
    "bitserial": ("bitserial", bitserial),
    "roofline": ("bitserial", roofline),
    "step": ("step", step),
    "bytes": ("step", bytes_per_weight),
    "scaling": ("scaling", scaling),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plots", nargs="*", metavar="PLOT", help=f"of {', '.join(PLOTS)}; default all")
    parser.add_argument("--results", type=Path, help="JSON lines of run.py; default results/SUITE.jsonl")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the images; default results")
    options = parser.parse_args()
    if unknown := set(options.plots) - set(PLOTS):
        parser.error(f"expected plots of {', '.join(PLOTS)}, got {', '.join(unknown)}")
    options.out.mkdir(parents=True, exist_ok=True)
    for plot in options.plots or PLOTS:
        suite, draw_lines = PLOTS[plot]
        results = options.results or RESULTS / f"{suite}.jsonl"
        if not results.exists():
            print(f"without {plot}: there is no {results}")
            continue
        for path in draw_lines([json.loads(line) for line in results.read_text().splitlines()], options.out):
            print(path)


if __name__ == "__main__":
    main()
