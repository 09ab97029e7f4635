"""The CUDA kernels of training, run on the processor from their very sources, under the functions that call them.

Each .cu file is translated where the language is not C++ (launches, shared memory of a size given at the launch) and
compiled with ``cuda_emulation.h``; the bindings around it are those of the package.
"""

import concurrent.futures
import contextlib
import importlib.util
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from helpers import BFLOAT16, FLOAT64, OUTPUTS, Case, assert_within, autograd_of_reference, exact_outputs, pool
from step_layers import REFERENCE, RULES, Backend, StepCase, assert_step, closed_plane, copy, exact, small_scales

from csq_kernels import _native

if _native.module is None:
    pytest.skip(_native.reason, allow_module_level=True)
pybind11 = pytest.importorskip("pybind11")
from csq_kernels.backends import cuda_reconstruct, cuda_step, native_step  # noqa: E402

ROOT = Path(__file__).parents[1]
MODULE = """
#include "bindings.h"
#include "cpu/reconstruct.h"
#include "cpu/step.h"

// Of the processor's own kernels, which nobody calls here, the bindings need these two to be loaded.
namespace csq::cpu {
int64_t reconstruct_scratch_size(int64_t, int64_t, int64_t, int) { return 0; }
int64_t step_scratch_size(int64_t, int64_t, int64_t) { return 0; }
}  // namespace csq::cpu

PYBIND11_MODULE(emulated, m) {
    csq::python::bind_reconstruct(m);
    csq::python::bind_step(m);
}
"""
# What the emulation stands for.
REPLACED = ("cuda_runtime.h", "cuda_bf16.h", "cuda_fp16.h", "cuda/instructions.h")


def translate(source: str) -> str:
    source = re.sub(r"extern __shared__ (\w+) (\w+)\[\];", r"\1* \2 = static_cast<\1*>(dynamic_shared);", source)
    return source.replace("<<<", " * Launch(").replace(">>>(", ") * std::forward_as_tuple(")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("c++ is not on PATH")
    folder = tmp_path_factory.mktemp("cuda_emulation")
    (folder / "cuda").mkdir()
    for header in REPLACED:
        (folder / header).write_text("")
    (folder / "module.cpp").write_text(MODULE)
    for name in ("reconstruct", "step"):
        (folder / f"{name}_cuda.cpp").write_text(translate((ROOT / "csrc" / "cuda" / f"{name}.cu").read_text()))
        (folder / f"{name}.cpp").write_text((ROOT / "python" / f"{name}.cpp").read_text())
    # Another namespace: its classes are not those of the module that is loaded already.
    flags = ["-std=c++17", "-O1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fvisibility=hidden", "-w"]
    flags += ["-DCSQ_WITH_CUDA", "-Dcsq=csq_emulated", f"-I{folder}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'python'}"]
    flags += [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]

    def compile_one(source: Path) -> Path:
        emulation = ["-include", ROOT / "tests" / "cuda_emulation.h"] if "_cuda" in source.name else []
        target = source.with_suffix(".o")
        subprocess.run([compiler, *flags, *emulation, "-c", source, "-o", target], check=True)
        return target

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(compile_one, sorted(folder.glob("*.cpp"))))
    library = folder / "emulated.so"
    subprocess.run([compiler, "-shared", *objects, "-o", library], check=True)
    # The symbols of kernels that nobody calls stay open.
    now = sys.getdlopenflags()
    sys.setdlopenflags(os.RTLD_LAZY)
    try:
        spec = importlib.util.spec_from_file_location("emulated", library)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.setdlopenflags(now)
    return module


