"""The training loop: two runs agree, a killed run goes on as if nothing had been, checkpoints survive trouble."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("pydantic")
pytest.importorskip("sklearn")

import csq_kernels.commands.train as train_command
from csq_kernels.train import checkpoint, loop, measure, models, phase, recipe, results, running, runs, sweep, timing

SMALL = ["epochs.float=2", "epochs.search=2", "epochs.finetune=6", "batch_size=128", "log_every=4"]


def small(*overrides: str) -> recipe.Recipe:
    return recipe.load("digits_mlp", [*SMALL, *overrides])


def outcome(folder: Path) -> tuple[dict, list[dict], dict]:
    """What must not depend on interruptions: the report, the metrics and every tensor of the final model."""
    report = json.loads((folder / "report.json").read_text())
    records = [json.loads(line) for line in (folder / running.METRICS).read_text().splitlines()]
    for content in (report, *records):
        del content["seconds"]
    return report, records, checkpoint.load(folder)["model"]


def assert_same(first: Path, second: Path) -> None:
    (report, records, model), (other_report, other_records, other_model) = outcome(first), outcome(second)
    assert records == other_records
    assert report == other_report
    assert model.keys() == other_model.keys()
    for name, values in model.items():
        assert torch.equal(values, other_model[name]), name


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small gain nothing from threads, and lose much on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A whole small run with augmentation, undisturbed."""
    folder = tmp_path_factory.mktemp("finished")
    loop.train(small("data.crop=1"), folder)
    return folder


class Interrupt(running.Display):
    """Ends a run at an iteration, between two checkpoints, as abruptly as an exception can."""

    def __init__(self, iteration: int):
        self.iteration = iteration

    def update(self, record):
        if record["iteration"] >= self.iteration:
            raise KeyboardInterrupt


def test_two_runs_agree(finished, tmp_path):
    loop.train(small("data.crop=1"), tmp_path)
    assert_same(finished, tmp_path)


def test_measuring_changes_no_bit_of_a_run(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "measure", lambda *_: {})
    loop.train(small("data.crop=1"), tmp_path)
    (report, records, model), (measured_report, measured, measured_model) = outcome(tmp_path), outcome(finished)
    assert report == measured_report
    assert all(torch.equal(values, measured_model[name]) for name, values in model.items())
    added = {"hard_accuracy", "gates", "weight_gap", "undecided"}
    assert [{key: record[key] for key in record.keys() - added} for record in measured] == records
    assert [added <= record.keys() for record in measured] == [
        record["phase"] != "float" and "test_accuracy" in record for record in records
    ]


def test_another_seed_differs(finished, tmp_path):
    loop.train(small("data.crop=1", "seed=1"), tmp_path)
    assert outcome(tmp_path)[1] != outcome(finished)[1]


# 10 steps an epoch: in the float phase, in the search, after the planes were dropped, before the first checkpoint.
@pytest.mark.parametrize(("iteration", "every"), [(4, 1000), (14, 3), (30, 3), (54, 3), (54, 1000)])
def test_resume_equals_uninterrupted(finished, tmp_path, iteration, every):
    chosen = small("data.crop=1", f"checkpoint.steps={every}")
    with pytest.raises(KeyboardInterrupt):
        loop.train(chosen, tmp_path, display=Interrupt(iteration))
    loop.train(chosen, tmp_path, resume=True)
    assert_same(finished, tmp_path)


