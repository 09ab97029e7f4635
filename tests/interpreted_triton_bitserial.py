"""What the Triton kernels on packed weights have to satisfy, on the processor, as ``interpreted_triton.py``."""

import functools

import pytest
import torch
from helpers import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, assert_within
from packed_weights import COEFFICIENTS, make_planes, signed

from csq_kernels import reference
from csq_kernels.backends import gpu_planes, gpu_products, triton_bitserial

# One of each kind that the kernels treat differently, for what is slow.
FEW = [signed(1), signed(4), signed(8), (8, 1), (-64, 32, -8, 4, 1), signed(11)]


@pytest.fixture
def multiply_bfloat16_as_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's matrix product takes the bits of a bfloat16 for an integer."""
    exact_in = gpu_planes.exact_in
    monkeypatch.setattr(gpu_planes, "exact_in", lambda dtype, k: dtype != BFLOAT16 and exact_in(dtype, k))


@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=str)
def test_weight_is_equal(coefficients: tuple[int, ...], poisoned: None) -> None:
    shape = (37, 133)
    _, planes = make_planes(coefficients, *shape)
    tiles = gpu_planes.tile(planes, coefficients, shape)
    for step, axis in ((torch.tensor(0.3), 0), (torch.rand(37), 0), (torch.rand(133), 1)):
        expected = reference.bitserial_weight(planes, step, coefficients, shape, axis)
        for source in (planes, tiles):
            assert torch.equal(triton_bitserial.bitserial_weight(source, step, coefficients, shape, axis), expected)


@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=str)
def test_product_with_integers_is_exact(coefficients: tuple[int, ...], poisoned: None) -> None:
    shape = (35, 140)
    codes, planes = make_planes(coefficients, *shape)
    tiles = gpu_planes.tile(planes, coefficients, shape)
    input = torch.randint(-1, 2, (3, shape[1])).float()
    output = triton_bitserial.bitserial_linear(input, tiles, torch.tensor(1.0), None, coefficients, shape, "exact")
    assert torch.equal(output.double(), input.double() @ codes.double().T)


@pytest.mark.parametrize("coefficients", FEW, ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
@pytest.mark.parametrize("batch", [1, 16, 17])
def test_within_the_error_of_pytorch(
    coefficients: tuple[int, ...],
    dtype: torch.dtype,
    batch: int,
    poisoned: None,
    multiply_bfloat16_as_float32: None,
) -> None:
    shape = (70, 300)
    codes, planes = make_planes(coefficients, *shape)
    tiles = gpu_planes.tile(planes, coefficients, shape)
    step, bias = (torch.rand(shape[0]) + 0.1) / gpu_planes.largest_code(coefficients), torch.randn(shape[0])
    input = torch.randn(batch, shape[1]).to(dtype)
    exact = input.double() @ codes.double().T * step.double() + bias.double()
    eager = reference.bitserial_linear(input, planes, step, bias, coefficients, shape, "exact")
    for precision in ("exact", "high"):
        output = triton_bitserial.bitserial_linear(input, tiles, step, bias, coefficients, shape, precision)
        assert_within(output, exact, eager)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16])
def test_more_rows_than_passes(dtype: torch.dtype, with_bias: bool, poisoned: None) -> None:
    # Codes of 13 bits are not exact in halves, whose product with them needs a GPU.
    shape, coefficients = (70, 300), signed(13)
    codes, planes = make_planes(coefficients, *shape)
    step = (torch.rand(shape[0]) + 0.1) / gpu_planes.largest_code(coefficients)
    bias = torch.randn(shape[0]) if with_bias else None
    input = torch.randn(5, 4, shape[1]).to(dtype)
    exact = input.double() @ codes.double().T * step.double() + (0 if bias is None else bias.double())
    arguments = (input, planes, step, bias, coefficients, shape, "exact")
    never = functools.partial(pytest.fail, "a pass over the planes")
    output = gpu_products.linear(triton_bitserial._decode, never, 0, *arguments)
    assert_within(output, exact, reference.bitserial_linear(*arguments))


