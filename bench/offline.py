"""Compile every GPU kernel without a GPU, and read from the machine code what became of it.

``python bench/offline.py [--json]`` prints, for each kernel and architecture: registers, bytes of local memory
(spills), global loads and stores of 128 bits and of fewer, and special-function instructions. Triton's package
carries assembler and disassembler. The kernels of ``csrc/cuda`` are left out, with the reason, without nvcc.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
# The kernels of this checkout, whatever is installed.
sys.path.insert(0, str(ROOT))
CUDA_SOURCES = ("csrc/cuda/reconstruct.cu", "csrc/cuda/bitserial.cu")
TRITON_ARCHITECTURES = (80, 90, 100)
NVCC_ARCHITECTURES = ("80", "90a", "100")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MANGLED_DTYPES = {"f": "fp32", "13__nv_bfloat16": "bf16", "6__half": "fp16"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One compiled kernel; loads and stores are counts of instructions on global memory, not of executions."""

    compiler: str
    name: str
    variant: str
    arch: str
    registers: int
    local_bytes: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    special: int


def missing_nvcc() -> str | None:
    """Return why the sources of ``csrc/cuda`` cannot be compiled here, or None."""
    return None if shutil.which("nvcc") else "nvcc is not on PATH"


def _cuobjdump() -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError(f"expected cuobjdump at {bundled} or on PATH, got neither")
    return found


def _read(cubin: Path, compiler: str, arch: str, label: Callable[[str], tuple[str, str]]) -> Iterator[Kernel]:
    """Yield the kernels of a cubin; ``label`` turns a symbol into the kernel's name and variant."""
    tool = _cuobjdump()
    usage = subprocess.run([tool, "--dump-resource-usage", cubin], check=True, capture_output=True, text=True).stdout
    sass = subprocess.run([tool, "--dump-sass", cubin], check=True, capture_output=True, text=True).stdout
    for body in re.split(r"\n\s*Function : ", sass)[1:]:
        symbol = body.split("\n", 1)[0].strip()
        resources = re.search(re.escape(symbol) + r":\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        if resources is None:
            raise ValueError(f"expected resources of {symbol} from cuobjdump, got {usage!r}")
        instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body, re.MULTILINE)
        spills = sum(instruction.startswith(("LDL", "STL")) for instruction in instructions)
        loads = [instruction for instruction in instructions if instruction.startswith("LDG")]
        stores = [instruction for instruction in instructions if instruction.startswith("STG")]
        name, variant = label(symbol)
        yield Kernel(
            compiler=compiler,
            name=name,
            variant=variant,
            arch=arch,
            registers=int(resources[1]),
            local_bytes=max(int(resources[2]) + int(resources[3]), 4 * spills),
            wide_loads=sum(".128" in load for load in loads),
            narrow_loads=sum(".128" not in load for load in loads),
            wide_stores=sum(".128" in store for store in stores),
            narrow_stores=sum(".128" not in store for store in stores),
            special=sum(instruction.startswith("MUFU") for instruction in instructions),
        )


def _bitserial_label(symbol: str) -> tuple[str, str]:
    """Name of a kernel of ``bitserial.cu``; its planes, how it multiplies and for how many input rows, or its dtype."""
    name = re.search(r"\d(bitserial_[a-z]+_kernel)", symbol)
    product = re.search(r"_kernelILi(\d+)E(?:.*?_\d+(Halves|Bytes)E)?Li(\d+)E", symbol)
    if name is None:
        raise ValueError(f"expected the name of a kernel in {symbol!r}, got none")
    if product is not None:
        return name[1], f"{product[1]} planes {product[2] or 'Floats'} x{int(product[3]) * (8 if product[2] else 1)}"
    dtype = re.search(r"_kernelI(f|13__nv_bfloat16|6__half)(?:Lb(\d)E|.*?ArithmeticE(\d))", symbol)
    order = {"0": "planes", "1": "tiles"}
    target = {"1": "to fp16", "2": "to int8"}
    if dtype is None:
        raise ValueError(f"expected a dtype in {symbol!r}, got none")
    return name[1], f"{MANGLED_DTYPES[dtype[1]]} {order[dtype[2]] if dtype[2] else target[dtype[3]]}"


def compile_cuda(arch: str) -> list[Kernel]:
    """Compile ``csrc/cuda`` for one architecture, such as ``"90a"``."""

    def label(symbol: str) -> tuple[str, str]:
        if "bitserial" in symbol:
            return _bitserial_label(symbol)
        name = re.search(r"\d(reconstruct_[a-z]+_kernel)", symbol)
        template = re.search(r"_kernelI(f|13__nv_bfloat16|6__half)Li(\d+)E", symbol)
        variant = f"{MANGLED_DTYPES[template[1]]} x{template[2]}" if template else "fp64"
        return name[1] if name else symbol, variant

    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        for source in CUDA_SOURCES:
            cubin = Path(folder) / "kernels.cubin"
            target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}", "-cubin", "-o", str(cubin)]
            command = ["nvcc", "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", *target, str(ROOT / source)]
            subprocess.run(command, check=True)
            kernels += _read(cubin, "nvcc", f"sm_{arch}", label)
    return kernels


