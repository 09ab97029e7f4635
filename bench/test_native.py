"""pytest-benchmark entries of the CPU kernels, one for each call whose instructions ``instructions.py`` counts."""

import itertools

import native_calls
import pytest

from csq_kernels import _native

if _native.module is None:
    pytest.skip(_native.reason, allow_module_level=True)
CALLS = dict(itertools.chain(native_calls.training(_native.module), native_calls.packed(_native.module)))


@pytest.mark.parametrize("name", CALLS)
def test_native(benchmark, name: str) -> None:
    benchmark.group = name.split()[0]
    benchmark.pedantic(CALLS[name], rounds=20, warmup_rounds=2)
