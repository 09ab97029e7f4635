"""The order of planes that the GPU kernels read, and the arithmetic of the CUDA kernels on the processor.

The emulation feeds the operands that ``csrc/core/bitserial_words.h`` makes for each thread to matrix instructions as
the PTX manual defines them, so a wrong bit, lane or column shows here.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import BFLOAT16, FLOAT16, FLOAT32, assert_within
from packed_weights import COEFFICIENTS, make_planes, signed
from torch import Tensor

from csq_kernels import _native, reference
from csq_kernels.backends import gpu_planes

SHAPES = [(1, 1), (7, 13), (32, 128), (33, 129), (70, 300), (64, 1030)]
native = pytest.mark.skipif(_native.module is None, reason=str(_native.reason))


@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=str)
@pytest.mark.parametrize("shape", [(33, 129), (5, 3)], ids=str)
def test_untile_gives_the_canonical_planes(coefficients: tuple[int, ...], shape: tuple[int, int]) -> None:
    _, planes = make_planes(coefficients, *shape)
    tiles = gpu_planes.tile(planes, coefficients, shape)
    assert tiles.dtype == torch.uint8 and tiles.shape == gpu_planes.tile_shape(coefficients, shape)
    assert torch.equal(gpu_planes.untile(tiles, coefficients, shape), planes)


@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (5, 0)], ids=str)
def test_untile_of_every_shape(shape: tuple[int, int]) -> None:
    coefficients = signed(3)
    _, planes = make_planes(coefficients, *shape)
    tiles = gpu_planes.tile(planes, coefficients, shape)
    assert torch.equal(gpu_planes.untile(tiles, coefficients, shape), planes)


def test_no_planes() -> None:
    planes = torch.empty(0, 3, dtype=torch.uint8)
    tiles = gpu_planes.tile(planes, (), (4, 6))
    assert tiles.shape == (1, 1, 0)
    assert torch.equal(gpu_planes.untile(tiles, (), (4, 6)), planes)


def test_tile_by_its_diagram() -> None:
    # One weight of each row, the bit that the head of gpu_planes.py says, of a plane in a group of two.
    coefficients, rows, columns = (2, 1), 64, 256
    for row, column, exponent in ((0, 0, 0), (9, 37, 1), (31, 127, 0), (34, 130, 1), (63, 255, 1)):
        bits = torch.zeros(2, rows * columns, dtype=torch.uint8)
        bits[1 - exponent, row * columns + column] = 1
        planes = torch.stack([gpu_planes.bitplanes.pack_bits(plane) for plane in bits])
        tiles = gpu_planes.tile(planes, coefficients, (rows, columns))
        r, g = row % 32 // 8, row % 8
        t, i, c = column % 128 // 32, column % 32 // 4, column % 4
        word, lane = 2 * r + exponent, 4 * g + t
        byte = 512 * (word // 4) + 16 * lane + 4 * (word % 4) + (0, 2, 1, 3)[c]
        assert tiles.count_nonzero() == 1
        assert tiles[row // 32, column // 128, byte] == 1 << i


def test_groups_of_adjacent_exponents() -> None:
    groups = gpu_planes.groups((-256, 128, 64, 32, 16, 8, 4, 2, 1))
    assert [(g.first, g.planes, g.exponent, g.offset) for g in groups] == [(0, 8, 1, 128), (8, 1, 0, 0)]
    groups = gpu_planes.groups((-64, 32, -8, 4, 1))
    assert [(g.first, g.planes, g.exponent, g.offset) for g in groups] == [(0, 2, 5, 2), (2, 2, 2, 2), (4, 1, 0, 0)]


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_codes_that_a_dtype_holds(dtype: torch.dtype) -> None:
    for planes in range(1, 18):
        codes = torch.arange(1 - (1 << planes), 1 << planes, dtype=torch.int32)
        unsigned = tuple(1 << bit for bit in reversed(range(planes)))
        assert gpu_planes.exact_in(dtype, unsigned) == torch.equal(codes.to(dtype).double(), codes.double())


def padded(input: Tensor, columns: int) -> Tensor:
    return F.pad(input, (0, -columns % gpu_planes.COLUMNS))


def emulate(
    input: Tensor,
    steps: Tensor | None,
    planes: Tensor,
    coefficients: tuple[int, ...],
    step: Tensor,
    bias: Tensor | None,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """``cuda_bitserial_linear`` for an input as the kernels read it."""
    tiles = gpu_planes.tile(planes, coefficients, shape)
    groups = [(g.first, g.planes, g.exponent, g.offset) for g in gpu_planes.groups(coefficients)]
    batch = input.shape[0]
    output = torch.full((batch, shape[0]), torch.nan, dtype=dtype)
    partial = torch.full((batch, shape[0]), torch.nan)
    _native.module.emulate_cuda_bitserial_linear(
        tiles.data_ptr(),
        input.data_ptr(),
        0 if steps is None else steps.data_ptr(),
        step.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        partial.data_ptr(),
        output.data_ptr(),
        batch,
        shape[0],
        tiles.shape[1],
        len(coefficients),
        groups,
        str(input.dtype).removeprefix("torch."),
        str(dtype).removeprefix("torch."),
        step.ndim == 1,
    )
    return output


def quantized(input: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """What ``bitserial_prepare_kernel`` makes of an input in ``int8``."""
    blocks = padded(input, columns).unflatten(-1, (-1, gpu_planes.COLUMNS))
    codes, step = reference.quantize(blocks.float(), reference.ELEMENT_LIMIT["int8"])
    in_bytes = codes.to(torch.int8).unflatten(-1, (-1, 4))[..., [0, 2, 1, 3]].flatten(1).contiguous()
    steps = F.pad(step[..., 0], (0, 0, 0, -len(input) % gpu_planes.PASS_ROWS)).unflatten(0, (-1, gpu_planes.PASS_ROWS))
    return in_bytes, steps.transpose(1, 2).contiguous()


@native
@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=str)
@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32])
@pytest.mark.parametrize("sign", ["mixed", "positive"])
@pytest.mark.parametrize("batch", [5, 11])
def test_emulated_product_is_exact(coefficients: tuple[int, ...], dtype: torch.dtype, sign: str, batch: int) -> None:
    rows, columns = 70, 300
    codes, planes = make_planes(coefficients, rows, columns)
    # Integers of at most 3 bits: every sum is a float32 number, so the product is either right or wrong.
    input = torch.randint(-3, 4, (batch, columns)).to(dtype)
    input = input.abs() if sign == "positive" else input
    fits = codes.abs().sum(1).max() * 3 + gpu_planes.largest_code(coefficients) * 3 * 128 < 1 << 23
    expected = input.double() @ codes.double().T
    actual = emulate(
        padded(input, columns), None, planes, coefficients, torch.tensor(1.0), None, (rows, columns), FLOAT32
    )
    if fits:
        assert torch.equal(actual.double(), expected)
    else:
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@native
@pytest.mark.parametrize("coefficients", [c for c in COEFFICIENTS if max(map(abs, c)) < 256], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_emulated_product_is_as_good_as_pytorch(
    coefficients: tuple[int, ...], dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    rows, columns = shape
    codes, planes = make_planes(coefficients, rows, columns)
    step, bias = torch.rand(rows) + 0.1, torch.randn(rows)
    input = torch.randn(17, columns).to(dtype)
    exact = input.double() @ codes.double().T * step.double() + bias.double()
    eager = reference.bitserial_linear(input, planes, step, bias, coefficients, shape, "exact")
    actual = emulate(padded(input, columns), None, planes, coefficients, step, bias, shape, dtype)
    assert_within(actual, exact, eager)


@native
@pytest.mark.parametrize("planes_of_weight", [1, 4, 8])
@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32])
def test_emulated_product_with_a_long_row_of_positive_inputs(planes_of_weight: int, dtype: torch.dtype) -> None:
    # Where an offset costs most: it adds up along the row, and the sum of the codes does not.
    coefficients, shape = signed(planes_of_weight), (32, 8192)
    codes, planes = make_planes(coefficients, *shape)
    step = torch.tensor(0.01)
    input = torch.rand(8, shape[1]).to(dtype)
    exact = input.double() @ codes.double().T * step.double()
    eager = reference.bitserial_linear(input, planes, step, None, coefficients, shape, "exact")
    assert_within(emulate(input, None, planes, coefficients, step, None, shape, dtype), exact, eager)


@native
@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=str)
@pytest.mark.parametrize("batch", [5, 11])
def test_emulated_product_of_blocks_with_steps_is_exact(coefficients: tuple[int, ...], batch: int) -> None:
    rows, columns = 70, 300
    codes, planes = make_planes(coefficients, rows, columns)
    input = padded(torch.randint(-1, 2, (batch, columns)).half(), columns)
    exponents = torch.randint(-2, 3, (1, input.shape[1] // gpu_planes.COLUMNS, gpu_planes.PASS_ROWS))
    steps = 2.0**exponents
    scaled = input.double().unflatten(1, (-1, gpu_planes.COLUMNS)) * steps[0, :, :batch].T[..., None]
    expected = scaled.flatten(1)[:, :columns] @ codes.double().T
    actual = emulate(input, steps, planes, coefficients, torch.tensor(1.0), None, (rows, columns), FLOAT32)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@native
@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=str)
@pytest.mark.parametrize("case", ["random", "lowest", "highest"])
def test_emulated_integers_agree_with_the_reference(coefficients: tuple[int, ...], case: str) -> None:
    shape, batch = (70, 300), 19
    _, planes = make_planes(coefficients, *shape)
    input = torch.randn(batch, shape[1])
    if case != "random":
        for plane, coefficient in zip(planes, coefficients, strict=True):
            plane.fill_(255 if (coefficient < 0) == (case == "lowest") else 0)
        input = input.sign()
    step = torch.rand(shape[0])
    values, steps = quantized(input, shape[1])
    actual = emulate(values, steps, planes, coefficients, step, None, shape, FLOAT32)
    exact = reference.bitserial_linear(input.double(), planes, step, None, coefficients, shape, "int8")
    # Integers are exact within a block; roundings are of sums of at most this size, one a block, warp and group.
    most = input.abs().sum(1, dtype=torch.float64)[:, None] * gpu_planes.largest_code(coefficients) * step.double()
    assert ((actual.double() - exact).abs() <= 4 * torch.finfo(FLOAT32).eps * most).all()


@native
@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_emulated_integers_of_an_input_that_is_not_finite(value: float) -> None:
    coefficients, shape = signed(4), (33, 140)
    _, planes = make_planes(coefficients, *shape)
    input = torch.randn(3, shape[1])
    input[1, 5] = value
    actual = emulate(*quantized(input, shape[1]), planes, coefficients, torch.tensor(1.0), None, shape, FLOAT32)
    assert actual[1].isnan().all() and actual[[0, 2]].isfinite().all()


@native
@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=str)
@pytest.mark.parametrize("tiled, axis", [(False, None), (False, 0), (False, 1), (True, None), (True, 0)])
def test_emulated_weight_is_equal(coefficients: tuple[int, ...], tiled: bool, axis: int | None) -> None:
    shape = (37, 133)
    _, planes = make_planes(coefficients, *shape)
    step = torch.tensor(0.3) if axis is None else torch.rand(shape[axis])
    source = gpu_planes.tile(planes, coefficients, shape) if tiled else planes
    weight = torch.full(shape, torch.nan)
    layout = (1, *shape) if tiled or axis == 0 else (*shape, 1)
    groups = [(g.first, g.planes, g.exponent, g.offset) for g in gpu_planes.groups(coefficients)]
    blocks = source.shape[1] if tiled else 0
    arguments = (source.data_ptr(), step.data_ptr(), weight.data_ptr(), *layout, blocks, list(coefficients), groups)
    _native.module.emulate_cuda_bitserial_weight(*arguments, "float32", axis is not None)
    assert torch.equal(weight, reference.bitserial_weight(planes, step, coefficients, shape, axis or 0))


@native
def test_native_functions_refuse_bad_arguments() -> None:
    values = torch.zeros(4096)
    good = [values.data_ptr()] * 7 + [1, 32, 1, 2, [(0, 2, 0, 2)], "float32", "float32", False]
    for index, bad, message in (
        (0, values.data_ptr() + 4, "tiles"),
        (0, 0, "tiles"),
        (7, 0, "batch"),
        (8, 1 << 60, "rows"),
        (10, 3, "groups"),
        (11, [(0, 9, 0, 0)], "groups"),
        (11, [(1, 2, 0, 0)], "groups"),
        (11, [(0, 2, 16, 0)], "groups"),
        (11, [(0, 2, 0, 4)], "groups"),
        (12, "float64", "arithmetic"),
        (13, "float64", "dtype"),
    ):
        with pytest.raises(ValueError, match=f"expected {message}"):
            _native.module.emulate_cuda_bitserial_linear(*good[:index], bad, *good[index + 1 :])
