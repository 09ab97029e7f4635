"""The recipes for CIFAR-10, ImageNet folders and text on a few samples: whole, interrupted, packed, measured."""

import json
import re

import numpy as np
import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("pydantic")
pytest.importorskip("sklearn")
pytest.importorskip("PIL")

from test_cifar10 import NAMES, binary
from test_cli import assert_fails, csq
from test_imagenet import write_folders
from test_train import Interrupt, assert_same

import csq_kernels
from csq_kernels import commands, packed
from csq_kernels.train import data, loop, models, recipe, running, runs
from csq_kernels.train.data import cifar10

SHORT = ["epochs.float=2", "epochs.search=2", "epochs.finetune=2", "log_every=1", "checkpoint.steps=3"]


def write_cifar10(root):
    for name in NAMES:
        (root / f"{name}.bin").write_bytes(binary(name))


def write_text(root):
    words = np.random.default_rng(0).choice("to be or not that is the question whether nobler".split(), 300)
    (root / "plays.txt").write_text(" ".join(words))


# The writer of the data, overrides, steps an epoch, and the number of predictions in testing.
SMALL = {
    "cifar10_resnet20": (write_cifar10, ["batch_size=5", "model.options={width: 4, blocks: 1}"], 4, 4),
    "imagenet_resnet18": (write_folders, ["batch_size=4", "data.size=32", "model.options={width: 4}"], 2, 4),
    "imagenet_resnet50": (write_folders, ["batch_size=4", "data.size=32", "model.options={width: 2}"], 2, 4),
    "char_gpt": (write_text, ["batch_size=16", "data.size=16", "model.options={width: 16, depth: 1, heads: 2}"], 5, 0),
}


@pytest.fixture(scope="module", autouse=True)
def small_files_on_one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cifar10, "IMAGES_PER_BATCH", 4)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=list(SMALL))
def finished(request, tmp_path_factory):
    """Name, recipe and folder of a whole run."""
    write, overrides, _, _ = SMALL[request.param]
    root = tmp_path_factory.mktemp(request.param)
    write(root)
    chosen = recipe.load(request.param, [*SHORT, f"data.root={root}", *overrides])
    loop.train(chosen, root / "run")
    return request.param, chosen, root / "run"


def test_report(finished):
    name, _, folder = finished
    report = json.loads((folder / "report.json").read_text())
    records = [json.loads(line) for line in (folder / running.METRICS).read_text().splitlines()]
    steps = 6 * SMALL[name][2]
    assert records[-1]["iteration"] == steps and report["scheme"]["budget_met"]
    tested = [record for record in records if "test_loss" in record]
    assert len(tested) == 6 and all(0 < record["test_loss"] for record in tested)
    text = (folder / "report.txt").read_text()
    for kind, shown in (("float", "float"), ("soft", "soft"), ("hard", "exact-integer")):
        assert f"{shown + ' loss':<24}{report[kind + '_loss']:7.4f}" in text