class _Recorder:
    """Stands in for a Triton kernel: keeps the arguments of each launch instead of running it."""

    def __init__(self, kernel: Any, calls: list[tuple[Any, dict[str, Any]]]) -> None:
        self.kernel = kernel
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def record(*args: Any, **kwargs: Any) -> None:
            self.calls.append((self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs))

        return record


def _launches(module: ModuleType, dtype: torch.dtype, per_channel: bool) -> list[tuple[Any, dict[str, Any]]]:
    """Return the kernels, with their arguments, that the launchers would run for a weight of 4096 x 4096."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    names = [name for name in vars(module) if name.endswith("_kernel")]
    rows, columns, planes = 4096, 4096, 8
    bit_logits = torch.empty(2, planes, rows, columns, dtype=dtype, device="meta")
    gate_logits = torch.empty((planes, rows) if per_channel else (planes,), device="meta")
    scale = torch.empty((rows,) if per_channel else (), device="meta")
    arguments = (bit_logits, gate_logits, scale, torch.empty((), device="meta"), list(range(planes)), planes, 0, False)
    with mock.patch.multiple(module, **{name: _Recorder(getattr(module, name), calls) for name in names}):
        module.reconstruct(*arguments)
        module.reconstruct_backward(bit_logits[0, 0], *arguments)
    return calls


def _bitserial_launches(module: ModuleType, dtype: torch.dtype, planes: int) -> list[tuple[Any, dict[str, Any]]]:
    """As ``_launches``: products of 1 and of 512 rows, in both kinds of arithmetic, and the weight, of 4096 x 4096."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    names = [name for name in vars(module) if name.endswith("_kernel")]
    coefficients, shape = [1 << bit for bit in reversed(range(planes))], [4096, 4096]
    canonical = torch.empty(planes, 4096 * 4096 // 8, dtype=torch.uint8, device="meta")
    tiles = torch.empty(module.gpu_planes.tile_shape(coefficients, shape), dtype=torch.uint8, device="meta")
    step = torch.empty(4096, device="meta")
    with mock.patch.multiple(module, **{name: _Recorder(getattr(module, name), calls) for name in names}):
        for batch in (1, 512):
            for precision in ("exact", "int8"):
                input = torch.empty(batch, 4096, dtype=dtype, device="meta")
                module.bitserial_linear(input, tiles, step, None, coefficients, shape, precision)
        module.bitserial_weight(tiles, step, coefficients, shape, 0)
        module.bitserial_weight(canonical, step, coefficients, shape, 0)
    return calls


def _integer_type(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _source(kernel: Any, arguments: dict[str, Any]) -> Any:
    """Return what Triton compiles for these arguments when it specialises them as it does at a launch."""
    from triton.compiler import ASTSource

    pointers = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}
    pointers |= {torch.uint8: "*u8", torch.int32: "*i32"}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = pointers[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = _integer_type(value)
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def compile_triton(arch: int) -> list[Kernel]:
    """Compile the Triton kernels for one compute capability, such as 90."""
    import triton
    from triton.backends.compiler import GPUTarget

    from csq_kernels.backends import triton_bitserial, triton_reconstruct

    launches = []
    for name, dtype in DTYPES.items():
        for per_channel in (False, True):
            variant = f"{name} {'channel' if per_channel else 'layer'}"
            launches += [(variant, *launch) for launch in _launches(triton_reconstruct, dtype, per_channel)]
        for planes in (2, 4, 8):
            variant = f"{name} {planes} planes"
            launches += [(variant, *launch) for launch in _bitserial_launches(triton_bitserial, dtype, planes)]
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        for variant, kernel, arguments in launches:
            compiled = triton.compile(_source(kernel, arguments), target=GPUTarget("cuda", arch, 32))
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(compiled.asm["cubin"])
            kernels += _read(cubin, "triton", f"sm_{arch}", lambda symbol, variant=variant: (symbol, variant))
    return kernels


def compile_all() -> list[Kernel]:
    """Compile everything that can be compiled here, one process per architecture and compiler."""
    with concurrent.futures.ProcessPoolExecutor(min(os.cpu_count() or 1, 6)) as pool:
        jobs = [pool.submit(compile_triton, arch) for arch in TRITON_ARCHITECTURES]
        if missing_nvcc() is None:
            jobs += [pool.submit(compile_cuda, arch) for arch in NVCC_ARCHITECTURES]
        return [kernel for job in jobs for kernel in job.result()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object a kernel instead of a table")
    options = parser.parse_args()
    kernels = compile_all()
    if options.json:
        for kernel in kernels:
            print(json.dumps(dataclasses.asdict(kernel)))
    else:
        header = ("compiler", "kernel", "variant", "arch", "regs", "local", "ld128", "ld", "st128", "st", "mufu")
        rows = [header, *(tuple(str(value) for value in dataclasses.astuple(kernel)) for kernel in kernels)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        for row in rows:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if reason := missing_nvcc():
        print(f"csrc/cuda was not compiled: {reason}", file=sys.stderr)


if __name__ == "__main__":
    main()
