"""The command ``csq``: help, output without a terminal, exit codes, one line for the mistakes of its user."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("pydantic")

from typer.testing import CliRunner

from csq_kernels import cli, commands
from csq_kernels.train import checkpoint, data, display, loop

SMALL = ["digits_mlp", "epochs.float=1", "epochs.search=1", "epochs.finetune=1", "batch_size=128"]


def csq(*arguments: str):
    return CliRunner().invoke(cli.app(), list(arguments), env={"COLUMNS": "120"})


def assert_fails(result, code: int, *parts: str) -> None:
    """The exit code, the parts in one message, and no traceback."""
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ") and "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize("arguments", [[], ["train"], ["data"], ["info"]])
def test_help(arguments):
    result = csq(*arguments, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output and (not arguments or "Examples" in result.output)
    if arguments == ["train"]:
        for option in ("--out", "--resume", "--device", "--seed", "--max-minutes", "KEY=VALUE", "csq train demo"):
            assert option in result.output


def test_train_prints_plain_lines_and_fills_its_folder(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    result = csq("train", *SMALL, "--out", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output and "\r" not in result.output
    for part in ("search", "finetune", "stored", "exact-integer accuracy", "soft/hard gap", "budget 3", "met"):
        assert part in result.output
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names >= {"recipe.yaml", "metrics.jsonl", "report.txt", "report.json", "environment.json", checkpoint.NAME}
    for picture in ("bits_per_layer.png", "bits_over_time.png", "training.png"):
        assert (tmp_path / "run" / picture).read_bytes().startswith(b"\x89PNG")

    assert_fails(csq("train", *SMALL, "--out", str(tmp_path / "run")), commands.USAGE, "--resume")
    again = csq("train", str(tmp_path / "run" / "recipe.yaml"), "--out", str(tmp_path / "run"), "--resume")
    assert again.exit_code == 0 and "exact-integer accuracy" in again.output


def test_runs_are_numbered(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        result = csq("train", *SMALL, "--max-minutes", "0")
        assert result.exit_code == commands.TIME_UP
    assert "--out runs/digits_mlp-2 --resume" in result.output
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"digits_mlp", "digits_mlp-2"}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["nonsense"], ["demo", "'nonsense'"]),
        ([*SMALL, "optimizer.speed=3"], ["unknown key optimizer.speed"]),
        ([*SMALL, "--resume"], ["--out"]),
        ([*SMALL, "--device", "abacus"], ["expected device", "abacus"]),
        (["fashion_mnist_resnet20", "data.root=/nowhere"], ["not found", "apt-get", "torchvision", "data.root="]),
        ([*SMALL, "budget=0.5 bits"], ["expected budget of at least"]),
        ([*SMALL, "model.name=vit", "model.options={patch: 5}"], ["expected patch to divide the image size 8, got 5"]),
        ([*SMALL, "quantization.rules={nothing: null}"], ["expected rule 'nothing' to match a layer"]),
    ],
)
def test_mistakes_are_one_message(tmp_path, arguments, parts):
    pytest.importorskip("sklearn")
    out = [] if "--resume" in arguments else ["--out", str(tmp_path / "run")]
    assert_fails(csq("train", *arguments, *out), commands.USAGE, *parts)


def test_a_damaged_checkpoint_is_one_message(tmp_path):
    (tmp_path / checkpoint.NAME).write_bytes(b"damaged")
    assert_fails(
        csq("train", *SMALL, "--out", str(tmp_path), "--resume"), commands.FAILED, str(tmp_path / checkpoint.NAME)
    )


def test_interruption_says_how_to_go_on(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", interrupted)
    assert_fails(csq("train", *SMALL, "--out", str(tmp_path)), commands.INTERRUPTED, f"--out {tmp_path} --resume")


def test_data(tmp_path, monkeypatch):
    assert csq("data").exit_code == 0
    found = json.loads(csq("data", "--json").stdout)
    assert found.keys() == data.DESCRIPTIONS.keys()
    missing = csq("data", "fashion-mnist", "--root", str(tmp_path))
    assert missing.exit_code == commands.FAILED
    for part in ("not found", str(tmp_path), "apt-get install", "dpkg-deb -x", "torchvision"):
        assert part in missing.output
    assert_fails(csq("data", "cifar"), commands.USAGE, "digits, mnist5k, fashion-mnist")


def test_info():
    plain = csq("info")
    assert plain.exit_code == 0 and "reconstruct on cpu" in plain.output
    content = json.loads(csq("info", "--json").stdout)
    assert {"torch", "native", "ops"} <= content.keys()


def test_missing_packages_say_how_to_install():
    script = "import sys; sys.modules[%r] = None; sys.argv = %r; from csq_kernels import cli; cli.main()"
    for module, arguments in (("typer", ["csq"]), ("yaml", ["csq", "train", "demo"])):
        result = subprocess.run([sys.executable, "-c", script % (module, arguments)], capture_output=True, text=True)
        assert result.returncode == 1
        assert 'pip install "csq_kernels[train]"' in result.stderr and "Traceback" not in result.stderr


def test_the_bar_on_a_terminal_shows_the_figures():
    rich_console = pytest.importorskip("rich.console")
    console = rich_console.Console(force_terminal=True, width=200, file=open("/dev/null", "w"), record=True)
    record = {"phase": "search", "iteration": 3, "total_iterations": 9, "loss": 0.5, "train_accuracy": 0.25}
    record |= {"paper_bits": 4.0, "stored_bits": 5.0, "gap": 2.0, "budget": "3 stored bits", "warnings": ["fc: stuck"]}
    with display.make(console) as shown:
        assert isinstance(shown, display.LiveDisplay)
        shown.update(record)
        shown.update(record)
    text = console.export_text()
    assert text.count("warning: fc: stuck") == 1
    for part in ("loss 0.5", "train 25.00%", "5.00 stored", "budget gap +2.00 stored bits"):
        assert part in text
