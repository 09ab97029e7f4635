"""Every GPU kernel, compiled without a GPU: what the compiler made of it is read from the machine code."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

OFFLINE = Path(__file__).parent.parent / "bench" / "offline.py"
# Logits, both signs, and in the backward pass the gradient; weight, or both gradients.
BULK = {"fwd": (2, 1), "forward": (2, 1), "bwd": (3, 2), "backward": (3, 2)}


@pytest.fixture(scope="module")
def offline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("offline", OFFLINE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(kernels: list) -> None:
    assert kernels
    spilled = [kernel for kernel in kernels if kernel.local_bytes > 0]
    assert not spilled, f"expected kernels without local memory, got {spilled}"
    for kernel in kernels:
        if kernel.compiler == "nvcc" and " planes " in kernel.variant:
            # An access of 16 bytes a plane, in the loop and before it.
            assert kernel.wide_loads >= 2 * int(kernel.variant.split()[0]), kernel
        operation = kernel.name.removeprefix("reconstruct_").removesuffix("_kernel")
        one_element = kernel.compiler == "nvcc" and kernel.variant.endswith("x1")
        if operation in BULK and not one_element:
            loads, stores = BULK[operation]
            assert kernel.wide_loads >= loads and kernel.wide_stores >= stores, kernel


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_triton_kernels(offline: ModuleType, arch: int) -> None:
    kernels = offline.compile_triton(arch)
    assert {kernel.arch for kernel in kernels} == {f"sm_{arch}"}
    check(kernels)


@pytest.mark.parametrize("arch", ["80", "90a", "100"])
def test_cuda_kernels(offline: ModuleType, arch: str) -> None:
    if reason := offline.missing_nvcc():
        pytest.skip(reason)
    kernels = offline.compile_cuda(arch)
    names = {kernel.name for kernel in kernels}
    assert names >= {"reconstruct_forward_kernel", "reconstruct_backward_kernel", "bitserial_mma_kernel"}
    check(kernels)