def test_resume_after_two_real_kills(tmp_path):
    """SIGKILL in the search and again in the finetune stage, at moments that the process does not choose."""
    overrides = ["epochs.float=2", "epochs.search=8", "epochs.finetune=8", "checkpoint.steps=7", "log_every=5"]
    loop.train(recipe.load("digits_mlp", overrides), tmp_path / "whole")
    broken = tmp_path / "broken"
    command = [sys.executable, "-m", "csq_kernels.cli", "train", "digits_mlp", *overrides, "--out", str(broken)]
    # PyTorch's own sums depend on the number of threads.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}

    def lines() -> int:
        path = broken / running.METRICS
        return len(path.read_text().splitlines()) if path.exists() else 0

    for kill_after, extra in ((20, []), (55, ["--resume"])):
        process = subprocess.Popen(command + extra, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and lines() < kill_after:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    loop.train(recipe.load("digits_mlp", overrides), broken, resume=True)
    assert_same(tmp_path / "whole", broken)


def test_pause_after_stops_with_a_checkpoint(finished, tmp_path):
    with pytest.raises(running.TimeUpError, match="after step 1 of 20 of the float phase"):
        loop.train(small("data.crop=1"), tmp_path, pause_after=0.0)
    loop.train(small("data.crop=1"), tmp_path, resume=True)
    assert_same(finished, tmp_path)


class Notes(running.Display):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_max_minutes_ends_in_time_with_a_whole_model(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "_TIMED_SECONDS", 0.1)
    notes, minutes = Notes(), 0.2
    started = time.monotonic()
    long = [f"epochs.{stage}=2000" for stage in ("float", "search", "finetune")]
    result = loop.train(recipe.load("digits_mlp", long), tmp_path, max_minutes=minutes, display=notes)
    assert time.monotonic() - started < 60 * minutes + 3
    assert any("to end in time" in note for note in notes.notes)
    assert result["scheme"]["budget_met"] is True and result["hard_accuracy"] > 0.5
    if any("out of time" in note for note in notes.notes):  # before the last step: the bits are still a little soft
        assert abs(result["soft_accuracy"] - result["hard_accuracy"]) < 0.05
    else:
        assert result["soft_accuracy"] == result["hard_accuracy"]


def test_max_minutes_changes_nothing_where_time_is_plenty(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "_TIMED_SECONDS", 0.1)
    loop.train(small("data.crop=1"), tmp_path, max_minutes=10.0)
    assert_same(finished, tmp_path)


def test_out_of_time_in_the_search_the_scheme_is_fixed_at_once(tmp_path, monkeypatch):
    """Steps that take far longer than they did when they were timed."""
    monkeypatch.setattr(loop, "fit_into_time", lambda run, shorten: setattr(run, "seconds_to_finish", 0.0))
    overrides = ["epochs.float=1", "epochs.search=100000", "epochs.finetune=1"]
    notes = Notes()
    result = loop.train(recipe.load("digits_mlp", overrides), tmp_path, max_minutes=0.05, display=notes)
    assert any("out of time" in note for note in notes.notes)
    assert result["scheme"]["budget_met"] is True


def test_a_sweep_meets_each_budget_from_one_search(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    rows = sweep.sweep(folder, ["2.5 bits", "0.019 MB"], epochs=1)
    assert [row["budget"] for row in rows] == ["2.5 bits", "0.019 MB"]
    assert rows[0]["stored_bits"] <= 2.5 and rows[1]["file_bytes"] <= 19000
    assert len((folder / "sweep.csv").read_text().splitlines()) == 3
    before = (folder / "sweep" / "2.5-bits" / "report.json").stat().st_mtime_ns
    assert sweep.sweep(folder, ["2.5 bits"], epochs=1) == rows[:1]
    assert (folder / "sweep" / "2.5-bits" / "report.json").stat().st_mtime_ns == before
    with pytest.raises(running.TrainingError, match="expected search_from with a search of mlp, got "):
        loop.train(small(f"search_from={tmp_path / 'nowhere'}"), tmp_path / "bad")


def test_report_and_folder(finished):
    report, records, _ = outcome(finished)
    assert report["scheme"]["budget_met"] is True and report["scheme"]["stored_bits"] <= 3.0
    assert report["soft_accuracy"] == report["hard_accuracy"] > 0.5
    assert [record["iteration"] for record in records] == sorted({record["iteration"] for record in records})
    assert records[-1]["layer_bits"].keys() == {"hidden1", "hidden2", "head"}
    assert records[-1]["temperature"] > 1000
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["csq_kernels"]["torch"] == torch.__version__
    text = (finished / "report.txt").read_text()
    for part in ("hidden1", "budget 3", "met", "float accuracy", "soft accuracy", "exact-integer accuracy", "gap"):
        assert part in text
    assert recipe.load(str(finished / "recipe.yaml")).dump() == small("data.crop=1").dump()


def test_budgets_in_several_units_hold_through_an_interruption(tmp_path):
    """The times are measured once in a run: measured again, they would ask for another scheme."""
    budgets = ["6 bits", "0.3 MBOPs", "50 ms"]
    chosen = small(f"budget={json.dumps(budgets)}", "checkpoint.steps=5")
    with pytest.raises(KeyboardInterrupt):
        loop.train(chosen, tmp_path, display=Interrupt(50))
    kept = (tmp_path / runs.WORKLOAD).read_bytes()
    result = loop.train(chosen, tmp_path, resume=True)
    assert (tmp_path / runs.WORKLOAD).read_bytes() == kept
    scheme, counted = result["scheme"], runs.load_workload(tmp_path, chosen)
    assert [use["met"] for use in scheme["budgets"]] == [True] * 3 and scheme["budget_met"]
    used = sum(counted.operations[row["name"]] * row["stored_bits"] for row in scheme["layers"])
    assert scheme["budgets"][1]["cost"] == pytest.approx(used / 1e6) and used <= 0.3e6
    # One sample: 64 inputs, 32 hidden units twice, 10 classes, floats.
    assert sum(counted.operations.values()) == 32 * sum(counted.macs.values())
    assert all(f"budget {text}: used" in (tmp_path / "report.txt").read_text() for text in ("0.3 MBOPs", "50 ms"))
    assert results.read(tmp_path).report.scheme.asked == "6 stored bits, 0.3 MBOPs, 50 ms"


def test_no_workload_is_counted_where_no_budget_needs_it(finished):
    assert not (finished / runs.WORKLOAD).exists()


def test_a_budget_of_work_out_of_reach_is_known_before_training(tmp_path):
    with pytest.raises(
        running.TrainingError, match="expected budget of at least .* MBOPs for this model, got 0.001 MBOPs"
    ):
        loop.train(small("budget=0.001 MBOPs"), tmp_path)


def test_resume_of_a_finished_run_changes_nothing(finished):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    result = loop.train(small("data.crop=1"), finished, resume=True)
    assert result["hard_accuracy"] == outcome(finished)[0]["hard_accuracy"]
    assert before == {path.name: path.read_bytes() for path in finished.iterdir()}


def test_a_folder_with_a_run_is_not_overwritten(finished):
    with pytest.raises(running.TrainingError, match="--resume"):
        loop.train(small(), finished)


def test_a_run_killed_between_two_renames_is_not_overwritten(finished, tmp_path):
    shutil.copy(finished / checkpoint.NAME, tmp_path / checkpoint.PREVIOUS)
    with pytest.raises(running.TrainingError, match="--resume"):
        loop.train(small(), tmp_path)


def test_a_page_that_cannot_be_written_is_said(finished, monkeypatch):
    page = pytest.importorskip("csq_kernels.train.page")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(page, "write", full)
    assert "No space left on device" in train_command._write_page(finished)


def test_resume_with_another_recipe_names_the_difference(finished):
    with pytest.raises(running.TrainingError, match="optimizer.lr=0.05"):
        loop.train(small("data.crop=1", "optimizer.lr=0.05"), finished, resume=True)


def test_half_written_metrics_are_dropped(finished, tmp_path):
    chosen = small("data.crop=1", "checkpoint.steps=3")
    with pytest.raises(KeyboardInterrupt):
        loop.train(chosen, tmp_path, display=Interrupt(30))
    with open(tmp_path / running.METRICS, "a") as metrics:
        metrics.write('{"iteration": 3')
    loop.train(chosen, tmp_path, resume=True)
    assert_same(finished, tmp_path)


def test_without_float_phase(tmp_path):
    result = loop.train(small("epochs.float=0", "csq_optimizer={name: adamw, lr: 0.002}"), tmp_path)
    assert "float_accuracy" not in result and result["scheme"]["budget_met"]
    assert "float accuracy" not in (tmp_path / "report.txt").read_text()


def test_weights_decay_alike_whatever_steps_the_bits(finished, tmp_path):
    losses = {}
    for step, decay in (("single-pass", 50.0), ("separate", 50.0), ("separate", 0.0)):
        out = tmp_path / f"{step}-{decay}"
        start = ("epochs.float=0", f"init={finished}", "epochs.search=1", "epochs.finetune=1")
        loop.train(small(*start, f"optimizer.step={step}", f"optimizer.weight_decay={decay}"), out)
        losses[step, decay] = [json.loads(line)["loss"] for line in (out / running.METRICS).read_text().splitlines()]
    single, separate, free = losses.values()
    assert separate == pytest.approx(single, rel=1e-3)
    assert free[-1] < 0.9 * single[-1]


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.name=adamw", "optimizer.lr=0.01", "clip_grad_norm=1.0", "label_smoothing=0.1"],
        ["schedule.name=onecycle", "schedule.warmup=0.3", "quantization.act_bits=4"],
        [
            "model.name=cnn",
            "model.options={width: 4}",
            "schedule.name=constant",
            "quantization.gate_granularity=channel",
        ],
        ["model.name=vit", "model.options={width: 8, depth: 1, heads: 2, patch: 4}", "budget=2.5 paper bits"],
        ["quantization.rules={hidden1: null}", "quantization.initial_bits=3"],
    ],
    ids=["adamw", "onecycle", "cnn", "vit", "rules"],
)
def test_options_train_to_a_met_budget(tmp_path, overrides):
    result = loop.train(small("epochs.float=1", *overrides), tmp_path)
    assert result["scheme"]["budget_met"]


