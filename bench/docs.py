"""Writes the numbers in README.md and docs/benchmarks.md from the lines in ``results``: ``python bench/docs.py``.

A number or table stands between ``<!-- bench:NAME ARGUMENTS -->`` and ``<!-- end -->``; NAME is one of ``BLOCKS``. Of a
measurement that was repeated the latest run counts, be it better or worse. ``--check`` only says which file is not what
the results make of it, with exit code 1.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
FILES = (ROOT / "README.md", ROOT / "docs" / "benchmarks.md")
MARKED = re.compile(r"(<!-- bench:([^>]*?) -->).*?(<!-- end -->)", re.DOTALL)
PRECISIONS = ("int8", "high", "exact")
# Our column, then the others', each with the title it has in a table.
RECONSTRUCT = {"reference": "reference", "reference-compiled": "reference, compiled", "eager": "per plane"}
RECONSTRUCT |= {"compiled": "per plane, compiled"}
STEP = RECONSTRUCT | {"separate": "separate"}
# Of what recipes.py trains.
NAMES = {"float": "float", "csq": "CSQ", "lsq": "LSQ, one precision", "round": "rounded"}

Row = dict[str, Any]


def lines(op: str) -> list[Row]:
    return [json.loads(line) for line in (RESULTS / f"{op}.jsonl").read_text().splitlines()]


def latest(rows: Iterable[Row], *names: str) -> list[Row]:
    """The last of the rows in which these fields are the same, in the order in which they first came."""
    return list({json.dumps([row[name] for name in names]): row for row in rows}.values())


def shape_of(row: Row) -> str:
    return "x".join(map(str, row["shape"]))


def machine_of(row: Row) -> str:
    """Where and of what a row was measured."""
    machine = row["machine"]
    return f"{machine['gpu'] or machine['cpu']}, {machine['isa']}, commit {row['commit']}"


def milliseconds(row: Row) -> str:
    value = 1e3 * row["seconds"]["median"]
    return f"{value:.0f} ms" if value >= 100 else f"{value:#.3g} ms"


def times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.{0 if ratio >= 10 else 1 if ratio >= 1 else 2}f}x"


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def table(head: list[str], rows: list[list[str]]) -> str:
    """As Markdown, with line ends around it."""
    cells = [head, ["---"] * len(head), *rows]
    return "\n" + "".join(f"| {' | '.join(row)} |\n" for row in cells)


def ratios(rows: list[Row], label: Callable[[Row], str], opponents: dict[str, str]) -> str:
    """A line a row: time, share of the copy floor, and how many times longer each opponent took in the same run."""
    head = ["", "time", "share of the floor", *opponents.values(), "measured on"]
    return table(
        head,
        [
            [
                label(row),
                milliseconds(row),
                f"{row['share_of_floor']:.0%}",
                *(times(row["speedup_over"].get(name)) for name in opponents),
                f"{plural(row['machine']['threads'], 'thread')}, {machine_of(row)}",
            ]
            for row in rows
        ],
    )


def reconstruct(*isas: str) -> str:
    """Our reconstruction against PyTorch's on processors with these instruction sets, or any."""
    rows = [{**row, "isa": row["machine"]["isa"]} for row in lines("reconstruct") if row["device"] == "cpu"]
    rows = [row for row in rows if not isas or row["isa"] in isas]
    ours = latest((row for row in rows if row["provider"] == "csq"), "shape", "mode", "isa")
    ours.sort(key=lambda row: (row["shape"], row["mode"], row["isa"]))
    return ratios(ours, lambda row: f"{shape_of(row)} {row['mode']}", RECONSTRUCT)


def step(*rules: str) -> str:
    """A single-pass step against all others; of an earlier run where the last one has no such line."""
    rows = [row for row in lines("step") if row["device"] == "cpu" and row["rule"] in rules]
    ours = latest((row for row in rows if row["provider"] == "single-pass"), "shape", "rule", "gates")
    ours.sort(key=lambda row: (row["rule"] != "sgd", row["shape"], row["gates"]))
    return ratios(ours, lambda row: f"{shape_of(row)} {row['rule']}, gates {row['gates']}", STEP)


