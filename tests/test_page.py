"""``csq report`` and ``csq compare``: what a page shows of a real run, what it escapes; old and damaged runs."""

import base64
import csv
import html
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("typer")
pytest.importorskip("pydantic")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from matplotlib import image
from matplotlib.text import Text
from rich.console import Console
from typer.testing import CliRunner

from csq_kernels import cli, commands
from csq_kernels.train import comparison, loop, page, plots, recipe, results, runs

SMALL = ["epochs.float=1", "epochs.search=1", "epochs.finetune=1", "batch_size=128", "log_every=4"]
RECORDED = ("hard_accuracy", "gates", "weight_gap", "undecided")


def csq(*arguments: object):
    return CliRunner().invoke(cli.app(), list(map(str, arguments)), env={"COLUMNS": "200"})


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a finished run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("runs") / "run"
    loop.train(recipe.load("digits_mlp", SMALL), folder)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def written(run, tmp_path_factory) -> Path:
    """The folder of its page."""
    folder = tmp_path_factory.mktemp("page")
    result = csq("report", run, "--out", folder / "page.html")
    assert result.exit_code == 0, result.output
    return folder


def changed(run: Path, folder: Path, change: Callable[[dict, list[dict], dict], None]) -> Path:
    """A copy of a run whose report, metrics and recipe were changed."""
    folder.mkdir()
    for name in ("report.json", "metrics.jsonl", "recipe.yaml", "environment.json"):
        shutil.copy(run / name, folder)
    report = json.loads((run / "report.json").read_text())
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    chosen = yaml.safe_load((run / "recipe.yaml").read_text())
    change(report, records, chosen)
    (folder / "report.json").write_text(json.dumps(report))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(chosen))
    return folder


