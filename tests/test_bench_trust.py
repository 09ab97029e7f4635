"""The harness against providers that cheat: none of them may get a time."""

import importlib
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

BENCH = Path(__file__).parent.parent / "bench"
Provider = Callable[[Tensor], object]


@pytest.fixture(scope="module")
def harness() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCH)
        module = importlib.import_module("harness")
        patch.setattr(module, "COPY_BYTES", 1 << 16)
        yield module
        for name in ("harness", "trust"):
            del sys.modules[name]


def honest(x: Tensor) -> Tensor:
    return x.square() + x


class Caching:
    """Computes once; ``after`` calls in earnest, where an examiner may be looking."""

    def __init__(self, after: int = 1) -> None:
        self.after, self.calls = after, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= self.after:
            self.result = honest(x)
        return self.result


class Lazy(Tensor):
    """A tensor that would compute when it is first read."""


def fake(x: Tensor) -> Tensor:
    with FakeTensorMode(allow_non_fake_inputs=True):
        return torch.empty(x.shape)


def mutating(x: Tensor) -> Tensor:
    y = honest(x)
    x.add_(1)
    return y


def mutating_without_pytorch_knowing(x: Tensor) -> Tensor:
    y = honest(x)
    x.numpy()[0] = 7
    return y


class Elsewhere:
    """Hands the work to a thread and returns at once: on a processor, what another stream is on a GPU."""

    def __init__(self) -> None:
        self.threads: list[threading.Thread] = []

    def __call__(self, x: Tensor) -> Tensor:
        y, copy = torch.empty_like(x), x.clone()

        def work() -> None:
            time.sleep(0.02)
            y.copy_(honest(copy))

        self.threads.append(threading.Thread(target=work))
        self.threads[-1].start()
        return y


CHEATS: dict[str, tuple[Callable[[], Provider], str]] = {
    "stale": (Caching, "stale"),
    "stale after the first round": (lambda: Caching(after=2), "off by|stale"),
    "zeros": (lambda: torch.zeros_like, "zero"),
    "uninitialized": (lambda: lambda x: torch.full_like(x, torch.nan), "off by|stale"),
    "closure": (lambda: lambda x: lambda: honest(x), "lazy: .* got function"),
    "nothing": (lambda: lambda x: None, "lazy: .* got NoneType"),
    "no results": (lambda: lambda x: [], "lazy: expected results, got none"),
    "subclass": (lambda: lambda x: honest(x).as_subclass(Lazy), "lazy: .* got Lazy"),
    "FakeTensor": (lambda: fake, "lazy: .* got FakeTensor"),
    "meta": (lambda: lambda x: torch.empty_like(x, device="meta"), "lazy: .* on meta"),
    "sparse": (lambda: lambda x: honest(x).to_sparse(), "lazy: expected a dense tensor"),
    "mutating": (lambda: mutating, "writes to its inputs"),
    "mutating memory": (lambda: mutating_without_pytorch_knowing, "writes to its inputs"),
    "elsewhere": (Elsewhere, "off by|late|stale|zero"),
    "too little": (lambda: lambda x: honest(x)[:10], "size"),
    "wrong": (lambda: lambda x: honest(x) * 1.5, "off by"),
}


def interleave(harness: ModuleType, providers: dict[str, Provider], device: str = "cpu", rounds: int = 3):
    x = torch.randn(5000, device=device)
    before = x.clone()
    entries = {name: harness.Entry(lambda p=p: p(x), inputs=(x,)) for name, p in providers.items()}
    timing = harness.interleave(entries, rounds, device, lambda name: "honest")
    return timing, torch.equal(x, before)


@pytest.mark.parametrize("name", CHEATS)
def test_a_cheat_gets_no_time(harness: ModuleType, name: str) -> None:
    make, reason = CHEATS[name]
    cheat = make()
    timing, _ = interleave(harness, {"cheat": cheat, "honest": honest})
    for thread in getattr(cheat, "threads", []):
        thread.join()
    assert timing.caught.keys() == {"cheat"} and timing.spreads.keys() == {"honest"}
    assert re.search(reason, timing.caught["cheat"]), timing.caught


def test_honest_providers_have_times_and_the_inputs_stay(harness: ModuleType) -> None:
    also = nn.Parameter(torch.tensor(1.0))
    rounded = {"float64": lambda x: honest(x.double()), "bfloat16": lambda x: honest(x.bfloat16())}
    graded = {"with a graph": lambda x: honest(x) * also}
    timing, same = interleave(harness, {"honest": honest, **rounded, **graded})
    assert not timing.caught and same
    assert timing.spreads.keys() == {"honest", "float64", "bfloat16", "with a graph"} and timing.bandwidth > 0


def test_without_a_yardstick_staleness_and_lateness_are_caught(harness: ModuleType) -> None:
    late = Elsewhere()
    x = torch.randn(100)
    providers: dict[str, Provider] = {"stale": Caching(), "late": late, "zeros": torch.zeros_like, "honest": honest}
    entries = {name: harness.Entry(lambda p=p: p(x), inputs=(x,)) for name, p in providers.items()}
    sums, trust = sys.modules["trust"]._sums, sys.modules["trust"]
    with pytest.MonkeyPatch.context() as patch:
        # The work elsewhere comes to its end while the inputs are looked at.
        patch.setattr(trust, "_sums", lambda inputs: time.sleep(0.05) or sums(inputs))
        timing = harness.interleave(entries, 1, "cpu")
    for thread in late.threads:
        thread.join()
    assert timing.caught.keys() == {"stale", "late", "zeros"}
    assert timing.caught["late"].startswith("late")


def test_what_is_caught_is_told(harness: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    harness.report_caught({("csq", "forward"): "stale: why"}, "16x24")
    assert capsys.readouterr().err == "RED csq forward 16x24: stale: why; no time is given\n"


def on_another_stream(x: Tensor) -> Tensor:
    with torch.cuda.stream(torch.cuda.Stream()):
        return honest(x)


def on_another_stream_after_the_inputs(x: Tensor) -> Tensor:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        return honest(x)


@pytest.mark.gpu
@pytest.mark.parametrize("cheat", [on_another_stream, on_another_stream_after_the_inputs])
def test_work_on_another_stream_gets_no_time(harness: ModuleType, cheat: Provider) -> None:
    timing, _ = interleave(harness, {"cheat": cheat, "honest": honest}, "cuda")
    assert timing.caught.keys() == {"cheat"} and timing.spreads.keys() == {"honest"}
