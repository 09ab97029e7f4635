"""pytest-benchmark entries of a training step, ``pytest bench/test_step.py``. ``run.py`` compares."""

import pytest
from suites.step import GATES, PROVIDERS, Problem

SHAPES = [(64, 64), (1024, 1024)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_step(benchmark, provider: str, gates: str, shape: tuple[int, ...]) -> None:
    entry = Problem(shape, n_bits=8, device="cpu", rule="sgd", gates=gates).provider(provider)
    benchmark.group = f"step, gates {gates}, {'x'.join(map(str, shape))}"
    benchmark.pedantic(entry.step, setup=entry.clear, rounds=10, warmup_rounds=2)
