"""The arithmetic and the tiling of the CUDA kernels, compiled for the processor from the very headers."""

import ctypes
import itertools
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import BFLOAT16, FLOAT64, Case, assert_within, exact_outputs, pool

from csq_kernels import reference

SOURCE = Path(__file__).parent / "cuda_on_cpu.cpp"
UNIT = 2.0**-24
# The bounds that core/soft_bits.h states.
SOFT_BIT_BOUND = 4.2 * UNIT
DIGIT_BOUND = 8.4 * UNIT + 2.0**-63


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("c++ is not on PATH")
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "cuda_on_cpu.so"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, f"-I{SOURCE.parents[1] / 'csrc'}", SOURCE, "-o", library], check=True)
    return ctypes.CDLL(str(library))


def address(array: np.ndarray) -> ctypes.c_void_p:
    assert array.flags.c_contiguous
    return ctypes.c_void_p(array.ctypes.data)


def digits(compiled: ctypes.CDLL, temperature: float, positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    result = np.full_like(positive, np.nan)
    arrays = map(address, (positive, negative, result))
    compiled.digits(ctypes.c_int64(result.size), ctypes.c_float(temperature), *arrays)
    return result


def soft_bits(compiled: ctypes.CDLL, temperature: float, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    bits, slopes = np.full_like(logits, np.nan), np.full_like(logits, np.nan)
    compiled.soft_bits(ctypes.c_int64(logits.size), ctypes.c_float(temperature), *map(address, (logits, bits, slopes)))
    return bits, slopes


def sigmoid(temperature: float, logits: np.ndarray) -> np.ndarray:
    arguments = float(np.float32(temperature)) * logits.astype(np.float64)
    return 1 / (1 + np.exp(-np.clip(arguments, -700, 700)))


def every_logit(temperature: float) -> np.ndarray:
    """Logits over the range in which a bit is undecided, densely, and beyond it to the ends of float32."""
    undecided = np.linspace(-110, 110, 200_001) / temperature
    magnitudes = np.concatenate([np.logspace(-45, 38, 1000), [1e30, 3.4e38, np.inf, 0.0]])
    return np.concatenate([undecided, magnitudes, -magnitudes]).astype(np.float32)


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 30.0, 200.0, 1e4])
@pytest.mark.parametrize("seed", range(3))
def test_soft_bits_and_slopes_keep_their_bounds(compiled: ctypes.CDLL, seed: int, temperature: float) -> None:
    compiled.seed(ctypes.c_uint32(seed))
    logits = every_logit(temperature)
    bits, slopes = soft_bits(compiled, temperature, logits)
    exact = sigmoid(temperature, logits)
    assert np.abs(bits - exact).max() <= SOFT_BIT_BOUND
    # P (1 - P) moves at most as much as P does, and is rounded once.
    assert np.abs(slopes - exact * (1 - exact)).max() <= SOFT_BIT_BOUND + UNIT / 4
    decided = np.abs(temperature * logits.astype(np.float64)) > 90
    assert decided.any()
    assert np.array_equal(bits[decided], (logits > 0)[decided])
    assert not slopes[decided].any()


@pytest.mark.parametrize("temperature", [1e-3, 1.0, 30.0, 200.0, 1e4])
@pytest.mark.parametrize("seed", range(3))
def test_digits_keep_their_bound(compiled: ctypes.CDLL, seed: int, temperature: float) -> None:
    compiled.seed(ctypes.c_uint32(seed))
    logits = every_logit(temperature)
    shuffled = np.random.default_rng(seed).permutation(logits)
    ends = np.array([1e30, -1e30, np.inf, -np.inf, 3.4e38, -3.4e38, 1e-40, -1e-45, 0.0], dtype=np.float32)
    pairs = np.array(list(itertools.product(ends, ends)), dtype=np.float32)
    positive = np.concatenate([logits, logits, pairs[:, 0]])
    negative = np.concatenate([shuffled, logits, pairs[:, 1]])
    actual = digits(compiled, temperature, positive, negative)
    exact = sigmoid(temperature, positive) - sigmoid(temperature, negative)
    assert np.abs(actual - exact).max() <= DIGIT_BOUND
    arguments = temperature * np.stack([positive, negative]).astype(np.float64)
    integers = (positive > 0).astype(np.float32) - (negative > 0).astype(np.float32)
    # Exponentials that are not 0 yet show where the digit is 0 only.
    for least, decided in ((44, integers != 0), (88, integers == 0)):
        decided &= (np.abs(arguments) > least).all(0)
        assert decided.sum() > 1000
        assert np.array_equal(actual[decided], integers[decided])


def test_nan_stays_where_it_is(compiled: ctypes.CDLL) -> None:
    nan, one, end = np.float32(np.nan), np.float32(1), np.float32(1e30)
    positive = np.array([nan, one, nan, nan, end, -end, one], dtype=np.float32)
    negative = np.array([one, nan, end, -end, nan, nan, one], dtype=np.float32)
    assert np.isnan(digits(compiled, 30.0, positive, negative)).tolist() == [True] * 6 + [False]
    for values in soft_bits(compiled, 30.0, positive):
        assert np.array_equal(np.isnan(values), np.isnan(positive))


