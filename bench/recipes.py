"""CSQ against its baselines on real data: ``python bench/recipes.py SUITE``, one run of ``csq train`` each.

Every method starts from the same float weights of its seed and trains as long. A run that was interrupted goes on, and
a finished one is not repeated. Each is a line of ``results/recipes.jsonl``, and ``--table`` turns those lines into
``docs/results/SUITE.md``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness import ROOT, circumstances

RESULTS = Path(__file__).parent / "results" / "recipes.jsonl"
DOCUMENTS = ROOT / "docs" / "results"
DISTILLED = "distillation={weight: 0.5}"
# With a plane in each layer there is none above it to decide first: gradients of the weight's own temperature.
ONE_PLANE = "search.gradient_temperature=null"
ADAM = "csq_optimizer={name: adam, lr: 6.0e-3, logit_lr: 0.1, gate_lr: 0.02, scale_lr: 2.0e-4, weight_decay: 5.0e-4}"


@dataclass(frozen=True)
class Experiment:
    """Overrides of the suite's recipe; ``after`` names the experiment of the same seed that must be finished before."""

    about: str
    overrides: tuple[str, ...]
    after: str | None = None
    # With the folder of the run that came before.
    continues: Callable[[Path], str] | None = None
    seeds: tuple[int, ...] = (0, 1, 2)


def from_float(folder: Path) -> str:
    return f"init={folder}"


def from_search(folder: Path) -> str:
    return f"search_from={folder}"


@dataclass(frozen=True)
class Suite:
    """A recipe, what all its runs change, and its experiments in the order in which they run."""

    title: str
    recipe: str
    common: tuple[str, ...]
    experiments: dict[str, Experiment] = field(default_factory=dict)
    # What the runs are judged by: accuracy, or loss in nats where what comes next is to be told.
    figure: str = "accuracy"


def _trained(about: str, *overrides: str, **options: Any) -> Experiment:
    """Starts from the float weights."""
    return Experiment(about, ("epochs.float=0", *overrides), "float", from_float, **options)


def fashion(epochs: int) -> dict[str, Experiment]:
    """Everything that starts from float weights trains ``epochs`` after the ``epochs`` of the float model."""
    published = (f"epochs.search={2 * epochs - 2}", "epochs.finetune=2", "quantization.scale_granularity=layer")
    return {
        "float": Experiment("float", ("method=float",)),
        "lsq-3": _trained("LSQ, 3 bits everywhere", "method=lsq", "bits=3"),
        "csq-3": _trained("CSQ, 3.0 stored bits", "budget=3.0 bits"),
        "lsq-2": _trained("LSQ, 2 bits everywhere", "method=lsq", "bits=2"),
        "csq-2": _trained("CSQ, 2.0 stored bits", "budget=2.0 bits", ONE_PLANE),
        "lsq-3-distilled": _trained("LSQ, 3 bits everywhere, distilled", "method=lsq", "bits=3", DISTILLED),
        "csq-3-distilled": _trained("CSQ, 3.0 stored bits, distilled", "budget=3.0 bits", DISTILLED),
        "lsq-2-distilled": _trained("LSQ, 2 bits everywhere, distilled", "method=lsq", "bits=2", DISTILLED),
        "csq-2-distilled": _trained("CSQ, 2.0 stored bits, distilled", "budget=2.0 bits", ONE_PLANE, DISTILLED),
        "float-longer": Experiment("float, trained on as long", ("method=float",), "float", from_float),
        "lsq-4": _trained("LSQ, 4 bits everywhere", "method=lsq", "bits=4"),
        "csq-4": _trained("CSQ, 4.0 stored bits", "budget=4.0 bits"),
        "round-4": _trained("rounded to 4 bits", "method=round", "bits=4"),
        "round-3": _trained("rounded to 3 bits", "method=round", "bits=3"),
        "round-2": _trained("rounded to 2 bits", "method=round", "bits=2"),
        "csq-uniform-3": _trained(
            "CSQ, one precision of 3 stored bits", "quantization.n_bits=2", "quantization.min_bits=2", "budget=3.0 bits"
        ),
        "csq-grown-3": _trained(
            "CSQ grown from 1 bit, 3.0 stored bits", "quantization.initial_bits=1", "budget=3.0 bits"
        ),
        "csq-resolved-2.5": Experiment(
            "CSQ, the search at 3.0 met anew at 2.5 stored bits", ("budget=2.5 bits",), "csq-3", from_search, (0,)
        ),
        "csq-paper-2": Experiment(
            "the published rules from scratch, 2 paper bits",
            ("preset=paper", "epochs.float=0", *published, "budget=2.0 paper bits"),
            seeds=(0,),
        ),
    }


