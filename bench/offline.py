"""What the compilers made of every GPU kernel, read from the machine code: no GPU is needed.

``python bench/offline.py`` prints, for each kernel and architecture: registers, bytes of local memory (spills) and of
static shared memory, global loads and stores of 128 bits and of fewer, and special-function instructions. ``--check``
compares them with ``static/kernels.csv`` and fails if a kernel spills, moves a tensor in narrow accesses, or has more
of anything than the table; ``--write`` replaces the table.

The CUDA kernels are those inside the installed ``csq_kernels._C``, so nothing is compiled twice; the Triton kernels are
compiled here. Triton's package carries assembler and disassembler.
"""

import argparse
import concurrent.futures
import csv
import dataclasses
import functools
import importlib
import itertools
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

from csq_kernels import _native
from csq_kernels.step import NARROW, Rule, StepLayer, Vectors, momentum_scale_shape

TABLE = Path(__file__).parent / "static" / "kernels.csv"
TRITON_ARCHITECTURES = (80, 90, 100)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MANGLED_TYPES = {"f": "fp32", "d": "fp64", "13__nv_bfloat16": "bf16", "6__half": "fp16"}

# Loads and stores of 128 bits that a kernel which moves whole tensors has at least: logits of both signs, and in the
# backward pass the gradient; the weight, or the gradients of both signs.
BULK = {
    "reconstruct_forward_kernel": (2, 1),
    "reconstruct_backward_kernel": (3, 2),
    "reconstruct_fwd_kernel": (2, 1),
    "reconstruct_bwd_kernel": (3, 2),
    "reconstruct_sums_kernel": (3, 0),
    "reconstruct_products_kernel": (2, 0),
    "step_scale_sums_kernel": (2, 0),
    # Logits of both signs, or more with momenta in float32, beside the gradient and the weight.
    "step_kernel": (3, 3),
    # The planes of a packed weight, an access of 16 bytes each, in the loop and before it.
    "bitserial_mma_kernel": (2, 0),
    "bitserial_fma_kernel": (2, 0),
}
# The variants for arrays and rows that do not allow wide accesses, of which a step's are named by a last 0; sums have
# nothing to write in the backward pass.
NARROW_VARIANT = re.compile(r"^(fp32|bf16|fp16) (x1( [01])?|x\d [01] 0|\w+ sums)$")


@dataclasses.dataclass(frozen=True, order=True)
class Kernel:
    """One compiled kernel; loads and stores are counts of instructions on global memory, not of executions."""

    compiler: str
    version: str
    name: str
    variant: str
    arch: str
    registers: int
    local_bytes: int
    shared_bytes: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    special: int

    def key(self) -> tuple[str, ...]:
        return self.compiler, self.name, self.variant, self.arch


COUNTS = tuple(field.name for field in dataclasses.fields(Kernel) if field.type is int)


def missing_cuda() -> str | None:
    """Return why there are no CUDA kernels to read here, or None."""
    if _native.module is None:
        return _native.reason
    return None if _native.module.cuda_architectures else "the native module was built without CUDA"


def _cuobjdump() -> str:
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = str(bundled) if bundled.exists() else shutil.which("cuobjdump")
    if found is None:
        raise FileNotFoundError(f"expected cuobjdump at {bundled} or on PATH, got neither")
    return found


def _by_architecture(text: str, arch: str | None) -> dict[str, str]:
    """What cuobjdump prints, an architecture each; a library has several binaries, a cubin has one and names none."""
    if arch is not None:
        return {arch: text}
    sections: dict[str, str] = {}
    for section in re.split(r"\n(?=arch = )", text)[1:]:
        name = section.split("\n", 1)[0].removeprefix("arch = ").strip()
        sections[name] = sections.get(name, "") + "\n" + section
    return sections


Label = Callable[[str], tuple[str, str]]


