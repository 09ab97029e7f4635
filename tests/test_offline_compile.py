"""Every GPU kernel, compiled without a GPU: what is read from the machine code holds against the committed table."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton")

OFFLINE = Path(__file__).parent.parent / "bench" / "offline.py"
REWRITE = "to accept this, run: python bench/offline.py --write"


@pytest.fixture(scope="module")
def offline() -> ModuleType:
    spec = importlib.util.spec_from_file_location("offline", OFFLINE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["offline"] = module  # for dataclasses, and for the processes that compile
    spec.loader.exec_module(module)
    yield module
    del sys.modules["offline"]


def check(offline: ModuleType, kernels: list, architectures: set[str]) -> None:
    table = [kernel for kernel in offline.read_table() if kernel.compiler == kernels[0].compiler]
    found = offline.complaints(kernels, table)
    assert not found, "\n".join([*found, REWRITE])
    assert {kernel.arch for kernel in kernels} == architectures
    missing = {kernel.key() for kernel in table if kernel.arch in architectures} - {kernel.key() for kernel in kernels}
    assert not missing, f"expected the kernels of the table, got none of {sorted(missing)}; {REWRITE}"


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.exhaustive) for arch in (80, 100))])
def test_triton_kernels(offline: ModuleType, arch: int) -> None:
    check(offline, offline.compile_triton(arch), {f"sm_{arch}"})


def test_cuda_kernels(offline: ModuleType) -> None:
    if reason := offline.missing_cuda():
        pytest.skip(reason)
    built = {f"sm_{arch}" for arch in offline._native.module.cuda_architectures}
    check(offline, offline.read_cuda(), built)


def test_what_rose_is_named(offline: ModuleType) -> None:
    table = offline.read_table()
    wide = next(kernel for kernel in table if kernel.name == "reconstruct_forward_kernel" and "x4" in kernel.variant)
    assert offline.complaints([wide], table) == []
    where = " ".join(wide.key())
    more = dataclasses.replace(wide, registers=wide.registers + 1, special=wide.special + 2)
    assert offline.complaints([more], table) == [
        f"{where}: expected registers of at most {wide.registers}, got {wide.registers + 1}",
        f"{where}: expected special of at most {wide.special}, got {wide.special + 2}",
    ]
    assert offline.complaints([dataclasses.replace(more, version="0.0")], table) == []
    (spilled,) = offline.complaints([dataclasses.replace(wide, version="0.0", local_bytes=8)], table)
    assert spilled == f"{where}: expected no local memory, got 8 bytes"
    (narrow,) = offline.complaints([dataclasses.replace(wide, wide_loads=1)], table)
    assert narrow.endswith(f"expected at least 2 loads and 1 stores of 128 bits, got 1 and {wide.wide_stores}")
    (unknown,) = offline.complaints([dataclasses.replace(wide, variant="fp8 x16")], table)
    assert unknown.endswith("expected a line in kernels.csv, got none")


@pytest.mark.parametrize(
    ("symbol", "label"),
    [
        (
            "_ZN3csq4cuda47_GLOBAL__N__666a80b4_14_reconstruct_cu_721e29d627reconstruct_backward_kernelI13__nv_bfloat16"
            "Li8EEEvNS_17ReconstructParamsE",
            ("reconstruct_backward_kernel", "bf16 x8"),
        ),
        (
            "_ZN3csq4cuda47_GLOBAL__N__666a80b4_14_reconstruct_cu_721e29d625reconstruct_finish_kernelENS_1PE",
            ("reconstruct_finish_kernel", ""),
        ),
        ("_Z11some_kernelI6__halfLi2ELb1EEvv", ("some_kernel", "fp16 x2 1")),
        (
            "_ZN3csq4cuda45_GLOBAL__N__0fb9a15c_12_bitserial_cu_806388cd20bitserial_mma_kernelILi3ENS1_6HalvesELi2EEEv"
            "NS0_15BitserialLinearENS_10PlaneGroupEbb",
            ("bitserial_mma_kernel", "x3 Halves x2"),
        ),
        ("_Z11some_kernelIfLNS0_10ArithmeticE2EEEvv", ("some_kernel", "fp32 Arithmetic2")),
    ],
)
def test_labels_of_mangled_names(offline: ModuleType, symbol: str, label: tuple[str, str]) -> None:
    assert offline.label_cuda(symbol) == label
