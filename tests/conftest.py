"""Fixtures: fixed seeds, restored global state, NaN-filled allocations. Importing it queries no device."""

import random
import sys
from pathlib import Path

import pytest
import torch

import csq_kernels
from csq_kernels import _native

GUARD = 64  # elements; keeps the alignment that the allocator gave
SENTINEL = 77.0


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and torch sees none")


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory):
    """Run where Python does not find the source folder: processes that tests start use the package that is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("elsewhere"))
        patch.setenv("PYTHONPATH", str(Path(csq_kernels.__file__).parents[1]))
        yield


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def restore_isa_and_threads():
    threads = torch.get_num_threads()
    isa = _native.module.isa() if _native.module is not None else None
    yield
    torch.set_num_threads(threads)
    if _native.module is not None:
        _native.module.set_isa(isa)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch):
    """Fill what ``csq_kernels`` allocates uninitialised with NaN or 0xAA, between two guards that must stay intact."""
    guarded = []

    def poison(owner: object, name: str) -> None:
        allocate = getattr(owner, name)

        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if not sys._getframe(1).f_globals.get("__name__", "").startswith("csq_kernels"):
                return tensor
            buffer = torch.full((tensor.numel() + 2 * GUARD,), SENTINEL, dtype=tensor.dtype, device=tensor.device)
            guarded.append(buffer)
            poison = torch.nan if tensor.is_floating_point() else 0xAA
            return buffer.as_strided(tensor.shape, tensor.stride(), GUARD).fill_(poison)

        monkeypatch.setattr(owner, name, allocate_poisoned)

    for name in ("empty", "empty_like"):
        poison(torch, name)
    poison(torch.Tensor, "new_empty")
    yield
    assert all((buffer[:GUARD] == SENTINEL).all() and (buffer[-GUARD:] == SENTINEL).all() for buffer in guarded)
