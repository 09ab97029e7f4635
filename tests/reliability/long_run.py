"""Memory and files of a process that goes on and on: ``python tests/reliability/long_run.py --minutes 60``.

A cycle is a whole run of ``csq train``, with all its checkpoints, then its packed file read and run in each precision.
Resident memory is read after each cycle, once Python has collected what waits for its collector, and without the pages
of libraries, which the system drops and reads as it likes; its slope by least squares, the first sixth of the time left
out, must stay below ``SLOPE``, and the count of open files where it was.
"""

import argparse
import gc
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import record
import torch

import csq_kernels as csq
from csq_kernels._ops import PRECISIONS
from csq_kernels.train import data, loop, recipe, running, runs

# Bytes an hour.
SLOPE = 1 << 20
WARM_UP = 1 / 6
OVERRIDES = ["epochs.float=1", "epochs.search=3", "epochs.finetune=3", "checkpoint.steps=20", "data.crop=1"]
# One step of each kind: fused with 32-bit state, fused with narrow state, and torch.optim on the logits.
STEPS = ("single-pass", "narrow", "separate")


@dataclass
class Sample:
    """After a cycle: seconds since the start, resident bytes, open files."""

    seconds: float
    resident: int
    files: int


def resident_bytes() -> int:
    """Anonymous pages in memory, and those that were swapped out."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return sum(1024 * int(line[1]) for line in lines if line[0] in ("RssAnon:", "VmSwap:"))


def cycle(number: int, folder: Path) -> int:
    """Train, pack, load, run; the count of training steps."""
    chosen = recipe.load("digits_mlp", [*OVERRIDES, f"optimizer.step={STEPS[number % len(STEPS)]}"])
    loop.train(chosen, folder)
    digits = data.load("digits")
    network = runs.network(csq.packed.inspect(folder / running.PACKED).extra)
    csq.load_packed(network, folder / running.PACKED)
    for precision in PRECISIONS:
        csq.set_precision_(network, precision)
        runs.evaluate(network, digits)
    return sum((1, 3, 3)) * (digits.train_size // chosen.batch_size)


def slope(samples: list[Sample]) -> float:
    """Bytes an hour."""
    hours = np.array([sample.seconds for sample in samples]) / 3600
    return float(np.polyfit(hours, [sample.resident for sample in samples], 1)[0])


def run(minutes: float, show: bool = True) -> tuple[int, list[Sample]]:
    """Cycles for so long; the count of training steps, and the samples after the warm-up."""
    samples: list[Sample] = []
    steps, started = 0, time.monotonic()
    while time.monotonic() - started < 60 * minutes or len(samples) < 3:
        with tempfile.TemporaryDirectory() as folder:
            steps += cycle(len(samples), Path(folder))
        gc.collect()
        seconds = time.monotonic() - started
        samples.append(Sample(seconds, resident_bytes(), len(os.listdir("/proc/self/fd"))))
        if show:
            print(
                f"{seconds:6.0f} s, {steps:,} steps, {samples[-1].resident:,} bytes, {samples[-1].files} files",
                flush=True,
            )
    return steps, [sample for sample in samples if sample.seconds > WARM_UP * samples[-1].seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps, samples = run(options.minutes)
    growth, files = slope(samples), samples[-1].files - samples[0].files
    tried = (
        f"{options.minutes:g} minutes, {steps:,} training steps: resident memory {samples[-1].resident / 1e6:.0f} MB, "
        f"{growth / (1 << 20):+.2f} MB an hour, {files:+d} open files"
    )
    print(tried)
    record.record("long run", tried, failures=int(growth > SLOPE) + int(files > 0))


if __name__ == "__main__":
    sys.exit(main())