ABLATION = {
    "float": Experiment("float", ("method=float",)),
    "lsq-2": _trained("LSQ, 2 bits everywhere", "method=lsq", "bits=2"),
    "csq-2": _trained("the recipe"),
    "adam": _trained("bits by Adam", ADAM),
    "slow-bits": _trained("bits at the rate of the rest", "optimizer.logit_lr=0.1"),
    "no-decay": _trained("without decay of the weights", "optimizer.weight_decay=0"),
    "no-decision": _trained(
        "temperature (9) over the whole finetune stage", "search.decision_share=0", "search.lateness=1"
    ),
    "early": _trained("temperature (9) until the bits decide", "search.lateness=1"),
    "gradient-3": _trained("gradients of a temperature of 3 at most", "search.gradient_temperature=3"),
    "final-200": _trained("last temperature 200", "search.final_temperature=200"),
    "scale-layer": _trained("one scale a layer", "quantization.scale_granularity=layer"),
    "no-search": _trained(
        "no search: one paper bit everywhere", "quantization.n_bits=1", "epochs.search=1", "epochs.finetune=3"
    ),
    "distilled": _trained("with distillation", DISTILLED),
}

LANGUAGE = {
    "float": Experiment("float", ("method=float",)),
    "csq-3": _trained("CSQ, 3.0 stored bits"),
    "lsq-3": _trained("LSQ, 3 bits everywhere", "method=lsq", "bits=3"),
    "round-3": _trained("rounded to 3 bits", "method=round", "bits=3"),
}

SUITES = {
    "char_gpt": Suite(
        "A character-level GPT on the plays of Shakespeare",
        "char_gpt",
        ("precision=bfloat16", "checkpoint.minutes=3"),
        LANGUAGE,
        figure="loss",
    ),
    "fashion_mnist_cnn_ablation": Suite(
        "What each setting is worth: a small convolutional network on Fashion-MNIST at 2.0 stored bits",
        "fashion_mnist_resnet20",
        ("model={name: cnn}", "budget=2.0 bits", ONE_PLANE, "epochs.float=4", "epochs.search=1", "epochs.finetune=3"),
        ABLATION,
    ),
    "fashion_mnist_resnet20": Suite(
        "ResNet-20 on Fashion-MNIST", "fashion_mnist_resnet20", ("checkpoint.minutes=3",), fashion(30)
    ),
    "fashion_mnist_resnet20_half": Suite(
        "ResNet-20 at half width on Fashion-MNIST, 12 epochs from 12 epochs of float training",
        "fashion_mnist_resnet20",
        (
            "model.options={width: 8}",
            "precision=bfloat16",
            "epochs.float=12",
            "epochs.search=2",
            "epochs.finetune=10",
            "checkpoint.minutes=3",
        ),
        fashion(12),
    ),
}


def run(suite_name: str, name: str, seed: int, folder: Path, arguments: list[str]) -> dict[str, Any] | None:
    """Train one experiment with one seed, or go on with it; its line of results, or None if it failed."""
    suite = SUITES[suite_name]
    experiment = suite.experiments[name]
    out = folder / f"{name}-s{seed}"
    overrides = [*suite.common, *experiment.overrides]
    if experiment.continues is not None:
        overrides.append(experiment.continues(folder / f"{experiment.after}-s{seed}"))
    command = [sys.executable, "-m", "csq_kernels.cli", "train", suite.recipe, *overrides, f"--seed={seed}"]
    if (out / "checkpoint.pt").exists():
        command.append("--resume")
    if not (out / "report.json").exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{out}.log", "a") as log:
            # Not from the root: Python would import the sources, which have no native module.
            whole = [*command, "--out", str(out), *arguments]
            code = subprocess.run(whole, stdout=log, stderr=log, cwd=out.parent).returncode
        if code:
            print(f"{name}, seed {seed}: failed with {code}, see {out}.log")
            return None
    result = json.loads((out / "report.json").read_text())
    scheme = result["scheme"] or {}
    kept = ("float_accuracy", "soft_accuracy", "hard_accuracy", "file_bytes", "seconds")
    if suite.figure == "loss":
        kept += ("float_loss", "soft_loss", "hard_loss")
    row = {"op": "recipe", "suite": suite_name, "experiment": name, "method": result["method"], "seed": seed}
    row |= {key: result.get(key) for key in kept}
    row |= {key: scheme.get(key) for key in ("stored_bits", "paper_bits", "budget", "budget_met")}
    print(f"{name}, seed {seed}: {_figure(suite, row):.{_digits(suite)}f}, {row['seconds']:.0f} s")
    return row | {"recipe": suite.recipe, "overrides": [*suite.common, *experiment.overrides]}