@pytest.mark.parametrize("coefficients", FEW, ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_integers_agree_with_the_reference(coefficients: tuple[int, ...], dtype: torch.dtype, poisoned: None) -> None:
    shape = (70, 300)
    _, planes = make_planes(coefficients, *shape)
    tiles = gpu_planes.tile(planes, coefficients, shape)
    step = torch.rand(shape[0]) / gpu_planes.largest_code(coefficients)
    input = torch.randn(5, shape[1]).to(dtype)
    input[4] = 0
    actual = triton_bitserial.bitserial_linear(input, tiles, step, None, coefficients, shape, "int8")
    exact = reference.bitserial_linear(input.to(FLOAT64), planes, step, None, coefficients, shape, "int8")
    if dtype == FLOAT32:
        # Roundings are of sums of at most this size, one a block.
        most = input.abs().sum(1, dtype=FLOAT64)[:, None] * gpu_planes.largest_code(coefficients) * step.double()
        assert ((actual.double() - exact).abs() <= 4 * torch.finfo(FLOAT32).eps * most).all()
    else:
        assert_within(actual, exact, exact.to(dtype))


def test_input_that_is_not_finite() -> None:
    coefficients, shape = signed(3), (33, 140)
    _, planes = make_planes(coefficients, *shape)
    input = torch.randn(4, shape[1])
    input[1, 5], input[2, 139] = torch.inf, torch.nan
    output = triton_bitserial.bitserial_linear(input, planes, torch.tensor(1.0), None, coefficients, shape, "int8")
    assert output[1:3].isnan().all() and output[[0, 3]].isfinite().all()


@pytest.mark.parametrize("bias", [None, torch.tensor([1.0, 2.0, 3.0])])
def test_no_planes(bias: torch.Tensor | None) -> None:
    planes = torch.empty(0, 2, dtype=torch.uint8)
    for source in (planes, gpu_planes.tile(planes, (), (3, 4))):
        output = triton_bitserial.bitserial_linear(
            torch.ones(2, 4), source, torch.tensor(1.0), bias, (), (3, 4), "exact"
        )
        assert output.tolist() == [[0.0] * 3 if bias is None else bias.tolist()] * 2
    weight = triton_bitserial.bitserial_weight(planes, torch.tensor(1.0), (), (3, 4), 0)
    assert torch.equal(weight, torch.zeros(3, 4))


@pytest.mark.parametrize("batch, rows, columns", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_compute(batch: int, rows: int, columns: int) -> None:
    coefficients = (2, 1)
    _, planes = make_planes(coefficients, rows, columns)
    input = torch.ones(batch, columns)
    output = triton_bitserial.bitserial_linear(
        input, planes, torch.tensor(1.0), None, coefficients, (rows, columns), "exact"
    )
    assert torch.equal(output, torch.zeros(batch, rows))


@pytest.mark.parametrize("precision", ["exact", "high", "int8"])
@pytest.mark.parametrize("coefficients", [signed(3), (8, 1)], ids=str)
def test_conv2d(precision: str, coefficients: tuple[int, ...]) -> None:
    shape = (6, 5, 3, 3)
    _, planes = make_planes(coefficients, 6, 45)
    step, bias, input = torch.rand(6), torch.randn(6), torch.randn(2, 5, 9, 7)
    arguments = (planes, step, bias, coefficients, shape, (2, 1), (1, 0), (1, 2), 1)
    exact = reference.bitserial_conv2d(input.double(), *arguments, precision if precision == "int8" else "exact")
    eager = reference.bitserial_conv2d(input, *arguments, "exact")
    actual = triton_bitserial.bitserial_conv2d(input, *arguments, precision)
    if precision == "int8":
        torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))
    else:
        assert_within(actual, exact, eager)