class Elements(HTMLParser):
    """Start tags with their attributes, the visible text, and whether every tag is closed in turn."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def words(svg: bytes) -> str:
    """The text of a picture that shows something."""
    root = ElementTree.fromstring(svg)
    names = [node.tag.partition("}")[2] for node in root.iter()]
    assert names.count("path") + names.count("use") + names.count("image") >= 5
    return " ".join("".join(node.itertext()) for node in root.iter() if node.tag.endswith("}text"))


def drawn(name: str, folder: Path, *against: Path) -> plots.Drawn:
    """One picture of a run."""
    picture = next(picture for picture in plots.PICTURES if picture.name == name)
    return plots.draw(picture, results.read(folder), [results.read(other) for other in against])


def without_pictures(folder: Path, *against: Path) -> str:
    """The page of a run with empty frames, which takes no time."""
    frames = {picture.name: plots.Drawn(b"", b"", b"") for picture in plots.PICTURES}
    return page.html(results.read(folder), [results.read(other) for other in against], frames)


def test_the_page_holds_the_figures_of_the_report(run, written):
    report = json.loads((run / "report.json").read_text())
    text = (written / "page.html").read_text()
    seen = Elements(text).text
    scheme = report["scheme"]
    for part in (
        "digits_mlp",
        f"{100 * report['float_accuracy']:.2f} %",
        f"{100 * report['hard_accuracy']:.2f} %",
        f"{scheme['float_bytes'] / report['file_bytes']:.1f}x smaller",
        f"{report['file_bytes']:,}",
        f"{scheme['float_bytes']:,}",
        f"3 stored bits a weight asked, {scheme['cost']:.4g} used",
        "1,797 grey 8x8 digits",
        "3,392 weights in 3 layers",
        "csq train recipe.yaml",
        "budget: 3.0 bits",
        torch.__version__,
    ):
        assert part in seen, part
    for layer in scheme["layers"]:
        cells = (layer["paper_bits"], layer["stored_bits"], f"{layer['bytes']:,}", f"{layer['float_bytes']:,}")
        row = re.search(rf"<th>{layer['name']}</th>(.*?)</tr>", text)
        assert row is not None and re.findall(r">([\d,]+)</td>", row[1]) == [str(cell) for cell in cells]
        assert row[1].count("<i ") == layer["paper_bits"]


def test_the_page_stands_alone(written):
    text = (written / "page.html").read_text()
    elements = Elements(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in elements.tags}
    sources = [tag["src"] for tag in elements.named("img")] + [tag["srcset"] for tag in elements.named("source")]
    assert len(sources) == 2 * len(plots.PICTURES) and all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?:|url\(|@import", text)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in elements.named("meta")
    assert "@media print" in text


def test_every_picture_is_drawn_with_units(run, written):
    wide, narrow = {}, {}
    encoded = re.findall(r"data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)", (written / "page.html").read_text())
    for number, svg in enumerate(encoded):
        (wide if number % 2 else narrow)[plots.PICTURES[number // 2].name] = words(base64.b64decode(svg))
    expected = {
        "bits_per_layer": ("hidden1", "head", "bits a weight", "stored, on average"),
        "bits_over_time": ("budget: 3 stored bits", "stored bits a weight", "epoch", "fine-tuning", "hidden2"),
        "gap": ("test accuracy (%)", "distance of weights (%)", "epoch"),
        "undecided": ("undecided bits (%)", "average over the weights"),
        "gates": ("gate G", "head", "epoch"),
        "training": ("loss (nats, log)", "accuracy (%)", "exact integers", "search"),
        "accuracy_against_size": ("size of the file (kB, log)", "test accuracy (%)", "float, seed 0"),
    }
    assert wide.keys() == narrow.keys() == expected.keys()
    for name, parts in expected.items():
        for part in parts:
            assert part in wide[name] and part in narrow[name], (name, part)
        pixels = image.imread(written / f"{name}.png")
        assert pixels.shape[1] > 1000 and (pixels[..., 3] == 1).all()
        assert 0.01 < np.mean(pixels[..., :3].min(-1) < 0.9), name


def test_the_table_of_the_layers(run, written):
    rows = list(csv.DictReader((written / "table.csv").open()))
    layers = json.loads((run / "report.json").read_text())["scheme"]["layers"]
    assert [row["name"] for row in rows] == ["hidden1", "hidden2", "head"]
    for row, layer in zip(rows, layers, strict=True):
        assert row["shape"] == "x".join(map(str, layer["shape"])) and row["active"].split() == [
            str(bit) for bit in layer["active"]
        ]
        assert float(row["ratio"]) == pytest.approx(layer["float_bytes"] / layer["bytes"], abs=1e-3)


def test_pages_of_one_run_are_equal(run, written):
    again = drawn("gates", run)
    assert (written / "gates.png").read_bytes() == again.png
    assert base64.b64encode(again.narrow).decode() in (written / "page.html").read_text()


def test_what_comes_from_files_is_escaped(run, tmp_path):
    evil = "<script>alert('$x$')</script>&amp;"

    def change(report, records, chosen):
        report["recipe"] = report["method"] = evil
        report["scheme"]["layers"][0]["name"] = evil
        report["scheme"]["budget"] = f"3 {evil}"
        chosen["name"] = chosen["data"]["name"] = chosen["data"]["root"] = chosen["model"]["name"] = evil
        chosen["model"]["options"] = {evil: evil}
        for record in records:
            record["warnings"] = [f"{evil}: {evil}"]
            for key in ("layer_bits", *RECORDED[1:]):
                if key in record:
                    record[key][evil] = record[key].pop("hidden1")

    folder = changed(run, tmp_path / "run", change)
    environment = json.loads((folder / "environment.json").read_text())
    environment["device_name"] = evil
    (folder / "environment.json").write_text(json.dumps(environment))
    text = without_pictures(folder)
    elements = Elements(text)
    assert "script" not in {tag for tag, _ in elements.tags}
    assert text.count(html.escape(evil)) >= 10 and elements.text.count(evil) >= 10
    # In a picture it is a word like any other, shortened.
    assert "<script>aler" in words(drawn("bits_per_layer", folder).wide)


def test_a_run_of_an_older_version_has_the_other_pictures(run, tmp_path):
    def change(report, records, chosen):
        for record in records:
            for key in (*RECORDED, "warnings"):
                record.pop(key, None)

    folder = changed(run, tmp_path / "run", change)
    assert csq("report", folder).exit_code == 0
    seen = Elements((folder / "report.html").read_text()).text
    for key in RECORDED[1:]:
        assert f"the run did not record {key}" in seen
    assert "no record of the watchdog" in seen
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {
        f"{name}.png" for name in ("bits_per_layer", "bits_over_time", "training", "accuracy_against_size")
    }


@pytest.fixture(scope="module")
def baselines(tmp_path_factory) -> dict[str, Path]:
    """Finished runs of the methods that CSQ is measured against."""
    folder = tmp_path_factory.mktemp("baselines")
    for method in ("float", "round", "lsq"):
        loop.train(recipe.load("digits_mlp", [*SMALL, f"method={method}", "seed=3"]), folder / method)
    return {method: folder / method for method in ("float", "round", "lsq")}


def test_a_float_run_has_a_page(baselines, tmp_path):
    assert csq("report", baselines["float"], "--out", tmp_path / "report.html").exit_code == 0
    seen = Elements((tmp_path / "report.html").read_text()).text
    assert "Nothing was quantized" in seen and "method float · seed 3" in seen
    assert "a run of method float has no bits per layer" in seen and "integer" not in seen
    assert not (tmp_path / "table.csv").exists() and (tmp_path / "training.png").exists()


@pytest.mark.parametrize("method", ["round", "lsq"])
def test_baselines_have_pages(baselines, method):
    read = results.read(baselines[method])
    assert read.report.scheme is not None
    seen = Elements(without_pictures(baselines[method])).text
    for part in (f"{read.ratio:.1f}x smaller", f"{read.report.scheme.float_bytes:,}", "3 bits", "no budget was asked"):
        assert part in seen, part
    names = {picture.name for picture in plots.PICTURES if picture.missing(read) is None}
    assert names == {"bits_per_layer", "training", "accuracy_against_size"}
    assert ("LSQ" in words(drawn("training", baselines[method]).wide)) == (method == "lsq")


def test_baselines_are_points_with_method_and_seed(run, baselines, tmp_path):
    def again(report, records, chosen):
        report |= {"seed": 4, "hard_accuracy": 0.625}

    def unwritten(report, records, chosen):
        report |= {"seed": 5, "file_bytes": None}

    folders = [*baselines.values(), changed(baselines["lsq"], tmp_path / "lsq", again)]
    folders.append(changed(baselines["float"], tmp_path / "float", unwritten))
    labels = words(drawn("accuracy_against_size", run, *folders).wide)
    for label in (
        "lsq 3.00 bits, seeds 3, 4",
        "round 3.00 bits, seed 3",
        "float, seeds 3, 5",
        "float, seed 0",
        "csq 2.",
    ):
        assert label in labels
    own = results.read(run)
    assert own.report.scheme is not None
    shown = plots.points(own, [results.read(folder) for folder in folders])
    assert [point.accuracy for point in shown if point.method == "lsq"][1] == 0.625
    float_bytes, written = own.report.scheme.float_bytes, results.read(baselines["float"]).report.file_bytes
    assert [point.size for point in shown if point.method == "float"] == [written, float_bytes, float_bytes]
    seen = Elements(without_pictures(run, *folders)).text
    assert "62.50 %" in seen and "digits_mlp (this run)" in seen


def test_labels_do_not_cover_one_another():
    axes = plots.Figure(figsize=(5, 3)).subplots()
    shown = [plots.Point(f"method{n} 3.00 bits", n, "csq", 1000 + n, 0.9 + 0.001 * n, False) for n in range(6)]
    axes.set_xlim(0.5, 5)
    axes.set_ylim(80, 100)
    plots._label_points(axes, shown)
    figure = axes.figure
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert len(boxes) == 6
    for number, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:number])


def test_a_baseline_on_other_data_is_refused(run, tmp_path):
    def change(report, records, chosen):
        chosen["data"]["name"] = "mnist5k"

    other = changed(run, tmp_path / "other", change)
    result = csq("report", run, "--against", other, "--out", tmp_path / "page.html")
    assert result.exit_code == commands.USAGE
    assert f"expected runs on digits to compare with, got {other} on mnist5k" in result.stderr
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("unit", ["paper bits", "MB"])
def test_budgets_in_other_units_are_lines_among_the_bits(run, tmp_path, unit):
    scheme = json.loads((run / "report.json").read_text())["scheme"]
    # A budget that is used to the last byte or bit: its line is where the average of the layers is.
    value = scheme["paper_bits"] if unit == "paper bits" else scheme["bytes"] / 1e6

    def change(report, records, chosen):
        report["scheme"]["budget"] = f"{value} {unit}"
        report["scheme"]["cost"] = value

    read = results.read(changed(run, tmp_path / "run", change))
    line = plots._budget_line(read)
    assert line is not None
    assert line[0] == pytest.approx(scheme["paper_bits" if unit == "paper bits" else "stored_bits"], rel=1e-3)
    assert line[2] == ("paper" if unit == "paper bits" else "stored")
    assert f"{line[2]} bits a weight" in words(drawn("bits_over_time", read.folder).narrow)


def test_warnings_and_a_removed_layer_are_shown(run, tmp_path):
    def change(report, records, chosen):
        report["scheme"]["layers"][0] |= {"paper_bits": 0, "stored_bits": 0, "active": [], "bytes": 0}
        report["scheme"]["budget_met"] = False
        ends = [record for record in records if "warnings" in record]
        ends[-1]["warnings"] = ["head: 99.95% of the bit logits are frozen"]
        records[-1]["warnings"] = ["head: 99.99% of the bit logits are frozen"]

    folder = changed(run, tmp_path / "run", change)
    seen = Elements(without_pictures(folder)).text
    words(drawn("bits_per_layer", folder).wide)
    assert "99.99% of the bit logits are frozen (epochs 2 to 3)" in seen and "99.95%" not in seen
    assert "removed" in seen and "NOT met" in seen


def damage(name: str, text: str | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink() if text is None else (folder / name).write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (damage("report.json", None), "expected a finished run, got .*finish it with csq train ... --resume"),
        (damage("report.json", '{"recipe": "x"'), "report.json to be JSON, got damaged text"),
        (damage("report.json", "[]"), "report.json as csq train writes it, got its content"),
        (damage("report.json", '{"recipe": "x", "seconds": "long"}'), "report.json as .* got seconds = 'long'"),
        (damage("metrics.jsonl", None), "expected .*metrics.jsonl of a finished run, found none"),
        (damage("metrics.jsonl", '{"epoch": 1}\n'), "metrics.jsonl as csq train writes it, got 0.phase"),
        (damage("metrics.jsonl", "{}\nnonsense\n"), "metrics.jsonl to be JSON in line 2"),
        (damage("recipe.yaml", "name: ["), "recipe.yaml to be YAML"),
        (damage("recipe.yaml", "name: x"), "recipe.yaml as csq train writes it, got data"),
        (damage("environment.json", "\x00"), "environment.json to be JSON"),
    ],
)
def test_damaged_and_unfinished_runs_are_named(run, tmp_path, change, message):
    folder = changed(run, tmp_path / "run", lambda *_: None)
    change(folder)
    for arguments in (("report", folder), ("compare", run, folder)):
        result = csq(*arguments)
        assert result.exit_code == commands.USAGE and not result.stdout
        assert re.search(f"^error: .*{message}", result.stderr) and result.stderr.count("\n") == 1, result.stderr


def test_metrics_of_other_layers_are_refused(run, tmp_path):
    def change(report, records, chosen):
        report["scheme"]["layers"].pop()

    with pytest.raises(runs.RunError, match="to be of the layers of report.json, got head in one of them alone"):
        results.read(changed(run, tmp_path / "run", change))

    def shorten(report, records, chosen):
        [record for record in records if "gates" in record][-1]["gates"]["head"].pop()

    with pytest.raises(runs.RunError, match="with 8 gates of head in every line, got 7"):
        results.read(changed(run, tmp_path / "other", shorten))


def test_folders_that_are_none(run, tmp_path):
    for arguments in (("report", tmp_path / "none"), ("compare", run, tmp_path / "none")):
        result = csq(*arguments)
        assert result.exit_code == commands.USAGE and "expected the folder of a run" in result.stderr
    assert csq("compare", run).exit_code == commands.USAGE
    (tmp_path / "file").touch()
    assert csq("report", run, "--out", tmp_path / "file" / "page.html").exit_code == commands.FAILED
    assert csq("compare", run, run, "--csv", tmp_path / "no" / "table.csv").exit_code == commands.FAILED


@pytest.fixture(scope="module")
def other(tmp_path_factory) -> Path:
    """Another finished run: another budget, and a layer that stayed float."""
    folder = tmp_path_factory.mktemp("runs") / "other"
    overrides = ["budget=2.0 bits", "quantization.rules={head: null}", "seed=5"]
    loop.train(recipe.load("digits_mlp", [*SMALL, *overrides]), folder)
    return folder


def test_compare(run, other, tmp_path):
    result = csq("compare", run, other, "--csv", tmp_path / "table.csv")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    first, second = (results.read(folder) for folder in (run, other))
    parts = csv.reader(io.StringIO((tmp_path / "table.csv").read_text()))
    header, *rows = parts
    assert header == ["part", "name", str(run), str(other)]
    table = {(part, name): cells for part, name, *cells in rows}
    assert table["results", "seed"] == ["0", "5"] and table["results", "method"] == ["csq", "csq"]
    assert table["results", "file bytes"] == [str(first.report.file_bytes), str(second.report.file_bytes)]
    assert table["results", "exact-integer loss"] == [f"{run.report.hard_loss:.4f}" for run in (first, second)]
    assert table["results", "exact-integer accuracy"] == [f"{run.report.hard_accuracy:.2%}" for run in (first, second)]
    assert table["recipe", "budget"] == ["3.0 bits", "2.0 bits"] and ("recipe", "batch_size") not in table
    assert table["recipe", "quantization.rules.head"] == ["", "none"]
    layers = {name: cells for (part, name), cells in table.items() if part == "layers"}
    assert list(layers) == ["hidden1", "hidden2", "head"] and layers["head"][1] == ""
    assert first.report.scheme is not None
    assert [cells[0] for cells in layers.values()] == [str(layer.stored_bits) for layer in first.report.scheme.layers]
    for name, cells in layers.items():
        line = next(line for line in result.output.splitlines() if line.startswith(name))
        assert line.endswith("differs") == (len(set(filter(None, cells))) > 1)
        assert line.split()[1] == cells[0]


def test_compare_on_a_terminal_is_a_table(run, other):
    console = Console(force_terminal=True, width=200, file=io.StringIO(), record=True)
    comparison.show(comparison.compare([results.read(run), results.read(run), results.read(other)]), console)
    text = console.export_text()
    assert "┃" in text and "hidden2" in text and "quantization.rules.head" in text


def test_equal_runs_compare_as_equal(run):
    output = csq("compare", run, run).output
    assert "recipe: the same" in output and "differs" not in output