def _figure(suite: Suite, row: dict[str, Any], model: str = "hard") -> float:
    """Accuracy in percent, or loss in nats."""
    return row[f"{model}_{suite.figure}"] * (100 if suite.figure == "accuracy" else 1)


def _digits(suite: Suite) -> int:
    return 2 if suite.figure == "accuracy" else 4


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def write(row: dict[str, Any]) -> None:
    """Put the line in the place of one of the same experiment and seed, unless that tells of the same run."""

    def same(old: dict[str, Any], keys: tuple[str, ...]) -> bool:
        return all(old[key] == row[key] for key in keys)

    rows, identity = read(), ("suite", "experiment", "seed")
    if not any(same(old, (*identity, "seconds", "hard_accuracy")) for old in rows):
        rows = [old for old in rows if not same(old, identity)] + [row]
        RESULTS.write_text("".join(json.dumps(line) + "\n" for line in rows))


def table(suite_name: str) -> str:
    """The results of a suite as a page."""
    suite = SUITES[suite_name]
    rows = [row for row in read() if row["suite"] == suite_name]
    digits = _digits(suite)
    measured = "Accuracy" if suite.figure == "accuracy" else "Loss"
    unit = "in percent" if suite.figure == "accuracy" else "in nats a character"
    lines = [
        f"# {suite.title}",
        "",
        f"Recipe `{suite.recipe}` with {', '.join(f'`{override}`' for override in suite.common)}; every line is "
        "`python bench/recipes.py " + suite_name + "`.",
        f"{measured} is that of the exact integers on the whole test set, {unit}: mean and each seed. Bits are as "
        "stored, averaged over the weights; bytes are of the whole file.",
        "",
        f"| method | stored bits | file bytes | {suite.figure} | seeds | soft - exact | budget met | minutes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, experiment in suite.experiments.items():
        chosen = sorted((row for row in rows if row["experiment"] == name), key=lambda row: row["seed"])
        if not chosen:
            lines.append(f"| {experiment.about} | | | not run | | | | |")
            continue
        figures = [_figure(suite, row) for row in chosen]
        soft = [_figure(suite, row, "soft") - _figure(suite, row) for row in chosen if row["soft_accuracy"]]
        bits = [row["stored_bits"] for row in chosen if row["stored_bits"] is not None]
        met = {None: "", True: "yes", False: "no"}
        cells = (
            experiment.about,
            f"{statistics.mean(bits):.2f}" if bits else "32",
            f"{statistics.mean(row['file_bytes'] for row in chosen):,.0f}",
            f"{statistics.mean(figures):.{digits}f}",
            " ".join(f"{figure:.{digits}f}" for figure in figures),
            f"{max(soft, key=abs):+.{digits}f}" if soft else "",
            ", ".join(sorted({met[row["budget_met"]] for row in chosen})),
            f"{statistics.mean(row['seconds'] for row in chosen) / 60:.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    machines = sorted({f"{row['machine']['cpu']}, {row['machine']['threads']} threads a run" for row in rows})
    commits = sorted({str(row["commit"]) for row in rows})
    lines += ["", f"Machine: {'; '.join(machines)}. Commits: {', '.join(commits)}.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", help="experiments; default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of each experiment")
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, each with its share of the cores")
    parser.add_argument("--table", action="store_true", help="only write the page from the results")
    parser.add_argument("arguments", nargs="*", help="further options of csq train, after --")
    options = parser.parse_intermixed_args()
    if not options.table:
        suite = SUITES[options.suite]
        threads = max(1, (os.cpu_count() or 1) // options.workers)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        context = {key: value for key, value in circumstances("cpu").items() if key in ("commit", "machine")}
        context["machine"] |= {"threads": threads}
        folder = options.out.resolve() / options.suite
        names = options.only or list(suite.experiments)
        # By what must come first: all float models, then what starts from them, then what starts from a search.
        for level in (None, "float", "csq-3"):
            jobs = [
                (name, seed)
                for name in names
                if suite.experiments[name].after == level
                for seed in options.seeds or suite.experiments[name].seeds
            ]
            with ThreadPoolExecutor(options.workers) as pool:
                done = pool.map(lambda job: run(options.suite, *job, folder, options.arguments), jobs)
                for row in done:
                    if row is not None:
                        write(row | context)
    DOCUMENTS.mkdir(parents=True, exist_ok=True)
    (DOCUMENTS / f"{options.suite}.md").write_text(table(options.suite))


if __name__ == "__main__":
    main()
