"""llama.cpp's matrix kernels, through the shared libraries that llama-cpp-python installs; no model is needed."""

import ctypes
import functools
import importlib.metadata
import importlib.util
import weakref
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peers import Provider, Shape, Walk, chain

CONTEXT_BYTES = 1 << 22  # room for the descriptors of tensors and graph, not for their values
DISTINCT_ROWS = 64  # quantized once and repeated: the time does not depend on the values
F32 = 0


class InitParams(ctypes.Structure):
    _fields_ = [("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool)]


class ThreadpoolParams(ctypes.Structure):
    """``poll``: how long idle threads spin; 0 puts them to sleep, so that nothing that runs next is slowed."""

    _fields_ = [
        ("cpumask", c_bool * 512),
        ("threads", c_int),
        ("priority", c_int),
        ("poll", ctypes.c_uint32),
        ("strict", c_bool),
        ("paused", c_bool),
    ]


LogCallback = ctypes.CFUNCTYPE(None, c_int, ctypes.c_char_p, c_void_p)

PROTOTYPES: dict[str, tuple[Any, ...]] = {  # result, arguments
    "ggml_init": (c_void_p, InitParams),
    "ggml_free": (None, c_void_p),
    "ggml_new_tensor_2d": (c_void_p, c_void_p, c_int, c_int64, c_int64),
    "ggml_mul_mat": (c_void_p, c_void_p, c_void_p, c_void_p),
    "ggml_new_graph_custom": (c_void_p, c_void_p, c_size_t, c_bool),
    "ggml_build_forward_expand": (None, c_void_p, c_void_p),
    "ggml_nbytes": (c_size_t, c_void_p),
    "ggml_quantize_chunk": (c_size_t, c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    "ggml_backend_tensor_set": (None, c_void_p, c_void_p, c_size_t, c_size_t),
    "ggml_backend_alloc_ctx_tensors": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, c_void_p, c_void_p),
    "ggml_backend_buffer_free": (None, c_void_p),
    "ggml_backend_graph_compute": (c_int, c_void_p, c_void_p),
    "ggml_backend_cpu_init": (c_void_p,),
    "ggml_log_set": (None, LogCallback, c_void_p),
    "ggml_backend_cpu_set_n_threads": (None, c_void_p, c_int),
    "ggml_backend_cpu_set_threadpool": (None, c_void_p, c_void_p),
    "ggml_threadpool_params_init": (None, c_void_p, c_int),
    "ggml_threadpool_new": (c_void_p, c_void_p),
    "ggml_threadpool_free": (None, c_void_p),
    "ggml_cpu_has_avx2": (c_int,),
    "ggml_cpu_has_avx512": (c_int,),
    "ggml_backend_cpu_repack_buffer_type": (c_void_p,),
}
MANGLED = {"ggml_backend_cpu_repack_buffer_type": "_Z35ggml_backend_cpu_repack_buffer_typev"}


def folder() -> Path | None:
    spec = importlib.util.find_spec("llama_cpp")
    return Path(spec.origin).parent / "lib" if spec is not None and spec.origin is not None else None


def available() -> str | None:
    libraries = folder()
    if libraries is None:
        return "llama-cpp-python not installed"
    missing = [name for name in ("libggml-base.so", "libggml-cpu.so") if not (libraries / name).exists()]
    return f"{' and '.join(missing)} not in {libraries}" if missing else None


def version() -> dict[str, str]:
    return {"llama-cpp-python": importlib.metadata.version("llama-cpp-python")}


class Library:
    """The functions of ``PROTOTYPES`` as attributes, and a CPU backend."""

    def __init__(self, libraries: Path) -> None:
        loaded = [
            ctypes.CDLL(str(libraries / f"libggml-{part}.so"), mode=ctypes.RTLD_GLOBAL) for part in ("base", "cpu")
        ]
        for name, (result, *arguments) in PROTOTYPES.items():
            symbols = ((lib, symbol) for lib in loaded for symbol in (name, MANGLED.get(name, name)))
            function = next(getattr(lib, symbol) for lib, symbol in symbols if hasattr(lib, symbol))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.silence = LogCallback(lambda level, text, data: None)  # a line for each repacked tensor otherwise
        self.log_set(self.silence, None)
        self.backend = self.backend_cpu_init()
        self.threads, self.threadpool = 0, None

    def set_threads(self, threads: int) -> None:
        """Keep a pool of so many threads; without one every graph would start threads of its own."""
        if threads == self.threads:
            return
        params = ThreadpoolParams()
        self.threadpool_params_init(ctypes.byref(params), threads)
        params.poll = 0
        threadpool = self.threadpool_new(ctypes.byref(params))
        self.backend_cpu_set_n_threads(self.backend, threads)
        self.backend_cpu_set_threadpool(self.backend, threadpool)
        if self.threadpool is not None:
            self.threadpool_free(self.threadpool)
        self.threads, self.threadpool = threads, threadpool

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"expected a function of {sorted(PROTOTYPES)}, got ggml_{name}")


@functools.cache
def library() -> Library:
    libraries = folder()
    assert libraries is not None
    return Library(libraries)


class Chain:
    """A graph of one product after another."""

    def __init__(self, kind: int, repack: bool, shapes: list[Shape], batch: int) -> None:
        ggml = library()
        random = np.random.default_rng(0)
        weight_context, context = (ggml.init(InitParams(CONTEXT_BYTES, None, True)) for _ in range(2))
        weights = [ggml.new_tensor_2d(weight_context, kind, k, n) for n, k in shapes]
        if repack:
            buffer_type = ggml.backend_cpu_repack_buffer_type()
            weight_buffer = ggml.backend_alloc_ctx_tensors_from_buft(weight_context, buffer_type)
        else:
            weight_buffer = ggml.backend_alloc_ctx_tensors(weight_context, ggml.backend)
        self.weight_bytes = sum(ggml.nbytes(weight) for weight in weights)
        values = {shape: self.quantized(kind, shape, random) for shape in set(shapes)}
        for weight, shape in zip(weights, shapes, strict=True):
            ggml.backend_tensor_set(weight, values[shape].ctypes.data, 0, values[shape].nbytes)
        first = output = ggml.new_tensor_2d(context, F32, shapes[0][1], batch)
        for weight in weights:
            output = ggml.mul_mat(context, weight, output)
        self.graph = ggml.new_graph_custom(context, len(shapes) + 8, False)
        ggml.build_forward_expand(self.graph, output)
        buffer = ggml.backend_alloc_ctx_tensors(context, ggml.backend)
        x = random.standard_normal((batch, shapes[0][1]), dtype=np.float32)
        ggml.backend_tensor_set(first, x.ctypes.data, 0, x.nbytes)
        for release, handle in (
            (ggml.free, context),
            (ggml.free, weight_context),
            (ggml.backend_buffer_free, buffer),
            (ggml.backend_buffer_free, weight_buffer),
        ):
            weakref.finalize(self, release, handle)

    @staticmethod
    def quantized(kind: int, shape: Shape, random: np.random.Generator) -> np.ndarray:
        """The bytes of a weight of random values."""
        rows = random.standard_normal((DISTINCT_ROWS, shape[1]), dtype=np.float32) / np.float32(np.sqrt(shape[1]))
        target = np.empty(rows.nbytes, np.uint8)
        size = library().quantize_chunk(kind, rows.ctypes.data, target.ctypes.data, 0, *rows.shape, None)
        return np.tile(target[:size], shape[0] // DISTINCT_ROWS)

    def run(self) -> None:
        ggml = library()
        status = ggml.backend_graph_compute(ggml.backend, self.graph)
        if status != 0:
            raise RuntimeError(f"expected status 0 of ggml_backend_graph_compute, got {status}")


@dataclass(frozen=True)
class MulMat:
    name: str
    bits: int
    activation: str
    kind: int  # value of enum ggml_type
    repack: bool = False

    def walk(self, shape: Shape, batch: int, threads: int) -> Walk:
        library().set_threads(threads)
        shapes = chain(shape, self.bits, batch)
        layers = Chain(self.kind, self.repack, shapes, batch)
        return Walk(layers.run, layers=len(shapes), weight_bytes=layers.weight_bytes)


def providers() -> list[Provider]:
    kernels: list[Provider] = [
        MulMat("ggml F32", 32, "fp32", F32),
        MulMat("ggml F16", 16, "fp16", 1),
        MulMat("ggml Q8_0", 8, "int8", 8),
        MulMat("ggml Q6_K", 6, "int8", 14),
        MulMat("ggml Q5_K", 5, "int8", 13),
        MulMat("ggml Q4_K", 4, "int8", 12),
        MulMat("ggml Q4_0", 4, "int8", 2),
        MulMat("ggml Q3_K", 3, "int8", 11),
        MulMat("ggml Q2_K", 2, "int8", 10),
        MulMat("ggml TQ2_0", 2, "int8", 35),
        MulMat("ggml Q1_0", 1, "int8", 41),
    ]
    if library().cpu_has_avx2():
        kernels += [MulMat("ggml Q4_K repack", 4, "int8", 12, True), MulMat("ggml Q4_0 repack", 4, "int8", 2, True)]
    if library().cpu_has_avx512():
        kernels.append(MulMat("ggml Q2_K repack", 2, "int8", 10, True))
    return kernels