@pytest.fixture
def backend(emulated: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Backend:
    for module in (native_step, cuda_step, cuda_reconstruct):
        monkeypatch.setattr(module, "_C", emulated)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return Backend(cuda_step.step_sums, cuda_step.step_update, cuda_reconstruct.reconstruct)


PER_CHANNEL = {"gates_per_channel": True, "scale_per_channel": True}
EIGHT = tuple(range(8))
# Every kind of kernel; shapes and layouts that allow wide accesses and that do not; several blocks.
CASES = [
    *(
        StepCase(Case(shape, (0, 2, 3), 4, dtype=dtype), rule, narrow)
        for shape, dtype, rule, narrow in itertools.product(
            ((48, 64), (37, 29)), (torch.float32, BFLOAT16), RULES, (False, True)
        )
        if not (narrow and rule == "plain")
    ),
    *(
        StepCase(Case((7, inner), (1, 2), 4, gates_per_channel=gates, scale_per_channel=scale, channel_axis=axis), rule)
        for inner in (31, 40)
        for gates, scale in ((True, False), (False, True), (True, True))
        for axis in (0, 1)
        for rule in ("sgd", "adam")
    ),
    StepCase(Case((48, 64), EIGHT, 8, dtype=BFLOAT16), "adam", weight_dtype=BFLOAT16),
    StepCase(Case((37, 29), EIGHT, 8, dtype=BFLOAT16), "adam", weight_dtype=BFLOAT16),
    StepCase(Case((48, 64), EIGHT, 8), weight_dtype=BFLOAT16),
    StepCase(Case((37, 29), EIGHT, 8), narrow=True, weight_dtype=BFLOAT16),
    StepCase(Case((), (0, 1), 2), "adam", narrow=True),
    StepCase(Case((1,), (0,), 1, 1.0, scale_per_channel=True)),
    *(StepCase(Case((size,), tuple(range(16)), 16, 200.0), "adam", narrow=True) for size in (255, 256, 257, 264)),
    StepCase(Case((17, 31), (), 4)),
    StepCase(Case((17, 31), (), 4, **PER_CHANNEL)),
    StepCase(Case((0, 5))),
    StepCase(Case((11, 13, 3, 3), (0, 2), 3, 200.0, **PER_CHANNEL, channel_axis=1), "adam", narrow=True),
    StepCase(
        Case((11, 16, 4, 4), (0, 2), 3, 200.0, **PER_CHANNEL, channel_axis=1, dtype=BFLOAT16), "adam", narrow=True
    ),
    StepCase(Case((7, 31), (1, 2), 4, **PER_CHANNEL, vector_dtype=FLOAT64)),
    *(StepCase(Case((13, inner), (1, 2), 4, hard_gates=True), "nesterov") for inner in (67, 72)),
    *(StepCase(Case((13, inner), (1, 2), 4, hard_gates=True, **PER_CHANNEL)) for inner in (67, 72)),
    StepCase(Case((13, 72), (1, 2), 4, hard_gates=True, gates_per_channel=True, channel_axis=1)),
    StepCase(Case((13, 72), (1, 2), 4, hard_gates=True, dtype=BFLOAT16)),
    StepCase(Case((13, 72), (1, 2), 4, hard_gates=True, dtype=BFLOAT16), weight_dtype=BFLOAT16),
    StepCase(Case((13, 72), (1, 2), 4, layout="permuted")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_step_within_the_error_of_pytorch(backend: Backend, case: StepCase, poisoned: None) -> None:
    assert_step(backend, case, seeds=6 if math.prod(case.weight.shape) > 100 else 64)


def test_many_layers_of_every_kind_at_once(backend: Backend) -> None:
    layers = [case.layer(seed) for seed in range(2) for case in CASES if case.weight.layout == "compact"]
    together = [copy(layer) for layer in layers]
    backend.step_update(together)
    for layer, own in zip(layers, together, strict=True):
        alone = copy(layer)
        backend.step_update([alone])
        for name in ("bit_logits", "weight"):
            assert torch.equal(getattr(own, name), getattr(alone, name))
        for pair in zip(own.momenta + own.momentum_scales, alone.momenta + alone.momentum_scales, strict=True):
            assert torch.equal(*(tensor.view(torch.uint8) for tensor in pair))


@pytest.mark.parametrize("inner", [130, 132])
@pytest.mark.parametrize("scale_per_channel", [False, True])
def test_gradient_of_a_scale_too_small_to_divide_by(backend: Backend, scale_per_channel: bool, inner: int) -> None:
    layers = small_scales(scale_per_channel, inner)
    every = [
        [own.step_sums(layer)[1:] for layer in inputs]
        for own, inputs in ((backend, layers), (REFERENCE, [exact(layer) for layer in layers]), (REFERENCE, layers))
    ]
    assert_within(*(pool(found)[0] for found in every), name="grad_scale")


def test_planes_behind_closed_gates_move_by_their_momentum(backend: Backend) -> None:
    layer = closed_plane()
    own, eager = (functions.step([layer])[0] for functions in (backend, REFERENCE))
    assert torch.isfinite(own.weight).all()
    assert own.bit_logits.isnan().nonzero().tolist() == [[0, 1, 3, 7], [1, 1, 3, 7]]
    torch.testing.assert_close(own.bit_logits[:, 1], eager.bit_logits[:, 1], equal_nan=True)


@pytest.mark.parametrize(
    "case",
    [
        Case((40, 30), EIGHT, 8),
        Case((40, 32), EIGHT, 8, **PER_CHANNEL),
        Case((9, 7, 3, 3), (0, 2), 3, **PER_CHANNEL, channel_axis=1),
        Case((40, 32), (0, 1, 2), 3, dtype=BFLOAT16),
    ],
    ids=str,
)
def test_reconstruction_within_the_error_of_pytorch(backend: Backend, case: Case, poisoned: None) -> None:
    def outputs(arguments, grad_weight):
        return backend.reconstruct(*arguments), *cuda_reconstruct.reconstruct_backward(grad_weight, *arguments)

    inputs = [(case.arguments(seed), case.grad_weight(seed)) for seed in range(6)]
    every = (pool([compute(*i) for i in inputs]) for compute in (outputs, exact_outputs, autograd_of_reference))
    for name, *values in zip(OUTPUTS, *every, strict=True):
        assert_within(*values, name=name)
