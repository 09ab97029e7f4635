"""``bench/run.py``: suites of whole networks and of scaling in small, and every suite in turn within some minutes."""

import argparse
import importlib
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from torch import nn

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """``run.py``, with copies that are no larger than they need be."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        module = importlib.import_module("run")
        patch.setattr(sys.modules["harness"], "COPY_BYTES", 1 << 16)
        yield module
    for name, loaded in list(sys.modules.items()):
        if name not in before and str(BENCH) in str(getattr(loaded, "__file__", "")):
            del sys.modules[name]


def rows_of(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, out: Path, *words: str) -> list[dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["run.py", *words, "--out", str(out)])
    assert bench.main() == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_whole_networks(bench: ModuleType, monkeypatch, tmp_path: Path, capsys) -> None:
    suite = sys.modules["suites.model"]
    linear = lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))  # noqa: E731
    convolutions = lambda: nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())  # noqa: E731
    monkeypatch.setattr(suite, "NETWORKS", {"mlp": (linear, (4, 4, 4)), "resnet20": (convolutions, (4, 6, 6))})
    providers = ",".join(name for name in (*suite.TRAIN, *suite.INFER) if name != "reference-compiled")
    options = ["--networks", "mlp,resnet20", "--providers", providers, "--rounds", "2", "--threads", "1"]
    rows = rows_of(bench, monkeypatch, tmp_path / "lines", "model", *options)
    measured = {(row["network"], row["mode"]): [] for row in rows}
    for row in rows:
        measured[row["network"], row["mode"]].append(row["provider"])
        assert row["op"] == "model" and row["machine"] and 0 < row["seconds"]["p20"] <= row["seconds"]["p80"]
        ours = row["provider"].startswith(("csq", "s"))
        assert row["provider"] == "reference" or (row["error_over_allowed"] is not None) == ours
        assert not ours or row["error_over_allowed"] <= 1
        assert (row["stored_bits"] == 4.0) == row["provider"].startswith("csq")
    trained = ["float", "reference", "separate", "single-pass"]
    inferred = ["float", "torch dynamic int8", "csq int8", "csq high", "csq exact"]
    assert measured == {
        ("mlp", "infer"): inferred,
        ("resnet20", "infer"): [name for name in inferred if not name.startswith("torch")],
        ("mlp", "train"): trained,
        ("resnet20", "train"): trained,
    }
    assert "without torch dynamic int8, resnet20: its convolutions" in capsys.readouterr().err


def test_a_wrong_network_has_no_time(bench: ModuleType, monkeypatch, tmp_path: Path, capsys) -> None:
    suite = sys.modules["suites.model"]
    monkeypatch.setattr(suite, "NETWORKS", {"mlp": (lambda: nn.Linear(64, 32), (64,))})
    made = suite.judged_inference

    def slightly_wrong(*arguments):
        networks, _ = made(*arguments)
        return networks, {name: sys.modules["accuracy"].Verdict(1.01, "why") for name in networks if "csq" in name}

    monkeypatch.setattr(suite, "judged_inference", slightly_wrong)
    out = tmp_path / "lines"
    monkeypatch.setattr(sys, "argv", ["run.py", "model", "--networks", "mlp", "--modes", "infer", "--out", str(out)])
    assert bench.main() == 1
    assert [json.loads(line)["provider"] for line in out.read_text().splitlines()] == ["float", "torch dynamic int8"]
    assert "RED csq exact mlp infer: why; no time is given" in capsys.readouterr().err


def test_scaling(bench: ModuleType, monkeypatch, tmp_path: Path, capsys) -> None:
    suite = sys.modules["suites.scaling"]
    monkeypatch.setattr(suite, "STEP_WEIGHTS", 10)
    monkeypatch.setattr(suite, "PRODUCT_WEIGHTS", 11)
    options = ["--exponents", "9,50", "--bits", "2,16", "--thread-counts", "1,2", "--batches", "1,3", "--rounds", "1"]
    rows = rows_of(bench, monkeypatch, tmp_path / "lines", "scaling", *options, "--threads", "1")
    cases = {
        (
            row["mode"],
            row["sweep"],
            tuple(row["shape"]),
            row.get("stored_bits", row["n_bits"] if "n_bits" in row else 0),
        )
        + (row["threads"], row.get("batch"))
        for row in rows
    }
    assert cases == {
        ("step", "weights", (32, 16), 8, 1, None),
        ("step", "bits", (32, 32), 2, 1, None),
        ("step", "bits", (32, 32), 16, 1, None),
        ("step", "threads", (32, 32), 8, 1, None),
        ("step", "threads", (32, 32), 8, 2, None),
        ("product", "weights", (32, 16), 4, 1, 1),
        ("product", "bits", (64, 32), 2, 1, 1),
        ("product", "bits", (64, 32), 16, 1, 1),
        ("product", "threads", (64, 32), 4, 1, 1),
        ("product", "threads", (64, 32), 4, 2, 1),
        ("product", "batch", (64, 32), 4, 1, 3),
    }
    steps = {row["provider"] for row in rows if row["mode"] == "step"}
    assert steps == {"eager", "separate", "single-pass", "single-pass-narrow"}
    products = {row["provider"] for row in rows if row["mode"] == "product"}
    assert products == {"torch fp32", "csq int8", "csq high", "csq exact"}
    errors = capsys.readouterr().err
    for label in ("step 33554432x33554432", "product of 2^50 weights, 4 bits"):
        assert f"without {label}" in errors and "of memory" in errors
    packed = next(row for row in rows if row["provider"] == "csq exact" and row["stored_bits"] == 2)
    assert packed["weight_bytes"] == 64 * 128 * 2 // 8 + 4  # of whole tiles


def fake_suite(harness: ModuleType, name: str, seconds: list[float], right: bool | Exception = True) -> SimpleNamespace:
    """A suite with cases that take so long, at a cost in proportion."""

    def measure(wait: float) -> tuple[list[dict[str, Any]], bool]:
        time.sleep(wait)
        if isinstance(right, Exception):
            raise right
        return [{"op": name, "provider": "csq", "wait": wait}], right

    def cases(options) -> list:
        return [harness.Case(f"{name} {wait}", wait, lambda wait=wait: measure(wait)) for wait in seconds]

    printed: list = []
    return SimpleNamespace(cases=cases, add_options=lambda parser: None, print_rows=printed.extend, printed=printed)


@pytest.fixture
def of_suites(bench: ModuleType, monkeypatch, tmp_path: Path) -> Callable[..., int]:
    def run_all(minutes: float, **suites: SimpleNamespace) -> int:
        monkeypatch.setattr(bench, "SUITES", suites)
        monkeypatch.setattr(bench, "ALL", dict.fromkeys(suites, ""))
        monkeypatch.setattr(sys, "argv", ["run.py", "all", "--minutes", str(minutes), "--out", str(tmp_path)])
        return bench.main()

    return run_all


def test_all_runs_what_fits_and_says_what_it_leaves_out(bench, of_suites, tmp_path: Path, capsys) -> None:
    harness = sys.modules["harness"]
    suites = {name: fake_suite(harness, name, [0.05, 0.1, 60.0, 0.05]) for name in ("one", "two")}
    started = time.monotonic()
    assert of_suites(10 / 60, **suites) == 0
    assert time.monotonic() - started < 10
    output = capsys.readouterr().out
    for name, suite in suites.items():
        assert [row["wait"] for row in suite.printed] == [0.05, 0.1, 0.05]
        lines = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [line["wait"] for line in lines] == [0.05, 0.1, 0.05] and lines[0]["versions"]["torch"]
        assert f"{name}: left out for lack of time: {name} 60.0" in output
    assert "all right: one, two" in output


def test_all_takes_the_first_case_of_every_suite_whatever_the_time(bench, of_suites) -> None:
    suites = {name: fake_suite(sys.modules["harness"], name, [0.01, 0.01]) for name in ("one", "two")}
    assert of_suites(0, **suites) == 0
    assert [len(suite.printed) for suite in suites.values()] == [1, 1]


@pytest.mark.parametrize("right", [False, ValueError("broken")])
def test_all_goes_on_after_a_failure_and_fails(bench, of_suites, right, capsys) -> None:
    harness = sys.modules["harness"]
    last = fake_suite(harness, "last", [0.01])
    assert of_suites(0, first=fake_suite(harness, "first", [0.01], right), last=last) == 1
    captured = capsys.readouterr()
    assert "failed: first" in captured.out and len(last.printed) == 1
    assert "ValueError: broken" in captured.err or right is False


def test_all_asks_every_suite_for_options_that_it_has(bench: ModuleType) -> None:
    for name, words in bench.ALL.items():
        options = bench.arguments(argparse.ArgumentParser(), name).parse_args(words.split())
        cases = list(bench.SUITES[name].cases(options))
        assert cases and all(case.cost > 0 for case in cases) and len({case.label for case in cases}) == len(cases)
    assert set(bench.SUITES) - set(bench.ALL) == {"reconstruct_launch"}


def test_no_process_outlives_the_walks(bench: ModuleType, monkeypatch, tmp_path: Path) -> None:
    options = ["--shapes", "2048x2048", "--bits", "2", "--batches", "64", "--threads", "1", "--rounds", "1"]
    rows = rows_of(bench, monkeypatch, tmp_path / "lines", "bitserial", *options)
    assert {row["provider"] for row in rows} == {"torch fp32", "csq int8", "csq high", "csq exact"}
    assert not multiprocessing.active_children()


def test_without_a_compiler_compiled_providers_are_skipped(bench: ModuleType, monkeypatch, capsys) -> None:
    harness = sys.modules["harness"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert harness.present(["eager", "compiled", "reference-compiled"], "cpu") == ["eager"]
    assert "without reference-compiled: torch.compile needs a C++ compiler" in capsys.readouterr().err
    assert harness.present(["compiled"], "cuda") == ["compiled"]