def _read(binary: Path, compiler: str, version: str, label: Label, arch: str | None = None) -> Iterator[Kernel]:
    """Yield the kernels of a library, or of a cubin for ``arch``; ``label`` turns a symbol into name and variant."""

    def dump(option: str) -> dict[str, str]:
        done = subprocess.run([_cuobjdump(), option, binary], check=True, capture_output=True, text=True)
        return _by_architecture(done.stdout, arch)

    usage, sass = dump("--dump-resource-usage"), dump("--dump-sass")
    for name, code in sass.items():
        for body in re.split(r"\n\s*Function : ", code)[1:]:
            symbol = body.split("\n", 1)[0].strip()
            resources = re.search(
                re.escape(symbol) + r":\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage[name]
            )
            if resources is None:
                raise ValueError(f"expected resources of {symbol} from cuobjdump, got {usage[name]!r}")
            registers, stack, shared, local = map(int, resources.groups())
            instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body, re.MULTILINE)
            spills = sum(instruction.startswith(("LDL", "STL")) for instruction in instructions)
            loads = [instruction for instruction in instructions if instruction.startswith("LDG")]
            stores = [instruction for instruction in instructions if instruction.startswith("STG")]
            kernel, variant = label(symbol)
            yield Kernel(
                compiler=compiler,
                version=version,
                name=kernel,
                variant=variant,
                arch=name,
                registers=registers,
                local_bytes=max(stack + local, 4 * spills),
                shared_bytes=shared,
                wide_loads=sum(".128" in load for load in loads),
                narrow_loads=sum(".128" not in load for load in loads),
                wide_stores=sum(".128" in store for store in stores),
                narrow_stores=sum(".128" not in store for store in stores),
                special=sum(instruction.startswith("MUFU") for instruction in instructions),
            )


def label_cuda(symbol: str) -> tuple[str, str]:
    """Return name and template arguments of a mangled kernel: types by name, integers as ``x4``, booleans as 0 or 1,
    classes and enumerations by name."""
    # A name comes after its length; what looks like one further out is made of the digits of a hash.
    argument = r"Li\d+E|Lb[01]E|LNS0_\d+[A-Z]\w*?E\d+E|NS1_\d+[A-Z]\w*?E|13__nv_bfloat16|6__half|[fd]"
    arguments = rf"(?:I((?:{argument})+)E)?"
    found = None
    for match in re.finditer(rf"(?=(\d{{1,3}})([a-z]\w*?_kernel){arguments})", symbol):
        if int(match[1]) == len(match[2]):
            found = match
    if found is None:
        raise ValueError(f"expected a kernel with a name that ends in _kernel, got {symbol}")
    words = []
    for word in re.findall(argument, found[3] or ""):
        # Integers and booleans; values of an enumeration; types of this library; types of CUDA.
        value = re.fullmatch(r"L([ib])(\d+)E|LNS0_\d+(\w+?)E(\d+)E|NS1_\d+(\w+)E", word)
        if value is None:
            words.append(MANGLED_TYPES[word])
        elif value[2]:
            words.append(f"x{value[2]}" if value[1] == "i" else value[2])
        else:
            words.append(value[5] or f"{value[3]}{value[4]}")
    return found[2], " ".join(words)


def read_cuda() -> list[Kernel]:
    """Read the kernels of the installed native module, for the architectures that it was built for."""
    version = _native.module.compiler.rpartition("nvcc ")[2]
    return list(_read(Path(_native.module.__file__), "nvcc", version, label_cuda))


class _Recorder:
    """Stands in for a Triton kernel: keeps the arguments of each launch instead of running it."""

    def __init__(self, kernel: Any, calls: list[tuple[Any, dict[str, Any]]]) -> None:
        self.kernel = kernel
        self.calls = calls

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def record(*args: Any, **kwargs: Any) -> None:
            self.calls.append((self.kernel, dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs))

        return record


