"""The pictures of a finished run, one function each; ``PICTURES`` names, explains and orders them. Needs matplotlib."""

import contextlib
import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from csq_kernels.budget import Budget
from csq_kernels.train.results import Layer, Record, Results

if TYPE_CHECKING:
    from matplotlib.colorbar import Colorbar

# Inches. A narrow picture is for a screen of a hand's width: the same text, less beside it.
WIDE, NARROW = 7.2, 3.9
ACCENT, PALE, INK, GREY, LINES = "#2456b8", "#c3d3ef", "#1f2430", "#6b7280", "#c9ced6"
_SHADES = LinearSegmentedColormap.from_list("csq", ["#f3f6fb", "#bccdec", "#6f93d8", ACCENT])
_PHASES = {"float": "float", "search": "search", "finetune": "fine-tuning", "lsq": "LSQ"}
# What a screen reads best with, of the page and of its pictures; they are measured in the widest, which matplotlib has.
FONTS = "-apple-system, BlinkMacSystemFont, 'Segoe UI', Roboto, 'Helvetica Neue', 'Noto Sans', Arial, sans-serif"
_MEASURED_FONT = "DejaVu Sans"
_MARKERS = {"csq": "o", "float": "D", "lsq": "s", "round": "^"}
_STYLE: Any = {
    "font.family": _MEASURED_FONT,
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.edgecolor": LINES,
    "axes.labelcolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#eceef2",
    "text.color": INK,
    # A layer may be called what TeX would call mathematics.
    "text.parse_math": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.solid_capstyle": "round",
    # The text of an SVG stays text, and two files of one run are equal.
    "svg.fonttype": "none",
    "svg.hashsalt": "csq_kernels",
    "savefig.transparent": True,
}
# Most rows with a name of their own, and letters of a name.
_NAMED_ROWS, _LETTERS = 60, 26


@dataclass(frozen=True)
class Picture:
    """``name`` of its file, a ``title``, a sentence that explains it, who draws it, and why it may be missing."""

    name: str
    title: str
    caption: str
    draw: Callable[[Figure, Results, Sequence[Results]], None]
    missing: Callable[[Results], str | None]


def _is_narrow(figure: Figure) -> bool:
    return figure.get_figwidth() < (WIDE + NARROW) / 2


def _short(name: str) -> str:
    return name if len(name) <= _LETTERS else f"{name[: _LETTERS // 2 - 1]}…{name[-_LETTERS // 2 :]}"