def test_a_loss_that_is_not_finite_stops(tmp_path):
    with pytest.raises(running.TrainingError, match="not finite.*lower optimizer.lr"):
        loop.train(small("optimizer.lr=1.0e+30"), tmp_path)


def test_a_batch_larger_than_the_data_is_refused(tmp_path):
    with pytest.raises(running.TrainingError, match="batch_size of at most 1397, got 5000"):
        loop.train(small("batch_size=5000"), tmp_path)


def test_an_impossible_device_is_refused(tmp_path):
    with pytest.raises(running.TrainingError, match="expected device"):
        loop.train(small(), tmp_path, device="abacus")


@pytest.mark.parametrize("name", ["cosine", "onecycle", "constant"])
def test_lr_factor(name):
    factors = [phase.lr_factor(name, step, 100, 0.2) for step in range(100)]
    rise = factors[:21]
    assert rise == sorted(rise) and rise[0] < 0.06 and factors[20] == 1.0
    assert factors[20:] == sorted(factors[20:], reverse=True)
    assert factors[-1] == 1.0 if name == "constant" else 0 < factors[-1] < 0.001
    assert phase.lr_factor(name, 0, 1, 0.0) == 1.0


@pytest.mark.parametrize("name", sorted(models.MODELS.keys() - {"char_gpt"}))
def test_models_take_the_size_and_channels_of_the_data(name):
    for channels, size in ((1, 28), (3, 32)):
        model = models.build(name, channels, size, 7)
        assert model(torch.zeros(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "weights", "tensors", "strided"),
    [
        ("resnet18", 11_689_512, 122, ["conv1", "layer2.0.conv1", "layer2.0.downsample.0", "layer3.0.conv1"]),
        ("resnet50", 25_557_032, 320, ["conv1", "layer2.0.conv2", "layer2.0.downsample.0", "layer3.0.conv2"]),
    ],
)
def test_imagenet_networks_are_those_of_torchvision(name, weights, tensors, strided):
    """By their published size, the names and shapes of their tensors, and where the stride is (V1.5)."""
    with torch.device("meta"):
        model = models.build(name, 3, 224, 1000)
    state = model.state_dict()
    assert sum(parameter.numel() for parameter in model.parameters()) == weights and len(state) == tensors
    last, inputs = ("bn2", 512) if name == "resnet18" else ("bn3", 2048)
    shapes = {"conv1.weight": (64, 3, 7, 7), f"layer4.1.{last}.running_var": (inputs,), "fc.weight": (1000, inputs)}
    shapes |= {"layer3.0.downsample.1.num_batches_tracked": (), "layer2.0.conv2.weight": (128, 128, 3, 3)}
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
    strides = [key for key, module in model.named_modules() if getattr(module, "stride", 1) == (2, 2)]
    assert strides[:4] == strided
    assert model(torch.zeros(1, 3, 224, 224, device="meta")).shape == (1, 1000)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_blocks_of_imagenet_networks_start_as_their_shortcuts(name):
    model = models.build(name, 3, 32, 10, width=8)
    block, last = model.layer1[1], "bn2" if name == "resnet18" else "bn3"
    assert not getattr(block, last).weight.any()
    input = torch.rand(2, block.conv1.in_channels, 8, 8)
    assert torch.equal(block(input), input)