def step_bytes(rule: str, gates: str, provider: str, kind: str = "state") -> str:
    """Bytes a weight, held after a step (state) or most within one (peak): the most over all shapes."""
    rows = [row for row in lines("step") if (row["rule"], row["gates"], row["provider"]) == (rule, gates, provider)]
    rows = [row for row in latest(rows, "shape") if row["n_bits"] == 8]
    return f"{max(row[f'{kind}_bytes_per_weight'] for row in rows):.0f}"


def memory() -> str:
    """Bytes a weight of every provider."""
    providers = ("single-pass", "single-pass-narrow", "separate", "compiled", "eager")
    rows = [
        [f"{rule}, {title}", *(step_bytes(rule, "moving", provider, kind) for provider in providers)]
        for rule in ("sgd", "adamw")
        for kind, title in (("state", "held after a step"), ("peak", "at most, gates moving"))
    ]
    return table(["bytes a weight", *providers], rows)


def packed(shape: str, batch: str, *precisions: str) -> str:
    """Packed linear layers by stored bits and precision, for each number of threads."""
    rows = [row for row in lines("bitserial") if shape_of(row) == shape and row["batch"] == int(batch)]
    rows = latest(rows, "provider", "stored_bits", "threads")
    found = {(row["provider"], row["stored_bits"], row["threads"]): row for row in rows}
    threads = sorted({row["threads"] for row in rows})
    columns = [(f"csq {precision}", count) for precision in precisions or PRECISIONS for count in threads]
    head = ["stored bits", *(f"`{name.split()[1]}`, {plural(count, 'thread')}" for name, count in columns)]
    widths = sorted({row["stored_bits"] for row in rows if row["family"] == "csq"})
    body = []
    for bits in widths:
        cells = [found[name, bits, count] for name, count in columns]
        body.append([str(bits), *map(against_best, cells)])
    fp32 = [f"{milliseconds(found['torch fp32', 32, count])} on {plural(count, 'thread')}" for count in threads]
    ours = [row for row in rows if row["family"] == "csq"]
    measured = "; ".join(dict.fromkeys(map(machine_of, ours)))
    return table(head, body) + f"\n`F.linear` in float32 takes {', '.join(fp32)}. Measured on: {measured}.\n"


def against_best(row: Row) -> str:
    """The time, and how many times longer the best opponent took: for ``exact`` that is ``F.linear``."""
    exact = row["activation"] == "exact"
    name, ratio = ("fp32", "fp32") if exact else (row["best_peer"], "best_peer")
    return f"{milliseconds(row)}, {times(row['speedup_over'][ratio])} {name}"


def language_model() -> str:
    """What the latest run of language_model.py took."""
    row = lines("language_model")[-1]
    resident = row["peak_resident_bytes"]
    state = "narrow state" if row["narrow"] else "float32 state"
    most, prepared = (resident[when] / 2**30 for when in ("last step", "prepared"))
    return (
        f"{row['weights'] / 1e6:.0f} million weights, {row['tokens']} tokens, {row['rule']}, {state}: at most "
        f"{most:.1f} GiB resident, {prepared:.1f} of them while `prepare_` encoded in float32 ({machine_of(row)})"
    )


def networks(mode: str) -> str:
    """Whole networks, training steps or inference: a line a network, a column a provider."""
    if not (RESULTS / "model.jsonl").exists():
        return "not measured yet"
    rows = [row for row in lines("model") if row["mode"] == mode and row["device"] == "cpu"]
    found: dict[tuple[str, int, int], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["network"], row["batch"], row["threads"]), {})[row["provider"]] = row
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    body = []
    for (network, batch, threads), line in found.items():
        times = [milliseconds(line[name]) if name in line else "-" for name in providers]
        measured = "; ".join(dict.fromkeys(map(machine_of, line.values())))
        body.append([f"{network}, batch {batch}", *times, f"{plural(threads, 'thread')}, {measured}"])
    return table(["", *providers, "measured on"], body)