def _reconstruct_variants(module: ModuleType) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield variants of the launches for a weight of 4096 x 4096."""
    rows, columns, planes = 4096, 4096, 8
    for name, dtype in DTYPES.items():
        for per_channel in (False, True):
            bit_logits = torch.empty(2, planes, rows, columns, dtype=dtype, device="meta")
            gate_logits = torch.empty((planes, rows) if per_channel else (planes,), device="meta")
            scale = torch.empty((rows,) if per_channel else (), device="meta")
            temperature = torch.empty((), device="meta")
            arguments = (bit_logits, gate_logits, scale, temperature, list(range(planes)), planes, 0, False)

            def launch(arguments: tuple[Any, ...] = arguments) -> None:
                module.reconstruct(*arguments)
                module.reconstruct_backward(arguments[0][0, 0], *arguments)

            variant = f"{name} {'channel' if per_channel else 'layer'}"
            yield variant, launch
            if dtype != torch.float16:
                grad_weight = torch.empty(rows, columns, device="meta")
                yield f"{variant} sums", functools.partial(module.reconstruct_sums, grad_weight, *arguments)


def _step_variants(module: ModuleType) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield steps of a weight of 4096 x 4096, float32 beside logits of either dtype; and the sums of fixed gates."""
    planes, shape = 8, (4096, 4096)
    rules = {
        "plain": Rule.sgd(1, 0.1, 0.0, 0.0, False, False),
        "sgd": Rule.sgd(1, 0.1, 0.9, 0.0, False, False),
        "adam": Rule.adam(1, 0.1, (0.9, 0.999), 1e-8, False),
    }
    for name in ("fp32", "bf16"):
        logits = torch.empty(2, planes, *shape, dtype=DTYPES[name], device="meta")
        for (rule_name, rule), narrow, per_channel in itertools.product(rules.items(), (False, True), (False, True)):
            if narrow and rule.momenta == 0:
                continue
            momentum = torch.empty(logits.shape, dtype=NARROW if narrow else torch.float32, device="meta")
            scales = torch.empty(momentum_scale_shape(logits), device="meta")
            gates = torch.empty((planes, shape[0]) if per_channel else (planes,), device="meta")
            vectors = Vectors(gates, gates[0], torch.empty((), device="meta"))
            layer = StepLayer(
                weight=torch.empty(shape, device="meta"),
                grad_weight=torch.empty(shape, device="meta"),
                bit_logits=logits,
                before=vectors,
                after=vectors,
                bits=tuple(range(planes)),
                n_bits=planes,
                channel_axis=0,
                hard_gates=rule.momenta == 0,
                rule=rule,
                momenta=(momentum,) * rule.momenta,
                momentum_scales=(scales,) * (rule.momenta if narrow else 0),
                key=0,
            )

            def launch(layer: StepLayer = layer) -> None:
                module.step_update([layer])
                if layer.hard_gates:
                    module.step_sums(layer)

            words = [name, rule_name, *["narrow"] * narrow, "channel" if per_channel else "layer"]
            yield " ".join(words), launch


def _bitserial_variants(module: ModuleType) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield launches for a packed weight of 4096 x 4096: of 1 and of 512 rows of input, and of the weight itself."""
    shape = [4096, 4096]
    step = torch.empty(4096, device="meta")
    for name, dtype in DTYPES.items():
        for planes in (2, 4, 8):
            coefficients = [1 << bit for bit in reversed(range(planes))]
            canonical = torch.empty(planes, 4096 * 4096 // 8, dtype=torch.uint8, device="meta")
            tiles = torch.empty(module.gpu_planes.tile_shape(coefficients, shape), dtype=torch.uint8, device="meta")
            packed = (tiles, step, None, coefficients, shape)
            for batch in (1, 512):
                for precision in ("exact", "int8"):
                    input = torch.empty(batch, 4096, dtype=dtype, device="meta")
                    launch = functools.partial(module.bitserial_linear, input, *packed, precision)
                    yield f"{name} {planes} planes batch {batch} {precision}", launch
            if dtype == torch.float32:
                for order, source in (("tiles", tiles), ("planes", canonical)):
                    launch = functools.partial(module.bitserial_weight, source, step, coefficients, shape, 0)
                    yield f"{planes} planes from {order}", launch


# Of each Triton module of the backends: calls that launch every kernel, on tensors without memory.
TRITON_VARIANTS = {
    "triton_reconstruct": _reconstruct_variants,
    "triton_step": _step_variants,
    "triton_bitserial": _bitserial_variants,
}


def _launches(module: ModuleType, launch: Callable[[], None]) -> list[tuple[Any, dict[str, Any]]]:
    """Return the kernels, with their arguments, that ``launch`` would run."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    names = [name for name in vars(module) if name.endswith("_kernel")]
    with mock.patch.multiple(module, **{name: _Recorder(getattr(module, name), calls) for name in names}):
        launch()
    return calls


