"""``csq report``: one HTML page about a finished run, for readers who know nothing of CSQ; needs no network, no script.

Whatever comes from a file passes ``html.escape`` on its way to the page.
"""

import base64
import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

import yaml

from csq_kernels.files import write_atomically
from csq_kernels.train import data, plots
from csq_kernels.train.plots import Drawn, Picture
from csq_kernels.train.results import Layer, Results, Scheme
from csq_kernels.train.runs import RunError

PAGE, TABLE = "report.html", "table.csv"
_FIRST = plots.PICTURES[0]
_MODELS = {
    "mlp": "A perceptron",
    "cnn": "A small convolutional network",
    "vgg": "A convolutional network in the manner of VGG",
    "resnet20": "A residual convolutional network",
    "resnet18": "A residual convolutional network",
    "resnet50": "A residual convolutional network",
    "vit": "A small vision transformer",
    "char_gpt": "A small language model of characters",
}


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _bytes(count: int) -> str:
    if count < 1000:
        return f"{count} bytes"
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.2f} MB"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = ((hours, "h"), (minutes, "min"), (rest, "s"))
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "less than 1 s"


def _ratio(large: int, small: int) -> str:
    return f"{large / small:.1f}x" if small else "removed"


def _lead(results: Results) -> str:
    """What was trained on what."""
    model, name = results.chosen.model, results.chosen.data.name
    options = ", ".join(f"{key} {value}" for key, value in model.options.items())
    called = f"{_MODELS.get(model.name, 'A network')} ({', '.join(filter(None, (model.name, options)))})"
    size = ""
    if results.report.scheme is not None:
        layers = results.report.scheme.layers
        size = f" with {sum(layer.weights for layer in layers):,} weights in {len(layers)} layers"
    described = data.SOURCES[name].description if name in data.SOURCES else ""
    return escape(f"{called}{size}, trained on {name}{f': {described}' if described else ''}.")


def _did(results: Results) -> str:
    """One sentence on what the method did."""
    method, scheme = results.report.method, results.report.scheme
    if method == "float" or scheme is None:
        return "Nothing was quantized: every weight is a float of 32 bits. The run is a yardstick for others."
    stored = [layer.stored_bits for layer in scheme.layers]
    span = f"{min(stored)} to {max(stored)}" if min(stored) < max(stored) else f"{stored[0]}"
    sentences = {
        "csq": f"CSQ made it small: each layer learned how many bits its weights need, {span} here instead of 32, "
        "while their sum was held to a budget, and at the end every weight became a whole number times a scale.",
        "lsq": f"LSQ made it small: weights are whole numbers of {span} bits, trained together with their scale.",
        "round": f"Rounding made it small: the trained float weights became whole numbers of {span} bits, untrained.",
    }
    return escape(sentences.get(method, f"The method {method} made it small: {span} bits a weight instead of 32."))


def _budget(scheme: Scheme) -> tuple[str, str]:
    """Value and note of the card."""
    if not scheme.budget or scheme.cost is None:
        return f"{scheme.stored_bits:.2f}", "stored bits a weight, on average; no budget was asked"
    uses = [(use.budget, use.cost) for use in scheme.budgets] or [(scheme.budget, scheme.cost)]
    notes = []
    for budget, cost in uses:
        value, _, unit = budget.partition(" ")
        each = " a weight" if unit.endswith("bits") else ""
        notes.append(f"{value} {unit}{each} asked, {cost:.4g} used")
    return ("met" if scheme.budget_met else "NOT met"), "; ".join(notes)


def _cards(results: Results) -> str:
    report, scheme = results.report, results.report.scheme
    cards = []
    if report.float_accuracy is None:
        cards.append(("Float accuracy", "-", "not measured, there was no float phase"))
    else:
        cards.append(("Float accuracy", _percent(report.float_accuracy), "of the test set, 32 bits a weight"))
    if results.hard_accuracy is not None:
        note = "of the test set"
        if report.float_accuracy is not None:
            points = 100 * (results.hard_accuracy - report.float_accuracy)
            more = "more" if points > 0 else "less"
            note = "the same as float" if abs(points) < 0.005 else f"{abs(points):.2f} points {more} than float"
        cards.append(("Exact-integer accuracy", _percent(results.hard_accuracy), note))
    if results.size is not None and scheme is not None:
        smaller = f"{_bytes(results.size)} instead of {_bytes(scheme.float_bytes)}"
        cards.append(("File size", f"{results.ratio:.1f}x smaller", smaller))
    elif results.size is not None:
        cards.append(("File size", _bytes(results.size), "in float"))
    if scheme is not None:
        value, note = _budget(scheme)
        cards.append(("Budget" if scheme.budget else "Bits", value, note))
    main = ("Exact-integer accuracy", "File size")
    return "\n".join(
        f'<div{_class("main" if title in main else "")}><dt>{escape(title)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="note">{escape(note)}</dd></div>'
        for title, value, note in cards
    )


