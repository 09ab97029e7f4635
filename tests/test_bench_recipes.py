"""The experiments of ``bench/recipes.py`` are recipes that exist, and the pages of results say what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pydantic")
from csq_kernels.train import recipe

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def recipes():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import recipes

        yield recipes
        for name in ("recipes", "harness"):
            del sys.modules[name]


def test_every_experiment_is_a_recipe(recipes):
    for suite in recipes.SUITES.values():
        for name, experiment in suite.experiments.items():
            overrides = [*suite.common, *experiment.overrides]
            if experiment.continues is not None:
                assert experiment.after in suite.experiments, name
                overrides.append(experiment.continues(Path("some") / "run"))
            recipe.load(suite.recipe, overrides)


def test_pages_say_what_the_results_hold(recipes):
    measured = {row["suite"] for row in recipes.read()}
    assert measured, "no results"
    for suite in measured:
        page = recipes.DOCUMENTS / f"{suite}.md"
        assert page.read_text() == recipes.table(suite), f"stale: python bench/recipes.py {suite} --table"


def test_runs_do_not_start_where_the_sources_are(recipes, tmp_path, monkeypatch):
    """``python -m`` looks in its folder first, and sources have no native module."""
    report = {"method": "lsq", "seconds": 1.0, "hard_accuracy": 0.5, "scheme": None}

    def start(command, cwd, **streams):
        assert cwd == tmp_path and f"init={tmp_path / 'float-s1'}" in command
        out = Path(command[command.index("--out") + 1])
        out.mkdir()
        (out / "report.json").write_text(json.dumps(report))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(recipes.subprocess, "run", start)
    row = recipes.run("fashion_mnist_resnet20_half", "lsq-3", 1, tmp_path, [])
    assert (row["experiment"], row["seed"], row["hard_accuracy"]) == ("lsq-3", 1, 0.5)


def test_further_options_reach_every_run(recipes, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(recipes, "RESULTS", tmp_path / "recipes.jsonl")
    monkeypatch.setattr(recipes, "DOCUMENTS", tmp_path)
    monkeypatch.setattr(recipes, "run", lambda *run: started.append(run))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # put back after main has changed it
    options = "--only float csq-3 --seeds 1 -- data.root=elsewhere --device=cpu"
    monkeypatch.setattr(sys, "argv", ["recipes.py", "char_gpt", f"--out={tmp_path}", *options.split()])
    recipes.main()
    folder, further = tmp_path / "char_gpt", ["data.root=elsewhere", "--device=cpu"]
    assert started == [("char_gpt", name, 1, folder, further) for name in ("float", "csq-3")]


def test_a_line_takes_the_place_of_an_older_run(recipes, tmp_path, monkeypatch):
    monkeypatch.setattr(recipes, "RESULTS", tmp_path / "recipes.jsonl")
    row = {"suite": "s", "experiment": "e", "seed": 0, "seconds": 1.0, "hard_accuracy": 0.5, "commit": "a"}
    recipes.write(row)
    recipes.write(row | {"commit": "b"})  # the same run, collected again
    assert [line["commit"] for line in recipes.read()] == ["a"]
    recipes.write(row | {"seconds": 2.0, "commit": "c"})
    recipes.write(row | {"seed": 1, "commit": "d"})
    assert [line["commit"] for line in recipes.read()] == ["c", "d"]