def _integer_type(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _source(kernel: Any, arguments: dict[str, Any]) -> Any:
    """Return what Triton compiles for these arguments when it specialises them as it does at a launch."""
    from triton.compiler import ASTSource

    pointers = {
        torch.float32: "*fp32",
        torch.bfloat16: "*bf16",
        torch.float16: "*fp16",
        torch.float64: "*fp64",
        torch.int8: "*i8",
        torch.uint8: "*u8",
        torch.int16: "*i16",
        torch.int32: "*i32",
        torch.int64: "*i64",
    }
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = pointers[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif value is None or parameter.is_constexpr or (value == 1 and not parameter.do_not_specialize):
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

    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        for name, variants in TRITON_VARIANTS.items():
            module = importlib.import_module(f"csq_kernels.backends.{name}")
            for variant, launch in variants(module):
                for kernel, arguments in _launches(module, launch):
                    options = {key: value for key, value in arguments.items() if key not in kernel.arg_names}
                    target = GPUTarget("cuda", arch, 32)
                    compiled = triton.compile(_source(kernel, arguments), target=target, options=options)
                    cubin.write_bytes(compiled.asm["cubin"])
                    label = (compiled.metadata.name, variant)
                    kernels += _read(cubin, "triton", triton.__version__, lambda _, label=label: label, f"sm_{arch}")
    return kernels


def every_kernel() -> list[Kernel]:
    """Read everything that is there, sorted; a process per architecture for Triton."""
    with concurrent.futures.ProcessPoolExecutor(min(os.cpu_count() or 1, len(TRITON_ARCHITECTURES))) as pool:
        jobs = [pool.submit(compile_triton, arch) for arch in TRITON_ARCHITECTURES]
        kernels = [] if missing_cuda() else read_cuda()
        return sorted(kernels + [kernel for job in jobs for kernel in job.result()])


def read_table() -> list[Kernel]:
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [Kernel(**{key: int(value) if key in COUNTS else value for key, value in row.items()}) for row in rows]


def write_table(kernels: list[Kernel]) -> None:
    TABLE.parent.mkdir(exist_ok=True)
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(Kernel)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(dataclasses.asdict, kernels))


def complaints(kernels: list[Kernel], table: list[Kernel]) -> list[str]:
    """Return what is wrong with the kernels, a line each.

    Counts are compared only where the compiler is the one that the table was made with: another one may do better or
    worse. Kernels and architectures that are in the table alone are not missed, as a build may leave some out.
    """
    found = []
    known = {kernel.key(): kernel for kernel in table}
    for kernel in kernels:
        where = " ".join(kernel.key())
        if kernel.local_bytes:
            found.append(f"{where}: expected no local memory, got {kernel.local_bytes} bytes")
        loads, stores = BULK.get(kernel.name, (0, 0))
        if not NARROW_VARIANT.search(kernel.variant) and (kernel.wide_loads < loads or kernel.wide_stores < stores):
            found.append(
                f"{where}: expected at least {loads} loads and {stores} stores of 128 bits, "
                f"got {kernel.wide_loads} and {kernel.wide_stores}"
            )
        before = known.get(kernel.key())
        if before is None:
            found.append(f"{where}: expected a line in {TABLE.name}, got none")
        elif before.version == kernel.version:
            for count in COUNTS:
                if getattr(kernel, count) > getattr(before, count):
                    found.append(
                        f"{where}: expected {count} of at most {getattr(before, count)}, got {getattr(kernel, count)}"
                    )
    return found


def print_kernels(kernels: list[Kernel]) -> None:
    header = ("compiler", "version", "kernel", "variant", "arch", "regs", "local", "shared")
    header += ("ld128", "ld", "st128", "st", "mufu")
    rows = [header, *(tuple(map(str, dataclasses.astuple(kernel))) for kernel in kernels)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", action="store_true", help=f"compare with {TABLE.name}")
    action.add_argument("--write", action="store_true", help=f"replace {TABLE.name}")
    options = parser.parse_args()
    if reason := missing_cuda():
        print(f"the CUDA kernels are left out: {reason}", file=sys.stderr)
        if options.write:
            return 1
    kernels = every_kernel()
    if options.write:
        write_table(kernels)
    elif options.check:
        found = complaints(kernels, read_table())
        print("\n".join(found), file=sys.stderr, end="\n" * bool(found))
        return 1 if found else 0
    else:
        print_kernels(kernels)
    return 0


if __name__ == "__main__":
    sys.exit(main())