def _uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _figure(picture: Picture, drawn: Drawn) -> str:
    return (
        f"<figure>\n<figcaption>{escape(picture.caption)}</figcaption>\n<picture>"
        f'<source media="(max-width: 600px)" srcset="{_uri(drawn.narrow)}">'
        f'<img src="{_uri(drawn.wide)}" alt="{escape(picture.title)}"></picture>\n</figure>'
    )


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _section(title: str, *content: str) -> str:
    return "\n".join(("<section>", f"<h2>{escape(title)}</h2>", *content, "</section>"))


@dataclass(frozen=True)
class _Column:
    """A column of a table: its head, and classes of its cells. ``wide`` ones are left out on narrow screens."""

    head: str
    classes: str = ""


def _row(cells: Iterable[str], columns: Sequence[_Column], tag: str = "td") -> str:
    """Cells that are HTML already; the first is a heading."""
    shown = []
    for number, (cell, column) in enumerate(zip(cells, columns, strict=True)):
        kind = "th" if number == 0 else tag
        shown.append(f"<{kind}{_class(column.classes)}>{cell}</{kind}>")
    return f"<tr>{''.join(shown)}</tr>"


def _table(columns: Sequence[_Column], rows: Iterable[Sequence[str]], feet: Iterable[Sequence[str]] = ()) -> str:
    head = _row((escape(column.head) for column in columns), columns, "th")
    body, foot = ("".join(_row(row, columns) for row in part) for part in (rows, feet))
    foot = f"\n<tfoot>{foot}</tfoot>" if foot else ""
    return f'<div class="scroll"><table>\n<thead>{head}</thead>\n<tbody>{body}</tbody>{foot}\n</table></div>'


def _strip(layer: Layer, bits: int) -> str:
    """A box for each bit, the highest at the left, filled where the bit is in use."""
    boxes = "".join(f"<i{_class('on' if bit in layer.active else '')}></i>" for bit in reversed(range(bits)))
    active = ", ".join(map(str, reversed(layer.active))) or "none"
    return f'<span class="strip" role="img" aria-label="bits {active}" title="bits {active}">{boxes}</span>'


def _layer_table(results: Results, scheme: Scheme) -> str:
    bits = 1 + max((bit for layer in scheme.layers for bit in layer.active), default=0)
    rows = [
        (
            escape(layer.name),
            escape("x".join(map(str, layer.shape))),
            _strip(layer, bits),
            str(layer.paper_bits),
            str(layer.stored_bits),
            f"{layer.bytes:,}",
            f"{layer.float_bytes:,}",
            _ratio(layer.float_bytes, layer.bytes),
        )
        for layer in scheme.layers
    ]
    size = results.size or scheme.bytes
    rest = size - sum(layer.bytes for layer in scheme.layers)
    totals = (f"{scheme.paper_bits:.2f}", f"{scheme.stored_bits:.2f}", f"{size:,}", f"{scheme.float_bytes:,}")
    feet = (
        ("biases, norms, header", "", "", "", "", f"{rest:,}", f"{scheme.rest_bytes:,}", ""),
        ("the whole file", "", "", *totals, _ratio(scheme.float_bytes, size)),
    )
    columns = (
        _Column("layer"),
        _Column("shape", "wide"),
        _Column("bits in use"),
        _Column("paper bits", "number"),
        _Column("stored bits", "number"),
        _Column("bytes", "number"),
        _Column("as float", "number wide"),
        _Column("smaller", "number"),
    )
    return _table(columns, rows, feet)


def _comparison(results: Results, against: Sequence[Results]) -> str:
    rows = []
    for run in (results, *against):
        scheme = run.report.scheme
        bits = "32" if run.report.method == "float" else "-" if scheme is None else f"{scheme.stored_bits:.2f}"
        accuracy = "-" if run.accuracy is None else _percent(run.accuracy)
        size = "-" if run.size is None else f"{run.size:,}"
        ratio = "-" if run.ratio is None else f"{run.ratio:.1f}x"
        name = f"{run.report.recipe}{' (this run)' if run is results else ''}"
        rows.append((escape(name), escape(run.report.method), str(run.seed), bits, accuracy, size, ratio))
    numbers = ("seed", "stored bits", "accuracy", "bytes", "smaller")
    return _table((_Column("run"), _Column("method"), *(_Column(head, "number") for head in numbers)), rows)


def _warnings(results: Results) -> str:
    """The watchdog's warnings, one a layer: the last text, and from which epoch to which."""
    watched = [record for record in results.records if record.warnings is not None]
    if not watched:
        reason = "The run has no record of the watchdog." if results.report.scheme else "There was nothing to watch."
        return _section("Warnings", f"<p>{reason}</p>")
    spans: dict[str, tuple[float, float, str]] = {}
    for record in watched:
        for warning in record.warnings or []:
            layer = warning.partition(":")[0]
            first = spans.get(layer, (record.epoch, 0.0, ""))[0]
            spans[layer] = (first, record.epoch, warning)
    if not spans:
        return _section("Warnings", "<p>The numerical watchdog looked once an epoch and found nothing.</p>")
    items = []
    for first, last, text in spans.values():
        when = f"epoch {first:g}" if first == last else f"epochs {first:g} to {last:g}"
        items.append(f'<li>{escape(text)} <span class="soft">({when})</span></li>')
    note = (
        "<p>What the numerical watchdog saw while the bits were searched for; a layer that has decided may say so.</p>"
    )
    return _section("Warnings", note, f'<ul class="plain">{"".join(items)}</ul>')


