"""pytest-benchmark entries of the reconstruction, ``pytest bench/test_reconstruct.py``. ``run.py`` compares."""

import pytest
from suites.reconstruct import MODES, PROVIDERS, Reconstruct

SHAPES = [(64, 64), (1024, 1024)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_reconstruct(benchmark, provider: str, mode: str, shape: tuple[int, ...]) -> None:
    problem = Reconstruct(shape, n_bits=8, device="cpu")
    entry = problem.entry(problem.providers()[provider], mode)
    benchmark.group = f"reconstruct {mode} {'x'.join(map(str, shape))}"
    benchmark.pedantic(entry.run, setup=entry.prepare, rounds=10, warmup_rounds=2)