def gpu_packed(gpu: str) -> str:
    """Packed linear layers on a GPU by bits: microseconds for each batch, beside a read of the planes and cuBLAS."""
    rows = [row for row in lines("bitserial_linear") if gpu in row["machine"]["gpu"] and row["provider"] == "cuda"]
    rows = latest(rows, "bits", "batch")
    batches = sorted({row["batch"] for row in rows})
    found = {(row["bits"], row["batch"]): row for row in rows}
    body = []
    for bits in sorted({row["bits"] for row in rows}):
        cells = [found[bits, batch] for batch in batches]
        floor = 1e6 * cells[0]["weight_bytes"] / cells[0]["read_bytes_per_second"]
        body.append([str(bits), *(f"{1e6 * row['seconds']['median']:.1f}" for row in cells), f"{floor:.1f}"])
    cublas = (f"{1e6 * found[1, batch]['cublas_fp16_seconds']['median']:.1f}" for batch in batches)
    head = ["bits", *(f"batch {batch}, us" for batch in batches), "read of the planes, us"]
    measured = "; ".join(dict.fromkeys(f"{row['machine']['gpu']}, commit {row['commit']}" for row in rows))
    return table(head, [*body, ["cuBLAS, float16", *cublas, ""]]) + f"\nMeasured on: {measured}.\n"


def gpu_kernels(gpu: str) -> str:
    """What the profiler counted of each kernel, in the order in which they were launched."""
    rows = [row for row in lines("counters") if gpu in row["machine"]["gpu"]]
    rows = latest((row for row in rows if row["commit"] == rows[-1]["commit"]), "kernel", "blocks")
    shares = ("share_of_dram_peak", "share_of_sm_peak", "share_of_issue_slots", "occupancy")
    body = [
        [
            f"`{row['kernel']}`",
            f"{1e6 * row['seconds']:.1f}",
            *(f"{row[share]:.0%}" for share in shares),
            f"{row['registers']:.0f}",
        ]
        for row in rows
    ]
    head = ["kernel", "us", "of DRAM's peak", "of the SMs' peak", "of issue slots", "occupancy", "registers"]
    return table(head, body) + f"\nMeasured on: {rows[0]['machine']['gpu']}, commit {rows[0]['commit']}.\n"


def accuracy(suite: str, *experiments: str) -> str:
    """Accuracy of the exact integers, mean over the seeds, and the size of the file, for experiments of recipes.py."""
    body = []
    for experiment in experiments:
        rows = [row for row in lines("recipes") if (row["suite"], row["experiment"]) == (suite, experiment)]
        bits = [row["stored_bits"] or 32 for row in rows]
        size = statistics.mean(row["file_bytes"] for row in rows)
        found = [100 * row["hard_accuracy"] for row in sorted(rows, key=lambda row: row["seed"])]
        seeds = " ".join(f"{value:.2f}" for value in found)
        mean = f"{statistics.mean(found):.2f} % ({seeds})"
        body.append([NAMES[rows[0]["method"]], f"{statistics.mean(bits):.2f}", f"{size:,.0f} bytes", mean])
    return table(["", "bits a weight", "file", "accuracy, mean and each seed"], body)


BLOCKS: dict[str, Callable[..., str]] = {
    "reconstruct": reconstruct,
    "step": step,
    "bytes": step_bytes,
    "memory": memory,
    "packed": packed,
    "language_model": language_model,
    "networks": networks,
    "gpu_packed": gpu_packed,
    "gpu_kernels": gpu_kernels,
    "accuracy": accuracy,
}


def rendered(text: str) -> str:
    """The text with every block made anew."""

    def block(found: re.Match[str]) -> str:
        begin, call, end = found.groups()
        name, *arguments = call.split()
        return begin + BLOCKS[name](*arguments) + end

    return MARKED.sub(block, text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    stale = [path for path in FILES if rendered(path.read_text()) != path.read_text()]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'is not what the results say' if options.check else 'written'}")
        if not options.check:
            path.write_text(rendered(path.read_text()))
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
