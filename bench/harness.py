"""Times, bandwidth and memory, measured so that their ratios hold: in one process, in turn, a copy beside each call."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from trust import Entry, Key, Observation, UntrustedError, compare, observe

import csq_kernels

COPY_BYTES = 256 << 20  # larger than any cache, so a copy also evicts the operands of the call that follows
# What a GPU is kept busy for while the host launches a call of which its time alone is wanted: about 5 ms.
HEAD_START_CYCLES = 10_000_000
AWAKE_SECONDS = 0.03  # after so long the threads of a pool are awake and spread over the cores
ROOT = Path(__file__).parents[1]
T = TypeVar("T")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler, which counts memory, would note every use on stderr
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def timed(run: Callable[[], T], device: str, ahead: bool = False) -> tuple[float, T]:
    """Time one call; on a GPU between two events, so that the clock stops when the work of its stream is done.

    Where the host is ``ahead``, as in a training loop, the GPU never waits for what it launches.
    """
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if ahead:
            torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        result = run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, result
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def seconds(run: Callable[[], object], device: str) -> float:
    """As ``timed``, without the result."""
    return timed(run, device)[0]


def steady_seconds(run: Callable[[], object]) -> float:
    """Time a call on the processor after calls that take ``AWAKE_SECONDS`` together; a longer call is timed at once."""
    elapsed = 0.0
    while True:
        latest = seconds(run, "cpu")
        elapsed += latest
        if elapsed > AWAKE_SECONDS:
            return latest


@dataclass(frozen=True)
class Timing:
    """The spread of each entry, what was caught and why, and bytes read plus bytes written per second by a copy."""

    spreads: dict[Any, Spread]
    caught: dict[Any, str]
    bandwidth: float


def interleave(
    entries: dict[Key, Entry],
    rounds: int,
    device: str,
    yardstick: Callable[[Key], Key] = lambda key: key,
    ahead: bool = False,
) -> Timing:
    """Time all entries in turn, ``rounds`` times, each after a call of its own that is not timed and a timed copy.

    The call before has other inputs and brings an entry's memory back: pages that the system took away while others ran
    are not its cost. An entry that ``trust`` catches, in any round, has no time. ``yardstick`` names the entry
    whose results an entry's must be near. ``ahead``: as in ``timed``; a copy's time is always that of the device.
    """
    source = torch.ones(COPY_BYTES // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    times: dict[Key, list[float]] = {name: [] for name in entries}
    caught: dict[Key, str] = {}
    copies = []
    for _ in range(rounds):
        observed: dict[Key, Observation] = {}
        for name, entry in entries.items():
            if name in caught:
                continue

            def call(name: Key = name, entry: Entry = entry) -> object:
                copies.append(timed(lambda: target.copy_(source), device, ahead=True)[0])
                taken, result = timed(entry.run, device, ahead)
                times[name].append(taken)
                return result

            try:
                observed[name] = observe(entry, device, call)
            except UntrustedError as error:
                caught[name] = str(error)
        caught |= compare(observed, yardstick)
    spreads = {name: Spread.of(taken) for name, taken in times.items() if name not in caught}
    return Timing(spreads, caught, 2 * COPY_BYTES / statistics.median(copies))


def report_caught(caught: dict[Any, str], where: str) -> None:
    """Say on stderr which providers have no time, and why."""
    for name, reason in caught.items():
        shown = " ".join(name) if isinstance(name, tuple) else name
        print(f"RED {shown} {where}: {reason}; no time is given", file=sys.stderr)


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
    """``CSQ_COMMIT``, for a copy of a tree; else the commit of this one, with ``-dirty`` if it has changes."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return os.environ.get("CSQ_COMMIT") or done.stdout.strip() or None


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


@dataclass(frozen=True)
class Case:
    """A part of a suite that is measured and printed as one: rows, and whether everything was right.

    ``cost`` is in proportion to its time, among the cases of its suite.
    """

    label: str
    cost: float
    measure: Callable[[], tuple[list[dict[str, Any]], bool]]


def without(name: str, reason: str) -> None:
    """Say that a provider is not measured, and why."""
    print(f"without {name}: {reason}", file=sys.stderr)


def present(providers: Iterable[str], device: str) -> list[str]:
    """The providers that can run here; those that need a compiler which is missing are named with that reason."""
    compiler = os.environ.get("CXX", "g++")
    lacking = device == "cpu" and shutil.which(compiler) is None
    kept = []
    for name in providers:
        if lacking and name.endswith("compiled"):
            without(name, f"torch.compile needs a C++ compiler, and there is no {compiler}")
        else:
            kept.append(name)
    return kept


def free_bytes(device: str) -> int:
    """Memory that a case may take: most of what is left."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else _free_on_the_processor()
    return int(0.8 * free)


def _free_on_the_processor() -> int:
    """What Linux would give without swapping; elsewhere free pages."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def fits(label: str, needed: int, device: str) -> bool:
    """Whether there is memory for a case; says so if there is not."""
    free = free_bytes(device)
    if needed > free:
        without(label, f"it needs about {needed / 1e9:.1f} GB of memory, of which {free / 1e9:.1f} are to spare")
    return needed <= free


def announce(context: dict[str, Any]) -> None:
    """Print ``circumstances`` above the table."""
    for key, value in context.items():
        print(f"{key}: {value}")


def shape_list(text: str) -> list[tuple[int, ...]]:
    """``"1024x1024,64x3x3"`` as tuples, for an option."""
    return [tuple(map(int, shape.split("x"))) for shape in text.split(",")]


def integers(text: str) -> list[int]:
    """``"1,8,64"`` as numbers, for an option."""
    return [int(part) for part in text.split(",")]


def names(text: str) -> list[str]:
    """``"csq,torch"`` as a list, for an option."""
    return text.split(",")


def append_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append one JSON object a line; old lines are never touched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