def test_char_gpt_sees_nothing_of_what_comes():
    model = models.build("char_gpt", 1, 12, 7, width=16, depth=2, heads=2).eval()
    tokens = torch.randint(0, 7, (3, 12))
    logits = model(tokens)
    assert logits.shape == (3, 7, 12)
    changed = tokens.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 7
    others = model(changed)
    assert torch.equal(others[..., :8], logits[..., :8]) and not torch.isclose(others[..., 8:], logits[..., 8:]).any()
    assert torch.allclose(model(tokens[:, :5]), logits[..., :5], atol=1e-6)
    with pytest.raises(ValueError, match="divide the width 16, got 3"):
        models.build("char_gpt", 1, 12, 7, width=16, heads=3)


def test_resnet20_has_its_twenty_layers():
    model = models.build("resnet20", 1, 28, 10)
    main_path = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
    ]
    assert len([name for name in main_path if "shortcut" not in name]) == 20


def test_model_options_are_checked():
    with pytest.raises(ValueError, match="among width, got 'depth'"):
        models.build("cnn", 1, 28, 10, depth=2)
    with pytest.raises(ValueError, match="positive integer, got 0"):
        models.build("cnn", 1, 28, 10, width=0)
    with pytest.raises(ValueError, match="divide the image size 28, got 5"):
        models.build("vit", 1, 28, 10, patch=5)