def test_resume_equals_uninterrupted(finished, tmp_path):
    """Stopped in the float phase, gone on with, and stopped again while gates move."""
    name, chosen, folder = finished
    steps = 6 * SMALL[name][2]
    with pytest.raises(KeyboardInterrupt):
        loop.train(chosen, tmp_path, display=Interrupt(steps // 4))
    with pytest.raises(KeyboardInterrupt):
        loop.train(chosen, tmp_path, resume=True, display=Interrupt(steps // 2 + 1))
    loop.train(chosen, tmp_path, resume=True)
    assert_same(folder, tmp_path)


def test_pack_verify_and_eval(finished, tmp_path):
    name, chosen, folder = finished
    file = tmp_path / "packed"
    result = csq("pack", str(folder), "--out", str(file))
    assert result.exit_code == 0, result.output
    assert file.read_bytes() == (folder / running.PACKED).read_bytes()
    result = csq("verify", str(file), "--against", str(folder))
    assert result.exit_code == 0, result.output
    if SMALL[name][3]:
        assert f"{SMALL[name][3]} of {SMALL[name][3]}" in result.output
    report = json.loads((folder / "report.json").read_text())
    result = csq("eval", str(file), "--precision", "exact", "--data-root", chosen.data.root)
    assert result.exit_code == 0, result.output
    figures = re.findall(r"(\d+\.\d\d)% +(\d+\.\d{4})", result.output)
    assert len(figures) == 2
    for accuracy, loss in figures:
        assert float(accuracy) == pytest.approx(100 * report["hard_accuracy"], abs=0.01)
        assert float(loss) == pytest.approx(report["hard_loss"], abs=2e-4)


def test_eval_of_other_data_than_the_network_is_for(tmp_path):
    model = models.build("resnet18", 3, 32, 2, width=2)
    csq_kernels.prepare_(model)
    csq_kernels.finalize_(model)
    csq_kernels.pack_(model)
    extra = {"model": "resnet18", "options": {"width": 2}, "sizes": [3, 32, 2], "data": "imagenet"}
    packed.save_packed(model, tmp_path / "file", extra | {"data_options": {"size": 32}})
    write_folders(tmp_path, classes=("cat", "dog", "horse"))
    result = csq("eval", str(tmp_path / "file"), "--data-root", str(tmp_path))
    assert_fails(result, commands.USAGE, "expected data set imagenet of sizes [3, 32, 2], got [3, 32, 3]")


@pytest.fixture(scope="module")
def language_run(tmp_path_factory):
    """The folder of a text, and of a run on it."""
    root = tmp_path_factory.mktemp("text")
    write_text(root)
    short = ["epochs.float=0", "epochs.search=1", "epochs.finetune=1"]
    chosen = recipe.load("char_gpt", [*SMALL["char_gpt"][1], *short, f"data.root={root}"])
    loop.train(chosen, root / "run")
    return root


def test_a_network_for_text_keeps_its_vocabulary(language_run, tmp_path):
    """On another text, it reads the characters that it knows as it has learnt them."""
    root = language_run
    file = root / "run" / running.PACKED
    extra = packed.inspect(file).extra
    assert extra["data_options"] == {"size": 16, "vocabulary": " abehilnoqrstuw"} and extra["sizes"] == [1, 16, 16]
    other = tmp_path / "other"
    # All characters but one are known, and that one comes first by its number.
    other.write_text("!bewhile no honest tests " * 40)
    dataset = runs.described_data(extra, other)
    tokens = torch.cat([inputs for inputs, _ in dataset.test_batches(10)])
    assert dataset.sizes == (1, 16, 16) and tokens.max() == 15
    assert csq("eval", str(file), "--data-root", str(other)).exit_code == 0
    assert csq("verify", str(file), "--against", str(root / "run"), "--data-root", str(other)).exit_code == 0
    # Its own vocabulary would be of another size: the checkpoint says which one it was.
    assert data.load("text", other, size=16).sizes != dataset.sizes
    result = csq("pack", str(root / "run"), "--out", str(tmp_path / "again"), "--data-root", str(other))
    assert result.exit_code == 0 and (tmp_path / "again").read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"data": "digits"}, ["expected model.name of mlp", "for data set digits"]),
        ({"data_options": {"size": 0}}, ["expected size of data set text"]),
        ({"data_options": {"size": 16, "vocabulary": "aa"}}, ["expected vocabulary"]),
        ({"data_options": [16]}, ["expected data_options"]),
        ({"data_options": {"size": 8, "vocabulary": " abehilnoqrstuw"}}, ["[1, 16, 16]", "[1, 8, 16]"]),
        ({"data_options": {"speed": 3}}, ["got 'speed'"]),
    ],
)
def test_descriptions_that_do_not_fit(language_run, tmp_path, change, parts):
    root = language_run
    file, forged = root / "run" / running.PACKED, tmp_path / "forged"
    extra = packed.inspect(file).extra
    model = runs.network(extra)
    packed.load_packed(model, file)
    packed.save_packed(model, forged, extra | change)
    assert_fails(csq("eval", str(forged), "--data-root", str(root / "plays.txt")), commands.USAGE, *parts)