def _reproduction(results: Results) -> str:
    machine, package = results.machine, results.machine.csq_kernels
    device = " ".join(dict.fromkeys(filter(None, (machine.device, machine.device_name, str(package.get("isa") or "")))))
    facts = {
        "seed": str(results.seed),
        "time": _duration(results.report.seconds),
        "csq_kernels": str(package.get("version", "unknown")),
        "PyTorch": str(package.get("torch", "unknown")),
        "Python": machine.python,
        "platform": machine.platform,
        "device": device,
        "threads": str(package.get("threads", "unknown")),
    }
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    recipe = yaml.safe_dump(results.recipe, sort_keys=False, allow_unicode=True)
    return _section(
        "How to reproduce it",
        "<p>Save the recipe below as recipe.yaml. On a CPU, the same versions and number of threads give the same "
        "bits.</p>",
        "<pre>csq train recipe.yaml --out runs/again</pre>",
        f'<table class="facts"><tbody>{rows}</tbody></table>',
        "<h3>Recipe</h3>",
        f"<pre>{escape(recipe)}</pre>",
    )


def html(results: Results, against: Sequence[Results], pictures: dict[str, Drawn]) -> str:
    """The page; ``pictures`` holds those that could be drawn, by name."""
    sections = []
    scheme = results.report.scheme
    left_out = []
    for picture in plots.PICTURES:
        reason = picture.missing(results)
        if reason is not None:
            left_out.append(f"<li>{escape(picture.title)}: {escape(reason)}.</li>")
            continue
        content = [_figure(picture, pictures[picture.name])]
        if picture is _FIRST and scheme is not None:
            content.append(_layer_table(results, scheme))
        if picture.name == "accuracy_against_size":
            content.append(_comparison(results, against))
        sections.append(_section(picture.title, *content))
    if left_out:
        sections.append(_section("What is not drawn", f'<ul class="plain">{"".join(left_out)}</ul>'))
    sections += [_warnings(results), _reproduction(results)]
    template = Template((resources.files("csq_kernels.train") / "page.html").read_text())
    return template.substitute(
        fonts=plots.FONTS,
        title=escape(f"{results.report.recipe}: report of a CSQ run"),
        eyebrow=escape(f"Report of a training run · method {results.report.method} · seed {results.seed}"),
        name=escape(results.report.recipe),
        lead=_lead(results),
        did=_did(results),
        cards=_cards(results),
        sections="\n".join(sections),
    )


def table(scheme: Scheme) -> str:
    """The layers as CSV; sizes in bytes."""
    names = ("name", "shape", "paper_bits", "stored_bits", "active", "bytes", "float_bytes", "ratio")
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(names)
    for layer in scheme.layers:
        ratio = f"{layer.float_bytes / layer.bytes:.3f}" if layer.bytes else ""
        shape, active = "x".join(map(str, layer.shape)), " ".join(map(str, layer.active))
        counts = (layer.bytes, layer.float_bytes)
        writer.writerow((layer.name, shape, layer.paper_bits, layer.stored_bits, active, *counts, ratio))
    return buffer.getvalue()


def write(results: Results, against: Sequence[Results] = (), out: Path | None = None) -> list[Path]:
    """Write the page, and beside it its pictures as PNG and the table of the layers as CSV; return their paths.

    Args:
        results: the run.
        against: other runs on the same data, for accuracy against size.
        out: the page; default: report.html in the folder of the run.

    Raises:
        RunError: a run of ``against`` is on other data.
        OSError: a file cannot be written.
    """
    for run in against:
        if run.chosen.data.name != results.chosen.data.name:
            raise RunError(
                f"expected runs on {results.chosen.data.name} to compare with, got {run.folder} on "
                f"{run.chosen.data.name}"
            )
    out = results.folder / PAGE if out is None else out
    out.parent.mkdir(parents=True, exist_ok=True)
    drawable = [picture for picture in plots.PICTURES if picture.missing(results) is None]
    pictures = {picture.name: plots.draw(picture, results, against) for picture in drawable}
    files = {out: html(results, against, pictures).encode()}
    if results.report.scheme is not None:
        files[out.with_name(TABLE)] = table(results.report.scheme).encode()
    files |= {out.with_name(f"{name}.png"): drawn.png for name, drawn in pictures.items()}
    for path, content in files.items():
        write_atomically(path, lambda file, content=content: file.write(content))  # type: ignore[misc]
    return list(files)