@pytest.mark.parametrize("n_bits", [1, 3, 8])
@pytest.mark.parametrize("temperature", [1.0, 30.0, 200.0])
@pytest.mark.parametrize("dtype", [torch.float32, BFLOAT16], ids=str)
def test_weight_within_the_error_of_pytorch(
    compiled: ctypes.CDLL, dtype: torch.dtype, temperature: float, n_bits: int
) -> None:
    case = Case((61, 67), tuple(range(n_bits)), n_bits, temperature, dtype=dtype)
    every = []
    for seed in range(4):
        arguments = case.arguments(seed)
        powers = 2.0 ** np.arange(n_bits) * sigmoid(temperature, arguments.gate_logits.numpy())
        total = np.zeros(case.shape, dtype=np.float32)
        for power, positive, negative in zip(powers, *arguments.bit_logits.float().numpy(), strict=True):
            total += np.float32(power) * digits(compiled, temperature, positive, negative)
        step = arguments.scale.numpy() / np.float32(2**n_bits - 1)
        weight = torch.from_numpy(step * total).to(dtype)
        exact = exact_outputs(arguments, case.grad_weight(seed))[0]
        every.append((weight, exact, reference.reconstruct(*arguments)))
    actual, exact, eager = pool(every)
    assert exact.dtype == FLOAT64
    assert_within(actual, exact, eager)


class Tiles:
    """The tiling of one shape for accesses of ``width`` elements, as the kernels see it."""

    def __init__(self, compiled: ctypes.CDLL, shape: tuple[int, int, int]) -> None:
        self.compiled = compiled
        self.layout = (*map(ctypes.c_int64, shape), ctypes.c_int(4 if shape[2] % 4 == 0 else 1))
        sizes = np.zeros(4, dtype=np.int64)
        compiled.tile(*self.layout, address(sizes))
        self.blocks, self.accesses, self.summed_rows, self.column_blocks = sizes.tolist()

    def walk(self, first: int, last: int, *counts: np.ndarray) -> tuple[int, int]:
        """Least and greatest access of the blocks from ``first`` to ``last``; their visits and slots are counted."""
        ends = np.array([self.accesses, -1], dtype=np.int64)
        addresses = [address(ends[:1]), address(ends[1:]), *(map(address, counts) if counts else (None, None))]
        self.compiled.walk.restype = ctypes.c_int64
        strays = self.compiled.walk(*self.layout, ctypes.c_uint32(first), ctypes.c_uint32(last), *addresses)
        assert strays == 0
        return ends[0], ends[1]


SHAPES = [
    (1, 1, 1),
    (1, 1, 5000),
    (1, 1, 4_000_004),
    (1, 3000, 1),
    (1, 64, 27),
    (1, 300, 4 * 293),
    (1, 2000, 1000),
    (1000, 7, 9),
    (3000, 500, 1),
    (700, 3, 1),
    (5, 255, 4),
    (5, 257, 4),
    (2, 3, 90_000),
    (900, 130, 64),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_weight_has_one_thread_that_stays_in_its_channel(
    compiled: ctypes.CDLL, shape: tuple[int, int, int]
) -> None:
    tiles = Tiles(compiled, shape)
    assert tiles.summed_rows % shape[1] == 0
    visits = np.zeros(tiles.accesses, dtype=np.int32)
    slots = np.zeros((tiles.summed_rows, tiles.column_blocks), dtype=np.int32)
    tiles.walk(0, tiles.blocks - 1, visits, slots)
    assert (visits == 1).all()
    assert slots.max() == 1


@pytest.mark.parametrize(
    "shape", [(1, 1, 2**33), (1, 2**31 + 8, 4), (2**20 + 1, 2**12, 1), (1, 3, 2**31 + 4), (2**31 + 1, 1, 4)], ids=str
)
def test_more_than_two_to_the_31_elements(compiled: ctypes.CDLL, shape: tuple[int, int, int]) -> None:
    tiles = Tiles(compiled, shape)
    assert 0 < tiles.blocks < 2**31
    last = tiles.blocks - 1
    assert tiles.walk(last - 64, last)[1] == tiles.accesses - 1
    for block in (0, last // 3, last // 2):
        least, most = tiles.walk(block, block)
        assert 0 <= least <= most < tiles.accesses


def test_sums_take_little_memory(compiled: ctypes.CDLL) -> None:
    # One fp64 sum per plane and slot, against 2 logits per plane and weight.
    for shape in ((1, 1, 1 << 24), (1, 4096, 4096), (4096, 4096, 1), (512, 512, 9)):
        tiles = Tiles(compiled, shape)
        share = tiles.summed_rows * tiles.column_blocks / math.prod(shape)
        assert share <= 1 / 32, (shape, share)
