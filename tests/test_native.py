"""The native module by itself: how it was built, its argument checks, instruction sets, threads and bounds."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import csq_kernels
from csq_kernels import _native

if _native.module is None:
    pytest.skip(str(_native.reason), allow_module_level=True)
_C = _native.module

SENTINEL = np.float32(-7.25)
# (outer, channels, inner): a layer, wide rows with a short last tile, groups of narrow rows, one lane a channel.
SHAPES = [(1, 1, 1), (1, 1, 70001), (3, 5, 4099), (1, 700, 9), (40, 300, 7), (9, 1031, 1), (2, 33, 63), (2, 33, 64)]


class Problem:
    """A reconstruction on numpy arrays: its inputs, and outputs of which every element can be placed anywhere."""

    def __init__(self, shape: tuple[int, int, int], planes: int = 3, per_channel: bool = True, offset: int = 0) -> None:
        random = np.random.default_rng(0)
        channels = shape[1] if per_channel else 1
        self.shape, self.planes, self.offset = shape, planes, offset
        self.logits = random.standard_normal((2, planes, *shape), dtype=np.float32)
        self.gates = random.standard_normal((planes, channels), dtype=np.float32)
        self.scale = random.random(channels, dtype=np.float32) + np.float32(0.5)
        self.temperature = np.full(1, 3, dtype=np.float32)
        self.grad = random.standard_normal(shape, dtype=np.float32)
        self.sizes: dict[str, Any] = {
            **dict(zip(("outer", "channels", "inner"), shape, strict=True)),
            "bits": list(range(planes)),
            "n_bits": planes,
            "dtype": "float32",
            "gates_per_channel": per_channel,
            "scale_per_channel": per_channel,
            "hard_gates": False,
            "threads": 1,
        }
        self.inputs = {
            "bit_logits": self.logits.ctypes.data,
            "gate_logits": self.gates.ctypes.data,
            "scale": self.scale.ctypes.data,
            "temperature": self.temperature.ctypes.data,
        }

    def output(self, *shape: int) -> tuple[np.ndarray, np.ndarray]:
        """An array between sentinels, ``offset`` elements after an address that is a multiple of 64, and its view."""
        size = int(np.prod(shape))
        guarded = np.full(size + 64 + self.offset, SENTINEL, dtype=np.float32)
        start = (-guarded.ctypes.data % 64) // 4 + 16 + self.offset
        return guarded, guarded[start : start + size].reshape(shape)

    def forward(self, **changes: Any) -> np.ndarray:
        guarded, weight = self.output(*self.shape)
        _C.reconstruct_forward(**{**self.inputs, "weight": weight.ctypes.data, **self.sizes, **changes})
        self.require_sentinels(guarded, weight)
        return weight

    def backward(self, **changes: Any) -> list[np.ndarray]:
        outputs = [self.output(*array.shape) for array in (self.logits, self.gates, self.scale)]
        scratch = np.full(_C.reconstruct_scratch_size(*self.shape, self.planes), np.nan)
        addresses = {
            "grad_weight": self.grad.ctypes.data,
            "scratch": scratch.ctypes.data,
            **{
                name: view.ctypes.data
                for name, (_, view) in zip(("grad_bit_logits", "grad_gate_logits", "grad_scale"), outputs, strict=True)
            },
        }
        _C.reconstruct_backward(**{**addresses, **self.inputs, **self.sizes, **changes})
        for guarded, view in outputs:
            self.require_sentinels(guarded, view)
        return [view for _, view in outputs]

    @staticmethod
    def require_sentinels(guarded: np.ndarray, view: np.ndarray) -> None:
        start = (view.ctypes.data - guarded.ctypes.data) // 4
        assert (guarded[:start] == SENTINEL).all() and (guarded[start + view.size :] == SENTINEL).all()

    def exact(self) -> np.ndarray:
        """Equation (3) in float64."""

        def sigmoid(logits: np.ndarray) -> np.ndarray:
            return 1 / (1 + np.exp(-3 * logits.astype(np.float64)))

        powers = 2.0 ** np.arange(self.planes)[:, None] * sigmoid(self.gates)
        digits = sigmoid(self.logits[0]) - sigmoid(self.logits[1])
        total = np.einsum("kc,koci->oci", np.broadcast_to(powers, (self.planes, self.shape[1])), digits)
        return total * self.scale.astype(np.float64)[:, None] / (2.0**self.planes - 1)


@pytest.fixture(params=_C.supported_isas())
def isa(request: pytest.FixtureRequest) -> str:
    _C.set_isa(request.param)
    return request.param


def test_build_info() -> None:
    assert _C.compiler.split()[0] in ("GNU", "Clang", "AppleClang")
    assert all(name[:2].isdigit() for name in _C.cuda_architectures)
    assert bool(_C.cuda_architectures) == hasattr(_C, "cuda_reconstruct_forward")


def test_info_names_every_op_and_a_reason_for_what_is_missing() -> None:
    info = csq_kernels.info()
    assert info["native"] == "built" and info["isa"] in info["supported_isas"] and info["threads"] >= 1
    served = {(row["op"], row["device"]): row for row in info["ops"]}
    assert served["reconstruct", "cpu"]["backend"] == "cpu"
    assert all(row["backend"] and all(": " in reason for reason in row["missing"]) for row in served.values())


def test_without_the_module_the_reference_serves_and_the_reason_is_kept() -> None:
    script = (
        "import sys; sys.modules['csq_kernels._C'] = None\n"
        "import torch, csq_kernels\n"
        "print(csq_kernels.info()['native'])\n"
        "print(csq_kernels.functional.reconstruct(torch.zeros(2, 3, 4), torch.zeros(3), *torch.ones(2)).tolist())\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    reason, weight = result.stdout.splitlines()
    assert reason.startswith("the native module was not built: ")
    assert weight == "[0.0, 0.0, 0.0, 0.0]"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_process_has_one_openmp_runtime() -> None:
    script = "import torch, csq_kernels; print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    runtimes = {line.split()[-1] for line in maps.splitlines() if "libgomp" in line or "libomp" in line}
    assert len({Path(path).resolve() for path in runtimes}) <= 1, runtimes


def test_best_instruction_set_is_the_default_and_each_can_be_forced() -> None:
    supported = _C.supported_isas()
    assert supported[0] == "scalar" and _C.isa() == supported[-1]
    for name in supported:
        _C.set_isa(name)
        assert _C.isa() == name


def test_forcing_an_instruction_set_that_is_not_there_is_an_error() -> None:
    before = _C.isa()
    missing = {"avx2", "avx512", "sse9"} - set(_C.supported_isas())
    for name in missing:
        with pytest.raises(ValueError, match=f"expected name of an instruction set .* got {name}"):
            _C.set_isa(name)
    assert _C.isa() == before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bit_logits", 0),
        ("gate_logits", 0),
        ("scale", 0),
        ("temperature", 0),
        ("weight", 0),
        ("outer", 0),
        ("channels", -1),
        ("inner", 0),
        ("n_bits", 0),
        ("n_bits", 17),
        ("bits", [0, 1, 3]),
        ("bits", [-1, 0, 1]),
        ("bits", [1, 0, 2]),
        ("bits", [1, 1, 2]),
        ("bits", list(range(17))),
        ("dtype", "float64"),
        ("threads", 0),
    ],
    ids=str,
)
def test_argument_that_does_not_fit_is_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^expected {name} .*, got "):
        Problem((2, 3, 5)).forward(**{name: value})


@pytest.mark.parametrize(
    "name",
    ["grad_weight", "bit_logits", "gate_logits", "scale", "temperature"]
    + ["grad_bit_logits", "grad_gate_logits", "grad_scale", "scratch"],
)
def test_missing_address_of_the_backward_pass_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^expected {name} as the address of an array, got 0"):
        Problem((2, 3, 5)).backward(**{name: 0})


def test_size_that_overflows_is_an_error() -> None:
    with pytest.raises(ValueError, match="that fits in memory"):
        Problem((2, 3, 5)).forward(outer=2**40, channels=2**20, inner=2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_on_plain_addresses(isa: str, shape: tuple[int, int, int]) -> None:
    problem = Problem(shape)
    # |W| < 1.5. A sigmoid errs by 0.9e-7 at most, two make a digit; gate, difference, sum and step round once each.
    np.testing.assert_allclose(problem.forward(), problem.exact(), rtol=0, atol=5e-7)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(isa: str, shape: tuple[int, int, int]) -> None:
    problem = Problem(shape)
    expected = [problem.forward(), *problem.backward()]
    for threads in (2, 3, 7):
        actual = [problem.forward(threads=threads), *problem.backward(threads=threads)]
        assert [a.tobytes() for a in actual] == [e.tobytes() for e in expected]


@pytest.mark.parametrize("shape", [(1, 1, 200003), (2, 50, 2003), (1, 22222, 9)], ids=str)
def test_outputs_anywhere_in_memory(isa: str, shape: tuple[int, int, int]) -> None:
    # More than 8 MiB of gradients, so that they are written past the caches, whatever their alignment.
    expected = [Problem(shape, 8).forward(), *Problem(shape, 8).backward()]
    for offset in (1, 3, 8, 15):
        moved = Problem(shape, 8, offset=offset)
        actual = [moved.forward(), *moved.backward()]
        assert [a.tobytes() for a in actual] == [e.tobytes() for e in expected]


def test_advice_about_pages_changes_no_byte() -> None:
    memory = np.arange(2 << 20, dtype=np.float32)
    _C.advise_huge_pages(memory.ctypes.data, memory.nbytes)
    _C.advise_huge_pages(memory.ctypes.data, 1)
    assert (memory == np.arange(2 << 20)).all()


@pytest.mark.parametrize("sizes", [(0, 0, 0), (1, -1, 1), (1 << 40, 1 << 40, 1)], ids=str)
def test_scratch_of_sizes_that_no_weight_has_is_an_error(sizes: tuple[int, int, int]) -> None:
    for size, more in ((_native.module.step_scratch_size, ()), (_native.module.reconstruct_scratch_size, (3,))):
        with pytest.raises(ValueError, match="expected (outer|channels)"):
            size(*sizes, *more)