# --- checkpoints ---


STATE = dict.fromkeys(checkpoint.KEYS - {"version"}, 0)


def test_checkpoint_keeps_the_one_before(tmp_path):
    checkpoint.save(tmp_path, STATE | {"step": 1})
    checkpoint.save(tmp_path, STATE | {"step": 2})
    assert checkpoint.load(tmp_path)["step"] == 2
    # As after a kill between the two renames.
    (tmp_path / checkpoint.NAME).unlink()
    assert checkpoint.load(tmp_path)["step"] == 1
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.PREVIOUS}


def damage_cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def damage_flip(content: bytes) -> bytes:
    return content[:60] + bytes(200) + content[260:]


@pytest.mark.parametrize("damage", [damage_cut, damage_flip, lambda _: b"", lambda _: b"text"])
def test_a_damaged_checkpoint_is_named_and_left_alone(tmp_path, damage):
    checkpoint.save(tmp_path, STATE | {"step": 1})
    path = tmp_path / checkpoint.NAME
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.load(tmp_path)
    assert str(path) in str(error.value) and checkpoint.PREVIOUS not in str(error.value)
    checkpoint.save(tmp_path, STATE | {"step": 2})
    path.write_bytes(damage(path.read_bytes()))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(checkpoint.CheckpointError, match=checkpoint.PREVIOUS):
        checkpoint.load(tmp_path)
    assert before == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / checkpoint.NAME)
    with pytest.raises(checkpoint.CheckpointError, match="something else"):
        checkpoint.load(tmp_path)
    torch.save(STATE | {"version": 99}, tmp_path / checkpoint.NAME)
    with pytest.raises(checkpoint.CheckpointError, match="version 1, got 99"):
        checkpoint.load(tmp_path)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="found none"):
        loop.train(small(), tmp_path, resume=True)