def _name_rows(axes: Axes, positions: Sequence[float], names: Sequence[str]) -> None:
    step = -(-len(names) // _NAMED_ROWS)
    axes.set_yticks(list(positions)[::step], [_short(name) for name in names][::step], color=INK)


def _mark_phases(axes: Axes, results: Results, named: bool = True) -> None:
    """A dotted line, and a name above it, where each phase begins; the axis of epochs is set already."""
    starts: dict[str, float] = {}
    begin = 0.0
    for record in results.records:
        starts.setdefault(record.phase, begin)
        begin = record.epoch
    first, last = axes.get_xlim()
    ends = [*list(starts.values())[1:], begin]
    for (phase, start), end in zip(starts.items(), ends, strict=True):
        if end <= first or start >= last:
            continue
        if start > first:
            axes.axvline(start, color=GREY, linestyle=":", linewidth=0.8)
        if named:
            place, text = (max(start, first), 1), _PHASES.get(phase, phase)
            axes.annotate(text, place, (2, 3), ("data", "axes fraction"), "offset points", fontsize=7.5, color=GREY)


def _epochs_axis(axes: Axes, records: Sequence[Record], first: float | None = None) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    edges = _cells(records)[1]
    axes.set_xlim(edges[0] if first is None else first, edges[-1])


def _cells(records: Sequence[Record]) -> tuple[Sequence[Record], list[float]]:
    """Columns of a map over time and their edges: what was recorded holds until the next record."""
    epochs = [record.epoch for record in records]
    return (records, [epochs[0] - 1, epochs[0]]) if len(records) == 1 else (records[:-1], epochs)


def _legend(figure: Figure, axes: Axes) -> None:
    """Above the axes: beside one another where there is room, bars first."""
    handles, labels = axes.get_legend_handles_labels()
    bars = sorted(zip(handles, labels, strict=True), key=lambda pair: isinstance(pair[0], Line2D))
    options = {"loc": "outside upper left", "ncols": 1 if _is_narrow(figure) else 3, "handlelength": 1.4}
    figure.legend([handle for handle, _ in bars], [label for _, label in bars], **options)  # type: ignore[arg-type]


def _quantized(results: Results) -> list[Record]:
    return [record for record in results.records if record.layer_bits]


def _layers(results: Results) -> list[Layer]:
    return [] if results.report.scheme is None else results.report.scheme.layers


def _per_layer(axes: Axes, results: Results, epochs: Sequence[float], lines: dict[str, list[float]], **options) -> None:
    """A thin grey line a layer, a thick one for their average over the weights."""
    weights = {layer.name: layer.weights for layer in _layers(results)}
    for number, values in enumerate(lines.values()):
        axes.plot(epochs, values, color=LINES, linewidth=1, label=None if number else "each layer", **options)
    total = sum(weights[name] for name in lines)
    rows = zip(*lines.values(), strict=True)
    average = [sum(v * weights[name] for v, name in zip(row, lines, strict=True)) / total for row in rows]
    axes.plot(epochs, average, color=ACCENT, linewidth=2, label="average over the weights", **options)


def bits_per_layer(figure: Figure, results: Results, _: Sequence[Results]) -> None:
    """Two bars a layer, stored and paper bits, and the average of the stored ones."""
    layers = _layers(results)
    figure.set_figheight(1.0 + max(0.12, min(0.3, 15 / len(layers))) * len(layers))
    axes = figure.subplots()
    rows = range(len(layers))
    axes.barh(rows, [layer.stored_bits for layer in layers], 0.72, color=PALE, label="stored in the file")
    axes.barh(rows, [layer.paper_bits for layer in layers], 0.3, color=ACCENT, label="paper bits (bits in use)")
    if len(layers) <= _NAMED_ROWS:
        for row, layer in enumerate(layers):
            axes.annotate(
                str(layer.stored_bits), (layer.stored_bits, row), (4, 0), textcoords="offset points", va="center"
            )
    assert results.report.scheme is not None
    average = results.report.scheme.stored_bits
    axes.axvline(average, color=INK, linestyle="--", linewidth=0.9, label=f"stored, on average: {average:.2f}")
    _name_rows(axes, rows, [layer.name for layer in layers])
    axes.set_ylim(len(layers) - 0.45, -0.55)
    axes.set_xlim(0, max(layer.stored_bits for layer in layers) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(False, axis="y")
    axes.set_xlabel("bits a weight (float has 32)")
    _legend(figure, axes)


def _budget_line(results: Results) -> tuple[float, str, str] | None:
    """The first budget as an average over the weights, how to call it, and whether it counts paper or stored bits.

    ``None`` where it is none of the weights alone.
    """
    scheme = results.report.scheme
    if scheme is None or not scheme.budget:
        return None
    try:
        budget = Budget.parse(scheme.budget)
    except ValueError:
        return None
    if budget.needs_workload:
        return None
    if budget.unit != "MB":
        return budget.value, f"budget: {budget}", budget.unit.split()[0]
    weights = sum(layer.weights for layer in scheme.layers)
    planes = sum(layer.stored_bits * ((layer.weights + 7) // 8) for layer in scheme.layers)
    rest = scheme.bytes - planes
    return 8 * (1e6 * budget.value - rest) / weights, f"budget: {budget}", "stored"


def bits_over_time(figure: Figure, results: Results, _: Sequence[Results]) -> None:
    """The bits of the layers as lines with the budget, and as a map of layers over epochs."""
    records = _quantized(results)
    names = list(records[0].layer_bits)
    budget = _budget_line(results)
    unit = "stored" if budget is None else budget[2]

    def bits(record: Record, name: str) -> int:
        return getattr(record.layer_bits[name], unit)

    below = max(0.11, min(0.24, 9 / len(names))) * len(names) + 0.75
    figure.set_figheight(2.4 + below)
    lines, rows = figure.subplots(2, 1, sharex=True, height_ratios=[2.1, below])
    epochs = [record.epoch for record in records]
    by_layer: dict[str, list[float]] = {name: [bits(record, name) for record in records] for name in names}
    _per_layer(lines, results, epochs, by_layer, drawstyle="steps-post")
    if budget is not None:
        lines.axhline(budget[0], color=INK, linestyle="--", linewidth=0.9, label=budget[1])
    lines.set_ylim(bottom=0)
    lines.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    lines.set_ylabel(f"{unit} bits a weight")
    _legend(figure, lines)

    columns, edges = _cells(records)
    most = max(bits(record, name) for record in records for name in names)
    table = [[bits(record, name) for record in columns] for name in names]
    rows.pcolormesh(edges, range(len(names) + 1), table, cmap=_SHADES, vmin=0, vmax=most, rasterized=True)
    _name_rows(rows, [row + 0.5 for row in range(len(names))], names)
    rows.invert_yaxis()
    rows.grid(False)
    if len(names) <= _NAMED_ROWS:
        for row, name in enumerate(names):
            place = (1.01, row + 0.5)
            rows.annotate(str(bits(records[-1], name)), place, xycoords=("axes fraction", "data"), va="center")
    rows.set_title(f"layer by layer: empty is 0, full colour {most}", **_SUBTITLE)
    _epochs_axis(rows, records)
    _mark_phases(lines, results)


_SUBTITLE = {"loc": "left", "fontsize": 8, "color": GREY}


def gap(figure: Figure, results: Results, _: Sequence[Results]) -> None:
    """Accuracy with soft and with hard bits, and the distance between the weights."""
    records = [record for record in results.epochs if record.weight_gap]
    figure.set_figheight(4.6)
    above, below = figure.subplots(2, 1, sharex=True)
    epochs = [record.epoch for record in records]
    soft = [100 * (record.test_accuracy or 0.0) for record in records]
    hard = [100 * (math.nan if record.hard_accuracy is None else record.hard_accuracy) for record in records]
    above.fill_between(epochs, soft, hard, color=PALE, alpha=0.5, linewidth=0)
    above.plot(epochs, soft, color=GREY, linewidth=1.5, label="with soft bits")
    above.plot(epochs, hard, color=ACCENT, linewidth=2, label="if made integers now")
    above.set_ylabel("test accuracy (%)")
    above.legend(loc="lower right")
    lines = {name: [100 * record.weight_gap[name] for record in records] for name in records[0].weight_gap}
    _per_layer(below, results, epochs, lines)
    below.set_ylim(bottom=0)
    below.set_ylabel("distance of weights (%)")
    below.legend(loc="upper right")
    _epochs_axis(below, records)
    _mark_phases(above, results)
    _mark_phases(below, results, named=False)


def undecided(figure: Figure, results: Results, _: Sequence[Results]) -> None:
    """Share of the bits in use that are neither 0 nor 1 yet."""
    records = [record for record in results.epochs if record.undecided]
    figure.set_figheight(2.8)
    axes = figure.subplots()
    lines = {name: [100 * record.undecided[name] for record in records] for name in records[0].undecided}
    _per_layer(axes, results, [record.epoch for record in records], lines)
    axes.set_ylim(0, 103)
    axes.set_ylabel("undecided bits (%)")
    _legend(figure, axes)
    _epochs_axis(axes, records)
    _mark_phases(axes, results)


def gates(figure: Figure, results: Results, _: Sequence[Results]) -> None:
    """G_b of equation (2) as a map: a row a bit, grouped by layer."""
    records = [record for record in results.epochs if record.gates]
    names = list(records[0].gates)
    columns, edges = _cells(records)
    # The highest bit on top, and a gap of one row between two layers.
    rows: list[list[float]] = []
    centres = []
    for name in names:
        planes = [record.gates[name] for record in columns]
        bits = len(planes[0])
        centres.append(len(rows) + bits / 2)
        rows += [[values[bit] for values in planes] for bit in reversed(range(bits))]
        rows.append([math.nan] * len(columns))
    rows.pop()
    figure.set_figheight(1.3 + min(0.055 * len(rows), 11.0))
    axes = figure.subplots()
    mesh = axes.pcolormesh(edges, range(len(rows) + 1), rows, cmap=_SHADES, vmin=0, vmax=1, rasterized=True)
    _name_rows(axes, centres, names)
    axes.invert_yaxis()
    axes.grid(False)
    bar: Colorbar = figure.colorbar(mesh, ax=axes, location="top", aspect=40, shrink=0.6, anchor=(0, 0.5))
    bar.set_ticks([0, 0.5, 1], labels=["0: bit off", "gate G", "1: bit on"])
    bar.outline.set_visible(False)
    _epochs_axis(axes, records)
    _mark_phases(axes, results)


def training(figure: Figure, results: Results, _: Sequence[Results]) -> None:
    """Loss and accuracies over all phases."""
    records, tested = results.records, results.epochs
    figure.set_figheight(4.6)
    above, below = figure.subplots(2, 1, sharex=True)
    epochs = [record.epoch for record in records]
    above.plot(epochs, [record.loss for record in records], color=LINES, linewidth=1.2)
    losses = [(record.epoch, record.test_loss) for record in tested if record.test_loss is not None]
    if losses:
        above.plot(*zip(*losses, strict=True), color=ACCENT, linewidth=2)
    above.set_yscale("log")
    above.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    above.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    above.yaxis.set_minor_formatter(NullFormatter())
    above.set_ylabel("loss (nats, log)")
    below.plot(
        epochs, [100 * record.train_accuracy for record in records], color=LINES, linewidth=1.2, label="training"
    )
    accuracies = [100 * (record.test_accuracy or 0.0) for record in tested]
    below.plot([record.epoch for record in tested], accuracies, color=ACCENT, linewidth=2, label="test")
    shown = accuracies
    if results.hard_accuracy is not None:
        hard = 100 * results.hard_accuracy
        label = f"exact integers: {hard:.2f} %"
        below.plot([epochs[-1]], [hard], "o", color=INK, markersize=5, clip_on=False, zorder=5, label=label)
        shown = [*accuracies, hard]
    # The first epochs would squeeze everything that matters into a line.
    ordered = sorted(shown)
    below.set_ylim(max(0.0, ordered[len(ordered) // 5] - 5), 100.5)
    below.set_ylabel("accuracy (%)")
    below.legend(loc="lower right")
    _epochs_axis(below, records, first=0.0)
    _mark_phases(above, results)
    _mark_phases(below, results, named=False)


@dataclass(frozen=True)
class Point:
    """A network in the plane of size and accuracy; ``kind`` is its method and, where it has any, its stored bits."""

    kind: str
    seed: int
    method: str
    size: int
    accuracy: float
    own: bool


def _kind(results: Results) -> str:
    scheme = results.report.scheme
    return results.report.method + ("" if scheme is None else f" {scheme.stored_bits:.2f} bits")


def points(results: Results, against: Sequence[Results]) -> list[Point]:
    """This run, its own float baseline, and the other runs; those without a size or an accuracy are left out."""
    scheme, accuracy = results.report.scheme, results.report.float_accuracy
    found = []
    for run in (results, *against):
        size = run.size
        if size is None and scheme is not None and run.chosen.model == results.chosen.model:
            # A float run of the same network writes no packed file.
            size = scheme.float_bytes
        if size is not None and run.accuracy is not None:
            found.append(Point(_kind(run), run.seed, run.report.method, size, run.accuracy, run is results))
    if results.report.method != "float" and scheme is not None and accuracy is not None:
        found.append(Point("float", results.seed, "float", scheme.float_bytes, accuracy, True))
    return found


def accuracy_against_size(figure: Figure, results: Results, against: Sequence[Results]) -> None:
    """A point a network, each with its label."""
    figure.set_figheight(3.4)
    axes = figure.subplots()
    shown = points(results, against)
    for point in shown:
        fill = ACCENT if point.own and point.method == results.report.method else "white"
        edge = ACCENT if point.own else GREY
        style = {"markersize": 7, "markeredgecolor": edge, "markerfacecolor": fill, "markeredgewidth": 1.4}
        order = 4 if point.own else 3
        marker = _MARKERS.get(point.method, "v")
        axes.plot([point.size / 1e3], [100 * point.accuracy], marker, linestyle="", zorder=order, **style)  # type: ignore[arg-type]
    axes.set_xscale("log")
    sizes, accuracies = [point.size / 1e3 for point in shown], [100 * point.accuracy for point in shown]
    axes.set_xlim(min(sizes) / 1.5, max(sizes) * 1.5)
    margin = max(0.25, 0.2 * (max(accuracies) - min(accuracies)))
    axes.set_ylim(min(accuracies) - margin, max(accuracies) + margin)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("size of the file (kB, log)")
    axes.set_ylabel("test accuracy (%)")
    figure.draw_without_rendering()
    _label_points(axes, shown)


def _labels(shown: Sequence[Point]) -> list[tuple[str, float, float, bool]]:
    """Text, mean size in kB, mean accuracy in percent, own or not: one label for all other seeds of a kind."""
    groups: dict[tuple[str, bool], list[Point]] = {}
    for point in shown:
        groups.setdefault((point.kind, point.own), []).append(point)
    labels = []
    for (kind, own), members in groups.items():
        seeds = f"seed{'s' if len(members) > 1 else ''} {', '.join(str(point.seed) for point in members)}"
        size = math.prod(point.size / 1e3 for point in members) ** (1 / len(members))
        labels.append((f"{kind}, {seeds}", size, 100 * sum(point.accuracy for point in members) / len(members), own))
    return labels


def _label_points(axes: Axes, shown: Sequence[Point]) -> None:
    """Labels beside their points, on the side with more room, moved up until none covers another."""
    width, height = axes.bbox.width, axes.bbox.height
    size = 7.5 * axes.figure.dpi / 72
    taken: list[tuple[float, float, float]] = []
    for text, kilobytes, accuracy, own in sorted(_labels(shown), key=lambda each: each[2]):
        x, y = axes.transData.transform((kilobytes, accuracy)) - axes.bbox.p0
        side = -1 if x > width / 2 else 1
        anchor, length = x + side * 1.1 * size, 0.62 * size * len(text)
        begin, end = sorted((anchor, anchor + side * length))
        placed = y
        while covered := [o for o in taken if abs(o[2] - placed) < 1.3 * size and begin < o[1] and o[0] < end]:
            placed = max(o[2] for o in covered) + 1.31 * size
        taken.append((begin, end, placed))
        axes.annotate(
            text,
            (x / width, y / height),
            (anchor / width, placed / height),
            "axes fraction",
            "axes fraction",
            arrowprops={"arrowstyle": "-", "color": LINES, "linewidth": 0.8} if placed > y + size else None,
            ha="left" if side > 0 else "right",
            va="center",
            fontsize=7.5,
            color=INK if own else GREY,
        )


def _needs_scheme(results: Results) -> str | None:
    return None if _layers(results) else f"a run of method {results.report.method} has no bits per layer"


def _needs_bits(results: Results) -> str | None:
    if _needs_scheme(results) is not None:
        return _needs_scheme(results)
    return None if _quantized(results) else "the run did not record the bits of its layers over time"


def _needs(key: str) -> Callable[[Results], str | None]:
    def missing(results: Results) -> str | None:
        if _needs_scheme(results) is not None:
            return _needs_scheme(results)
        recorded = any(getattr(record, key) for record in results.epochs)
        return None if recorded else f"the run did not record {key}: it is of an older version, or of another method"

    return missing


def _needs_epochs(results: Results) -> str | None:
    return None if results.epochs else "the run recorded no test accuracy"


def _needs_points(results: Results) -> str | None:
    return None if points(results, ()) else "the report of the run holds no size or no accuracy"


PICTURES = (
    Picture(
        "bits_per_layer",
        "Bits of each layer",
        "How many bits a weight of each layer has, from the input at the top to the output at the bottom: the wide bar "
        "is what the file stores, the thin one what papers on CSQ count, the bits that stayed in use.",
        bits_per_layer,
        _needs_scheme,
    ),
    Picture(
        "bits_over_time",
        "Growth and pruning",
        "Above, the bits of the layers and their average on its way to the budget, the dashed line; below, when each "
        "layer gained or lost bits, until the scheme was fixed for fine-tuning; the numbers are the final ones.",
        bits_over_time,
        _needs_bits,
    ),
    Picture(
        "gap",
        "From soft to hard",
        "While training, bits are soft and may be anything between 0 and 1: above, the accuracy with soft bits and the "
        "accuracy if they were all rounded at that moment; below, how far soft and rounded weights are apart, relative "
        "to the rounded ones, which has to end at 0.",
        gap,
        _needs("weight_gap"),
    ),
    Picture(
        "undecided",
        "Bits that have not decided",
        "The share of the bits in use that are still between 0.01 and 0.99, neither on nor off; the rising temperature "
        "drives it to 0 twice, "
        "since fine-tuning starts again from soft bits.",
        undecided,
        _needs("undecided"),
    ),
    Picture(
        "gates",
        "Gates of the bits",
        "Each row is one bit of a layer, the highest on top: full of colour while its gate is open and the bit is in "
        "use, empty once it is closed and the bit costs nothing.",
        gates,
        _needs("gates"),
    ),
    Picture(
        "training",
        "Loss and accuracy",
        "The loss above and the accuracy below, on training and test data; a fall where a phase begins is the "
        "price of going on with fewer bits.",
        training,
        _needs_epochs,
    ),
    Picture(
        "accuracy_against_size",
        "Accuracy against size",
        "Further up is more accurate, further left is smaller; the filled point is this run, the hollow ones are what "
        "it is compared with, each with its method, its stored bits a weight and its seed.",
        accuracy_against_size,
        _needs_points,
    ),
)


@contextlib.contextmanager
def _drawn(picture: Picture, results: Results, against: Sequence[Results], width: float) -> Iterator[Figure]:
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, width * 0.6), dpi=160, layout="constrained")
        picture.draw(figure, results, against)
        yield figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white", transparent=False)
    return buffer.getvalue()


def _svg(figure: Figure) -> bytes:
    buffer = io.StringIO()
    # Without the date, so that two pages of one run are equal.
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().replace(f"font-family: '{_MEASURED_FONT}'", f"font-family: {FONTS}").encode()


@dataclass(frozen=True)
class Drawn:
    """A picture as SVG for a wide and for a narrow screen, and as PNG."""

    wide: bytes
    narrow: bytes
    png: bytes


def draw(picture: Picture, results: Results, against: Sequence[Results] = ()) -> Drawn:
    """Draw a picture of which nothing is missing."""
    with _drawn(picture, results, against, WIDE) as figure:
        wide, png = _svg(figure), _png(figure)
    with _drawn(picture, results, against, NARROW) as figure:
        return Drawn(wide, _svg(figure), png)
