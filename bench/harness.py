"""Times, bandwidth and memory, measured so that their ratios hold: in one process, in turn, a copy beside each call."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import csq_kernels

COPY_BYTES = 256 << 20  # larger than any cache, so a copy also evicts the operands of the call that follows
AWAKE_SECONDS = 0.03  # after so long the threads of a pool are awake and spread over the cores
ROOT = Path(__file__).parents[1]
T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Entry:
    """One thing to time: ``prepare`` runs before each call, outside the clock."""

    run: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class Spread:
    """Seconds: the median of the rounds and the quantiles around it."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> "Spread":
        if len(seconds) < 2:
            return cls(*seconds * 3)
        quantiles = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(statistics.median(seconds), quantiles[1], quantiles[7])


def seconds(run: Callable[[], object], device: str) -> float:
    """Time one call; on a GPU between two events, so that the clock stops when the work is done."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def steady_seconds(run: Callable[[], object]) -> float:
    """Time a call on the processor after calls that take ``AWAKE_SECONDS`` together; a longer call is timed at once."""
    elapsed = 0.0
    while True:
        latest = seconds(run, "cpu")
        elapsed += latest
        if elapsed > AWAKE_SECONDS:
            return latest


def interleave(entries: dict[str, Entry], rounds: int, device: str) -> tuple[dict[str, Spread], float]:
    """Time all entries in turn, ``rounds`` times, each after a call of its own that is not timed and a timed copy.

    The call before brings an entry's memory back: pages that the system took away while others ran are not its cost.

    Returns:
        The spread of each entry, and the copy bandwidth (bytes read plus bytes written per second).
    """
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times: dict[str, list[float]] = {name: [] for name in entries}
    copies = []
    for _ in range(rounds):
        for name, entry in entries.items():
            entry.prepare()
            entry.run()
            entry.prepare()
            copies.append(seconds(lambda: target.copy_(source), device))
            times[name].append(seconds(entry.run, device))
            entry.prepare()
    return {name: Spread.of(t) for name, t in times.items()}, 2 * COPY_BYTES / statistics.median(copies)


@dataclass(frozen=True)
class Memory:
    """Bytes that a call leaves held beyond what was there before it, its result included, and the most at a time."""

    held: int
    peak: int


def memory(run: Callable[[], T], device: str) -> tuple[T, Memory]:
    """Run and say what memory it took.

    On the processor this is the running sum of PyTorch's own allocations; the native module allocates nothing.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        return result, Memory(torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return result, Memory(held, peak)


def peak_bytes(entry: Entry, device: str) -> int:
    """Most bytes that one call holds at a time beyond what was there before it, outputs included."""
    entry.prepare()
    return memory(entry.run, device)[1].peak


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the working tree, with ``-dirty`` if it has changes; in a copy without one, ``CSQ_COMMIT``."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or os.environ.get("CSQ_COMMIT")


def _flags() -> list[str]:
    """The command line without the place of the results, which is the reader's own."""
    flags = sys.argv[1:]
    if "--out" in flags:
        at = flags.index("--out")
        del flags[at : at + 2]
    return flags


def circumstances(device: str) -> dict[str, Any]:
    """What a measurement must say about the machine and the software to be quoted."""
    info = csq_kernels.info()
    return {
        "machine": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "isa": info["isa"],
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        },
        "versions": {
            "csq_kernels": csq_kernels.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "compiler": info["compiler"],
            "cuda": torch.version.cuda,
        },
        "backends": {choice["op"]: choice["backend"] for choice in info["ops"] if choice["device"] == device},
        "commit": commit(),
        "flags": _flags(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def announce(context: dict[str, Any]) -> None:
    """Print ``circumstances`` above the table."""
    for key, value in context.items():
        print(f"{key}: {value}")


def shape_list(text: str) -> list[tuple[int, ...]]:
    """``"1024x1024,64x3x3"`` as tuples, for an option."""
    return [tuple(map(int, shape.split("x"))) for shape in text.split(",")]


def append_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append one JSON object a line; old lines are never touched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