@pytest.fixture
def small_files():
    """A limit on the size of files, which the system enforces as it enforces a full disk: in the middle of a write."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, small_files):
    checkpoint.save(tmp_path, STATE | {"step": 1})
    small_files(100_000)
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.save(tmp_path, STATE | {"step": 2, "model": torch.zeros(100_000)})
    assert str(tmp_path / checkpoint.NAME) in str(error.value) and "intact" in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.NAME}
    assert checkpoint.load(tmp_path)["step"] == 1


def test_no_space_left_is_said(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, STATE | {"step": 1})

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(checkpoint.CheckpointError, match="No space left on device.*intact"):
        checkpoint.save(tmp_path, STATE | {"step": 2})
    assert checkpoint.load(tmp_path)["step"] == 1


# --- recipes ---


@pytest.mark.parametrize("name", recipe.names())
def test_recipes_of_the_package_are_valid(name):
    chosen = recipe.load(name)
    assert chosen.name == name
    assert recipe.make(chosen.dump()).dump() == chosen.dump()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.learning_rate=1"], "unknown key optimizer.learning_rate"),
        (["colour=blue"], "unknown key colour"),
        (["optimizer.lr=fast"], "optimizer.lr: .*got 'fast'"),
        (["optimizer.lr=-1"], "optimizer.lr: .*greater than 0, got -1"),
        (["optimizer.lr=.nan"], "optimizer.lr: "),
        (["budget=3 apples"], "budget: expected budget as .*got '3 apples'"),
        (["model.name=alexnet"], "expected model.name of mlp, .*got 'alexnet'"),
        (["model.options.colour=3"], "expected options of model mlp among width, depth, got 'colour'"),
        (["quantization.n_bits=99"], "expected n_bits from 1 to 16, got 99"),
        (["data.name=cifar"], "data: expected data.name of .*got 'cifar'"),
        (["data.size=8"], "expected options of data set digits among .*got 'size'"),
        (["data.name=imagenet", "data.crop=2"], "expected options of data set imagenet among .*got 'crop'"),
        (["model.name=char_gpt"], "expected model.name of mlp, .*for data set digits, got 'char_gpt'"),
        (["data.name=text"], "expected model.name of char_gpt for data set text, got 'mlp'"),
        (["epochs.float"], "key=value, got 'epochs.float'"),
        (["seed.deep=1"], "seed"),
        (["epochs={search: 1}"], "missing key epochs.finetune"),
        (["data.name=[unclosed"], "YAML value"),
    ],
)
def test_mistakes_in_recipes_are_named(overrides, message):
    with pytest.raises(recipe.RecipeError, match=message):
        recipe.load("digits_mlp", overrides)


def test_overrides_are_yaml():
    chosen = recipe.load(
        "digits_mlp", ["optimizer.lr=1e-3", "data.flip=true", "budget=2.5 bits", "clip_grad_norm=null"]
    )
    assert (chosen.optimizer.lr, chosen.data.flip, chosen.budget) == (1e-3, True, "2.5 bits")
    assert chosen.clip_grad_norm is None and recipe.load("digits_mlp", seed=7).seed == 7


@pytest.mark.parametrize("content", ["- a list", "name: [", "\x00", "just text"])
def test_files_that_are_no_recipe(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(recipe.RecipeError, match="recipe.yaml"):
        recipe.load(str(path))


def test_the_loop_imports_without_the_extra_packages():
    script = (
        "import sys\n"
        "for name in ('pydantic', 'yaml', 'typer', 'rich', 'matplotlib', 'sklearn', 'mlxtend'):\n"
        "    sys.modules[name] = None\n"
        "from csq_kernels.train import checkpoint, data, loop, models\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
