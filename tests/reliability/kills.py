"""SIGKILL and resume: ``python tests/reliability/kills.py --kills 188 --processes 12 [--seed N]``.

Runs of ``csq train`` and of ``csq pack`` are killed again and again, half of the times at a random moment, half within
milliseconds of a file being opened, brought to the disk or renamed. After each kill every file under its own name must
be whole, and progress never lost; in the end a run must have left the very bits of one that nobody disturbed, and no
file besides. ``--kills`` are of forked children, which start at once; ``--processes`` of commands of their own.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import children
import record
import safetensors.torch
import torch

import csq_kernels as csq
from csq_kernels.train import checkpoint, loop, recipe, running

SMALL = ["epochs.float=1", "epochs.search=2", "epochs.finetune=2", "batch_size=128", "log_every=4"]
SMALL += ["checkpoint.steps=2"]
# What has state of its own to lose: momenta, random streams, learnt steps, a teacher, counted operations.
VARIANTS = {
    "single pass": [],
    "narrow": ["optimizer.step=narrow", "data.crop=1"],
    "separate": ["optimizer.step=separate", "csq_optimizer={name: adamw, lr: 0.002}"],
    "lsq": ["method=lsq", "data.crop=1"],
    "taught": ["distillation={weight: 0.5}", "budget=0.3 MBOPs"],
}
PHASES = ("float", "csq", "lsq", "done")
# Seconds that a child lives on at most after it was seen at a file.
LATENCY = 0.004


def overrides(variant: str) -> list[str]:
    return [*SMALL, *VARIANTS[variant]]


def train(variant: str, folder: Path) -> None:
    """As a user would: resume if there is something to resume."""
    loop.train(recipe.load("digits_mlp", overrides(variant)), folder, resume=checkpoint.exists(folder))


def progress(folder: Path) -> tuple[int, int]:
    """Phase and step of the newest checkpoint."""
    if not checkpoint.exists(folder):
        return -1, 0
    state = checkpoint.load(folder)
    return PHASES.index(state["phase"]), state["step"]


def check_whole(folder: Path) -> None:
    """Raise unless every file is whole that does not have a temporary name."""
    for path in folder.iterdir():
        if path.suffix in (".json", ".jsonl"):
            # The last line of the metrics may be cut: a resumed run drops it.
            text = path.read_text()
            for line in [text] if path.suffix == ".json" else text.splitlines()[:-1]:
                json.loads(line)
        elif path.name == running.PACKED:
            csq.packed.inspect(path)
        elif path.suffix == ".safetensors":
            safetensors.torch.load_file(path)
        elif path.name in (checkpoint.NAME, checkpoint.PREVIOUS):
            checkpoint.read(path)
        elif path.suffix == ".pt":
            torch.load(path, weights_only=True)


def contents(folder: Path) -> dict[str, Any]:
    """All that a run leaves, without the seconds it took, its page, and the environment that it was last started in."""
    found: dict[str, Any] = {}
    for path in folder.iterdir():
        if path.name in (checkpoint.NAME, checkpoint.PREVIOUS):
            found[path.name] = {key: value for key, value in checkpoint.read(path).items() if key != "seconds"}
        elif path.suffix == ".pt":
            found[path.name] = torch.load(path, weights_only=True)
        elif path.suffix in (".json", ".jsonl") and path.stem != "environment":
            lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
            found[path.name] = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
        elif path.suffix == ".txt":
            found[path.name] = path.read_text()
        elif path.suffix not in (".html", ".png", ".csv", ".json"):
            found[path.name] = path.read_bytes()
    return found


def difference(expected: Any, actual: Any, where: str = "") -> str | None:
    """The first place where two trees of containers, tensors and values are not equal bit for bit."""
    if type(expected) is not type(actual):
        return f"{where}: {type(expected).__name__} and {type(actual).__name__}"
    if isinstance(expected, dict):
        if expected.keys() != actual.keys():
            return f"{where}: {sorted(map(str, expected.keys() ^ actual.keys()))} in one of them"
        pairs = [(f"{where}/{key}", expected[key], actual[key]) for key in expected]
    elif isinstance(expected, (list, tuple)):
        if len(expected) != len(actual):
            return f"{where}: {len(expected)} and {len(actual)} items"
        pairs = [(f"{where}/{i}", *both) for i, both in enumerate(zip(expected, actual, strict=True))]
    else:
        tensor = isinstance(expected, torch.Tensor)
        same = torch.equal(expected, actual) if tensor else expected == actual
        return None if same else where
    return next((found for name, one, other in pairs if (found := difference(one, other, name))), None)


class Killer:
    """Starts children and kills them; counts what it did and keeps what went wrong."""

    def __init__(self, folder: Path, seed: int):
        self.folder = folder
        self.chance = random.Random(seed)
        self.kills = 0
        self.failures: list[str] = []

    def start(self, function: Callable[[], object], watched: Path) -> tuple[int, int]:
        """Process id, and a file descriptor with a byte for each time the child was at a file in ``watched``."""
        reading, writing = os.pipe()

        def announced() -> None:
            children.announce(watched, writing)
            function()

        child = children.fork(announced, self.folder / "log")
        os.close(writing)
        return child, reading

    def undisturbed(self, function: Callable[[], object], watched: Path) -> tuple[float, int]:
        """Seconds that ``function`` takes, and how often it is at a file."""
        started = time.monotonic()
        child, reading = self.start(function, watched)
        with open(reading, "rb") as announced:
            times = len(announced.read())
        code = children.wait(child)
        if code:
            raise RuntimeError(f"expected an undisturbed child to end with 0, got {code}: {self.log()}")
        return time.monotonic() - started, times

    def strike(self, function: Callable[[], object], watched: Path, usual: tuple[float, int]) -> bool:
        """Start a child and kill it at some moment of those that it usually has; whether it was done before."""
        child, reading = self.start(function, watched)
        if self.chance.random() < 0.5:
            time.sleep(self.chance.uniform(0, usual[0]))
        else:
            left = self.chance.randint(1, usual[1])
            while left and os.read(reading, 1):
                left -= 1
            time.sleep(self.chance.uniform(0, LATENCY))
        code = children.kill(child)
        os.close(reading)
        if code not in (0, -signal.SIGKILL):
            self.failures.append(f"ended with {code}: {self.log()}")
        self.kills += code == -signal.SIGKILL
        return code == 0

    def log(self) -> str:
        return (self.folder / "log").read_text()[-2000:]


def kill_training(killer: Killer, variant: str, kills: int) -> None:
    """Run ``variant`` undisturbed, then again and again with kills."""
    whole, broken = killer.folder / f"{variant} whole", killer.folder / f"{variant} broken"
    usual = killer.undisturbed(lambda: train(variant, whole), whole)
    expected = contents(whole)
    wanted, failures = killer.kills + kills, len(killer.failures)
    while killer.kills < wanted:
        broken.mkdir()
        before, done = progress(broken), False
        while not done and len(killer.failures) == failures:
            if killer.kills < wanted:
                done = killer.strike(lambda: train(variant, broken), broken, usual)
            else:
                killer.undisturbed(lambda: train(variant, broken), broken)
                done = True
            check_whole(broken)
            after = progress(broken)
            if after < before:
                killer.failures.append(f"{variant}: {before} was reached, then there was {after}")
            before = after
        found = difference(expected, contents(broken))
        if len(killer.failures) > failures:
            return
        if found:
            killer.failures.append(f"{variant}: differs from the undisturbed run in {found}")
            return
        shutil.rmtree(broken)


def kill_packing(killer: Killer, kills: int) -> None:
    """Write packed files over others, with kills: what stands there is the old network or the new one."""
    one, other = (killer.folder / f"{variant} whole" for variant in ("single pass", "narrow"))
    file = killer.folder / "packed" / "network"
    file.parent.mkdir()
    valid = [(run / running.PACKED).read_bytes() for run in (one, other)]
    usual = killer.undisturbed(lambda: children.csq("pack", one, "--out", file), file.parent)
    wanted, number = killer.kills + kills, 0
    while killer.kills < wanted:
        number += 1
        run = (one, other)[number % 2]
        done = killer.strike(lambda: children.csq("pack", run, "--out", file), file.parent, usual)  # noqa: B023
        stands = file.read_bytes()
        if stands not in valid or (done and stands != valid[number % 2]):
            killer.failures.append(f"packing: after kill {killer.kills} neither the old file nor the new one stands")
            return


def kill_processes(killer: Killer, kills: int) -> None:
    """Kill whole ``csq train`` processes, and resume them."""
    command = [sys.executable, "-m", "csq_kernels.cli", "train", "digits_mlp", *overrides("single pass")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    broken, left = killer.folder / "of processes", kills
    metrics = broken / running.METRICS
    while not (broken / "report.html").exists():
        resume = ["--resume"] if checkpoint.exists(broken) else []
        log = open(killer.folder / "log", "w")  # noqa: SIM115
        process = subprocess.Popen(
            [*command, "--out", str(broken), *resume], env=environment, stdout=log, stderr=log, cwd=killer.folder
        )
        log.close()
        if left:
            # From its first sign of life on, not while it imports; the last kills fall into the writing of the page.
            lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
            target = min(lines + killer.chance.randint(0, 3), 12)
            while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) >= target):
                time.sleep(0.002)
            time.sleep(killer.chance.uniform(0, 0.2))
            process.kill()
        code = process.wait()
        if code not in (0, -signal.SIGKILL):
            killer.failures.append(f"csq train ended with {code}: {killer.log()}")
            return
        left -= code == -signal.SIGKILL
        killer.kills += code == -signal.SIGKILL
        check_whole(broken)
    found = difference(contents(killer.folder / "single pass whole"), contents(broken))
    if found:
        killer.failures.append(f"of processes: differs from the undisturbed run in {found}")


def run(kills: int, processes: int, seed: int, variants: Sequence[str] = tuple(VARIANTS)) -> tuple[int, list[str]]:
    """Kill so many forked children and processes; how many were killed, and what went wrong."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        killer = Killer(Path(name), seed)
        # Imports everything, so that children need not.
        train("single pass", killer.folder / "warm")
        for number, variant in enumerate(variants):
            kill_training(killer, variant, (kills * 4 // 5 + number) // len(variants))
            print(f"{variant}: {killer.kills} kills, {len(killer.failures)} failures", flush=True)
        kill_packing(killer, kills - killer.kills)
        print(f"packing: {killer.kills} kills, {len(killer.failures)} failures", flush=True)
        if processes:
            kill_processes(killer, processes)
        return killer.kills, killer.failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=188)
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kills, failures = run(options.kills, options.processes, options.seed)
    print("\n".join(failures))
    tried = f"{kills} kills in training, in packing and of whole processes, resumed to the bits of the undisturbed run"
    print(tried)
    record.record("kills", tried, len(failures))
    return len(failures)


if __name__ == "__main__":
    sys.exit(main())
