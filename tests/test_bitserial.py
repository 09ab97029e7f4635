"""Products with packed weights: every instruction set from the same bytes, against float64 and in integers."""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from helpers import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, assert_within
from packed_weights import make_planes
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from csq_kernels import _native, backends, bitplanes, functional, reference

ISAS = ("scalar", "avx2", "avx512", "avx512_vnni", "avx512_vbmi")
PRECISIONS = ("exact", "high", "int8")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    if _native.module is None:
        pytest.skip(_native.reason)
    if request.param not in _native.module.supported_isas():
        pytest.skip(f"this processor has no {request.param}")
    _native.module.set_isa(request.param)
    return request.param


@dataclass(frozen=True)
class Packed:
    """A weight whose digits at the exponents ``active`` are random."""

    shape: tuple[int, ...]
    active: tuple[int, ...]
    per_channel: bool = True

    def __str__(self) -> str:
        words = ["x".join(map(str, self.shape)), "bits" + ".".join(map(str, self.active))]
        return "-".join(words + ["channel"] * self.per_channel)

    @property
    def op(self) -> str:
        return "bitserial_linear" if len(self.shape) == 2 else "bitserial_conv2d"

    def codes(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        codes = torch.zeros(self.shape, dtype=torch.int32)
        for bit in self.active:
            codes += torch.randint(-1, 2, self.shape, generator=generator, dtype=torch.int32) << bit
        return codes

    def step(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed + 1)
        return 0.1 + torch.rand([self.shape[0]] * self.per_channel, generator=generator)

    def planes(self, seed: int = 0) -> tuple[Tensor, tuple[int, ...]]:
        return bitplanes.encode(self.codes(seed), self.active)

    def tiles(self, seed: int = 0) -> tuple[Tensor, tuple[int, ...]]:
        planes, coefficients = self.planes(seed)
        return backends.tile(self.op, planes, coefficients, self.shape), coefficients

    def weight(self, seed: int = 0) -> Tensor:
        step = reference.along_channel(self.step(seed), len(self.shape), 0)
        return self.codes(seed).to(FLOAT32) * step


def widths(shape: tuple[int, ...]) -> list[Packed]:
    return [Packed(shape, tuple(range(n))) for n in range(1, 17)]


GAPS = [(3,), (15,), (0, 2), (0, 3), (0, 3, 7), (0, 5, 6, 12), (2, 3, 4, 8, 9), (0, 15), (1, 2, 3, 4, 5, 6, 7, 12), ()]
CASES = [
    *widths((67, 131)),
    *(Packed((67, 131), active) for active in GAPS),
    *(
        Packed(shape, (0, 1, 2), per_channel)
        for shape in ((1, 1), (1, 300), (3, 4), (63, 127), (64, 128), (65, 129), (17, 1000), (130, 5), (200, 64))
        for per_channel in (False, True)
    ),
]


def test_codes_and_tiles_are_lossless() -> None:
    for case in CASES:
        planes, coefficients = case.planes()
        assert torch.equal(bitplanes.decode(planes, coefficients, case.shape), case.codes())
        tiles = backends.tile(case.op, planes, coefficients, case.shape)
        assert (tiles.ndim > 2) == (_native.module is not None)
        assert torch.equal(backends.untile(case.op, tiles, coefficients, case.shape), planes)


@pytest.mark.parametrize("case", [*CASES, Packed((37, 5, 3, 2), (0, 1, 4)), Packed((5, 8, 1, 1), (0,))], ids=str)
def test_weight_is_the_hard_weight_bit_for_bit(isa: str, case: Packed, poisoned: None) -> None:
    tiles, coefficients = case.tiles()
    weight = functional.bitserial_weight(tiles, case.step(), coefficients, case.shape)
    assert weight.is_contiguous()
    assert torch.equal(weight, case.weight())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("signs", [*itertools.product((1, -1), repeat=2)], ids=str)
def test_two_planes_of_any_distance_and_sign(isa: str, signs: tuple[int, int], precision: str) -> None:
    for exponent in range(1, 17):
        coefficients = (signs[0] << exponent, signs[1])
        codes, planes = make_planes(coefficients, 64, 128)
        weight = {"coefficients": coefficients, "weight_shape": codes.shape}
        tiles = backends.tile("bitserial_linear", planes, **weight)
        for inputs in torch.eye(128).split((1, 2, 125)):
            outputs = functional.bitserial_linear(inputs, tiles, torch.tensor(1.0), precision=precision, **weight)
            torch.testing.assert_close(outputs, inputs @ codes.T.float(), rtol=1e-6, atol=0)


def judged(case: Packed, input: Tensor, bias: Tensor, precision: str, **options) -> tuple[Tensor, Tensor]:
    """The product in float64, and as plain PyTorch has it in float32, of what the precision makes of the input."""
    codes, step = case.codes(), case.step()
    if precision != "exact" and case.op == "bitserial_linear":
        integers, steps = reference.quantize_rows(input, precision)
        exact_input = (integers.double() * steps.double()).flatten(1)[:, : input.shape[1]]
    elif precision != "exact" and not reference.always_exact(case.shape, 1):
        integers, steps = reference.quantize(input.flatten(1), reference.ELEMENT_LIMIT[precision])
        exact_input = (integers.double() * steps.double()).view(input.shape)
    else:
        exact_input = input.double()
    product = F.linear if case.op == "bitserial_linear" else F.conv2d
    axes = len(case.shape) - 2
    step64 = reference.along_channel(step.double(), axes + 1, 0) if axes else step.double()
    exact = product(exact_input, codes.double(), **options) * step64 + bias.double().view(-1, *[1] * axes)
    return exact, product(exact_input.float(), case.weight(), bias, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_linear(isa: str, case: Packed, precision: str, poisoned: None) -> None:
    rows, columns = case.shape
    tiles, coefficients = case.tiles()
    for batch in (1, 2, 3, 8, 97):
        results = []
        # Of a few outputs the largest error is a matter of luck.
        for _ in range(min(40, -(-1000 // (batch * rows)))):
            input, bias = torch.randn(batch, columns), torch.randn(rows)
            output = functional.bitserial_linear(
                input, tiles, case.step(), bias, coefficients=coefficients, weight_shape=case.shape, precision=precision
            )
            results.append((output, *judged(case, input, bias, precision)))
        assert_within(*map(torch.cat, zip(*results, strict=True)), name=f"batch {batch}")


@pytest.mark.parametrize("precision, allowed", [("high", 5e-5), ("int8", 1e-2)])
@pytest.mark.parametrize("batch", [1, 2, 3, 16])
def test_error_of_the_quantized_input(isa: str, precision: str, allowed: float, batch: int) -> None:
    for bits in range(1, 9):
        case = Packed((256, 1024), tuple(range(bits)))
        tiles, coefficients = case.tiles()
        input = torch.randn(batch, 1024)
        output = functional.bitserial_linear(
            input, tiles, case.step(), coefficients=coefficients, weight_shape=case.shape, precision=precision
        )
        exact = F.linear(input.double(), case.codes().double()) * case.step().double()
        assert (output - exact).norm() <= allowed * exact.norm()


def extreme_inputs(precision: str, batch: int) -> Tensor:
    """Rows at the limits of what quantization lets through, with a step of exactly 1."""
    if batch > reference.TABLE_BATCH:
        most = reference.ELEMENT_LIMIT[precision]
        groups = [[most] * 4, [-most] * 4, [most, -most, most, -most], [0, 0, 0, most]]
    else:
        most = reference.GROUP_LIMIT[precision]
        part = most // 4
        last = most - 3 * part
        groups = [[part, part, part, last], [-part, -part, -part, -last], [part, -part, part, -part]]
        # An element may be as large as the group where nothing else limits it.
        largest = most if precision == "int8" else reference.ELEMENT_LIMIT[precision]
        groups += [[0, largest, 0, 0], [-largest, 0, 0, 0]]
    rows = [torch.tensor(groups[i % len(groups)]).repeat(75) for i in range(batch)]
    rows = [row + 0.0 for row in rows]
    for row in rows:
        for block in range(0, 300, reference.TABLE_BLOCK):
            row[block : block + 4] = torch.tensor(groups[0])
    return torch.stack(rows)


@pytest.mark.parametrize("precision", ["high", "int8"])
@pytest.mark.parametrize("batch", [1, 2, 3, 13])
def test_integer_bounds_hold_for_every_width(isa: str, precision: str, batch: int) -> None:
    input = extreme_inputs(precision, batch)
    for planes in range(1, 18):
        low, high = (-(1 << (planes - 1)), (1 << (planes - 1)) - 1) if planes > 1 else (0, 1)
        if planes == 17:
            low = 1 - (1 << 16)
        codes = torch.full((70, 300), high, dtype=torch.int32)
        codes[::2] = low
        codes[3::5] = torch.where(torch.arange(300) % 2 == 0, low, high).to(torch.int32)
        stored, coefficients = bitplanes.encode(codes)
        tiles = backends.tile("bitserial_linear", stored, coefficients, codes.shape)
        output = functional.bitserial_linear(
            input, tiles, torch.tensor(1.0), coefficients=coefficients, weight_shape=codes.shape, precision=precision
        )
        integers, steps = reference.quantize_rows(input, precision)
        exact = F.linear((integers.double() * steps.double()).flatten(1)[:, :300], codes.double())
        eager = F.linear((integers * steps).flatten(1)[:, :300], codes.float())
        assert_within(output, exact, eager, name=f"{planes} planes")


CONVOLUTIONS = [
    (Packed((16, 3, 3, 3), (0, 1, 2)), (2, 3, 9, 7), {"padding": (1, 1)}),
    (Packed((70, 16, 3, 3), (0, 1, 2, 3)), (1, 16, 12, 13), {"padding": (1, 1), "stride": (2, 2)}),
    (Packed((4, 5, 1, 1), (0, 1)), (3, 5, 5, 5), {}),
    (Packed((33, 7, 5, 3), (0, 3, 7)), (1, 7, 14, 11), {"stride": (2, 1), "padding": (2, 0), "dilation": (1, 2)}),
    (Packed((64, 40, 3, 3), tuple(range(8))), (2, 40, 8, 8), {"padding": (1, 1)}),
    (Packed((5, 2, 2, 2), tuple(range(12))), (1, 2, 2, 2), {}),
    (Packed((32, 4, 3, 3), (1, 2)), (3, 4, 30, 31), {"padding": (1, 1)}),
    (Packed((9, 4, 1, 3), ()), (1, 4, 1, 17), {}),
    (Packed((1, 1, 1, 1), (0,), False), (1, 1, 1, 1), {}),
]


@pytest.mark.parametrize("case, shape, options", CONVOLUTIONS, ids=[str(c[0]) for c in CONVOLUTIONS])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_conv2d(isa: str, case: Packed, shape: tuple[int, ...], options: dict, precision: str, poisoned: None) -> None:
    tiles, coefficients = case.tiles()
    input, bias = torch.randn(shape), torch.randn(case.shape[0])
    output = functional.bitserial_conv2d(
        input,
        tiles,
        case.step(),
        bias,
        coefficients=coefficients,
        weight_shape=case.shape,
        precision=precision,
        **options,
    )
    exact, eager = judged(case, input, bias, precision, **options)
    assert output.is_contiguous()
    assert_within(output, exact, eager)


LINEAR = Packed((70, 300), (0, 1, 2))


def linear(input: Tensor, precision: str = "exact", case: Packed = LINEAR, **options) -> Tensor:
    tiles, coefficients = case.tiles()
    return functional.bitserial_linear(
        input, tiles, case.step(), coefficients=coefficients, weight_shape=case.shape, precision=precision, **options
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_result_depends_neither_on_the_threads_nor_on_the_others_at_work(isa: str, precision: str) -> None:
    for batch in (1, 5, 200):
        input = torch.randn(batch, 300)
        torch.set_num_threads(1)
        expected = linear(input, precision)
        for threads in (2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(linear(input, precision), expected)
        with ThreadPoolExecutor(8) as pool:
            for output in pool.map(linear, [input] * 24, [precision] * 24):
                assert torch.equal(output, expected)


@pytest.mark.parametrize("precision", ["high", "int8"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_row(isa: str, precision: str, value: float) -> None:
    for batch in (2, 4):
        input = torch.randn(batch, 300)
        expected = linear(input, precision)
        input[1, 200] = value
        output = linear(input, precision)
        assert output[1].isnan().all()
        rest = [m for m in range(batch) if m != 1]
        assert torch.equal(output[rest], expected[rest])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tiny_and_huge_inputs(isa: str, precision: str) -> None:
    for batch, scale in itertools.product((1, 3), (1e-30, 1e30)):
        input = torch.randn(batch, 300)
        output = linear(input * scale, precision).double() / scale
        exact = F.linear(input.double(), LINEAR.codes().double()) * LINEAR.step().double()
        assert (output - exact).norm() <= 1e-2 * exact.norm()
        assert not linear(input * 0, precision).any()


def test_empty_layouts_and_dtypes(isa: str) -> None:
    assert linear(torch.empty(0, 300)).shape == (0, 70)
    assert linear(torch.empty(2, 0, 300), "int8").shape == (2, 0, 70)
    nothing = Packed((4, 0), ())
    assert torch.equal(linear(torch.empty(3, 0), case=nothing, bias=torch.ones(4)), torch.ones(3, 4))
    assert linear(torch.randn(3, 5), case=Packed((0, 5), (0,))).shape == (3, 0)
    input = torch.randn(2, 3, 300)
    for precision in PRECISIONS:
        expected = linear(input, precision)
        assert expected.shape == (2, 3, 70)
        strided = torch.stack([input, input], -1)[..., 0]
        assert torch.equal(linear(strided, precision), expected)
        assert torch.equal(linear(input[0, 0], precision), linear(input[0, :1], precision)[0])
        for dtype in (BFLOAT16, FLOAT16, FLOAT64):
            output = linear(input.to(dtype), precision)
            assert output.dtype == dtype
            expected = linear(input.to(dtype).float(), precision)
            assert (output - expected.to(dtype)).norm() <= max(torch.finfo(dtype).eps, 1e-6) * expected.norm()
    no_bits = Packed((6, 10), ())
    assert torch.equal(linear(torch.randn(3, 10), "int8", no_bits, bias=torch.ones(6)), torch.ones(3, 6))


def test_gradients_are_those_of_the_float_layer() -> None:
    bias = torch.randn(70, requires_grad=True)
    input = torch.randn(5, 300, requires_grad=True)
    grad = torch.randn(5, 70)
    ours = torch.autograd.grad(linear(input, bias=bias), (input, bias), grad)
    theirs = torch.autograd.grad(F.linear(input, LINEAR.weight(), bias), (input, bias), grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    case, shape, options = CONVOLUTIONS[1]
    tiles, coefficients = case.tiles()
    image, bias = torch.randn(shape, requires_grad=True), torch.randn(case.shape[0], requires_grad=True)
    output = functional.bitserial_conv2d(
        image, tiles, case.step(), bias, coefficients=coefficients, weight_shape=case.shape, **options
    )
    grad = torch.randn_like(output)
    ours = torch.autograd.grad(output, (image, bias), grad)
    theirs = torch.autograd.grad(F.conv2d(image, case.weight(), bias, **options), (image, bias), grad)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_opcheck_and_compile(precision: str) -> None:
    tiles, coefficients = LINEAR.tiles()
    arguments = (torch.randn(4, 300), tiles, LINEAR.step(), torch.randn(70), coefficients, LINEAR.shape, precision)
    torch.library.opcheck(torch.ops.csq.bitserial_linear.default, arguments)
    torch._dynamo.reset()
    input, scales = torch.randn(4, 300), LINEAR.step()

    def step(x: Tensor) -> Tensor:
        return functional.bitserial_linear(
            x, tiles, scales, coefficients=coefficients, weight_shape=LINEAR.shape, precision=precision
        ).relu()

    compiled = torch.compile(step, fullgraph=True)
    assert torch.equal(compiled(input), step(input))
    graph = make_fx(step)(input)
    assert torch.ops.csq.bitserial_linear.default in [node.target for node in graph.graph.nodes]
    assert torch.equal(graph(2 * input), step(2 * input))
    case, shape, options = CONVOLUTIONS[0]
    tiles_2d, coefficients_2d = case.tiles()
    pairs = [list(options.get(name, default)) for name, default in (("stride", (1, 1)), ("padding", (0, 0)))]
    convolution = (torch.randn(shape), tiles_2d, case.step(), None, coefficients_2d, case.shape, *pairs, [1, 1], 1)
    torch.library.opcheck(torch.ops.csq.bitserial_conv2d.default, (*convolution, precision))


def test_wrong_arguments_are_named() -> None:
    tiles, coefficients = LINEAR.tiles()
    planes, _ = LINEAR.planes()
    step, input = LINEAR.step(), torch.randn(2, 300)
    valid = {
        "input": input,
        "planes": tiles,
        "step": step,
        "bias": None,
        "coefficients": coefficients,
        "weight_shape": LINEAR.shape,
        "precision": "exact",
    }

    def call(**changes):
        return functional.bitserial_linear(**{**valid, **changes})

    call()
    for change, message in (
        ({"input": torch.randn(2, 299)}, r"expected input of shape \(\.\.\., 300\), got \(2, 299\)"),
        ({"input": torch.ones(2, 300, dtype=torch.int64)}, "expected input of a floating-point dtype"),
        ({"planes": planes[:, :-1]}, "expected planes of shape"),
        ({"planes": tiles[:, :, :-1]}, "expected contiguous planes of shape"),
        ({"planes": tiles.transpose(2, 3)}, "expected contiguous planes of shape"),
        ({"planes": planes.to(torch.int32)}, "expected planes of dtype uint8"),
        ({"step": step[:-1]}, r"expected step of shape \(\) or \(70,\), got \(69,\)"),
        ({"step": step.double()}, "expected step of dtype float32"),
        ({"bias": torch.ones(70, device="meta")}, "expected bias on cpu like planes, got meta"),
        (
            {"planes": torch.cat([tiles.flatten()[:1], tiles.flatten()])[1:].view(tiles.shape)},
            "expected tiles at a mul",
        ),
        ({"bias": torch.ones(71)}, r"expected bias of shape \(70,\), got \(71,\)"),
        ({"coefficients": (8, 4, 2, 3)}, "expected coefficients as plus or minus powers of two"),
        ({"coefficients": (1, 2, 4, 8)}, "falling magnitude"),
        ({"coefficients": (1 << 17, 4, 2, 1)}, "below 2"),
        ({"precision": "int4"}, "expected precision as one of exact, high, int8, got 'int4'"),
        ({"weight_shape": (70, 3, 100)}, "expected weight_shape of 2 axes"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            call(**change)
    with pytest.raises(ValueError, match="expected active exponents from 0 to 15"):
        bitplanes.encode(torch.tensor([1, 2]), active=(1 << 62,))
    with pytest.raises(ValueError, match="expected codes with digits -1, 0, 1"):
        bitplanes.encode(torch.tensor([1, 2]), active=(0,))
    with pytest.raises(ValueError, match="expected codes of magnitude below"):
        bitplanes.encode(torch.tensor([1 << 20]))


def test_planes_that_do_not_fit_their_weight_are_not_put_in_another_order() -> None:
    planes, coefficients = LINEAR.planes()
    tiles, _ = LINEAR.tiles()
    for change, message in (
        ({"op": "linear"}, "expected op as one of"),
        ({"planes": planes[:, :-1]}, "expected planes of shape"),
        ({"planes": tiles}, "expected canonical planes, which have 2 axes"),
        ({"coefficients": (*coefficients, 1)}, "expected coefficients"),
        ({"weight_shape": (70, 301)}, "expected planes of shape"),
        ({"weight_shape": (-70, -300)}, "expected weight_shape of sizes from 0"),
        ({"weight_shape": (21000,)}, "expected weight_shape of 2 or 4 axes"),
    ):
        arguments = {
            "op": "bitserial_linear",
            "planes": planes,
            "coefficients": coefficients,
            "weight_shape": (70, 300),
        }
        with pytest.raises(ValueError, match=message):
            functional.tile(**(arguments | change))
    # Before anything is allocated: no memory holds so much.
    with pytest.raises(ValueError, match="expected contiguous planes of shape"):
        functional.untile("bitserial_conv2d", tiles, coefficients, (70, 1 << 20, 1 << 10, 1 << 10))
    with pytest.raises(ValueError, match="expected weight_shape of sizes that fit in memory"):
        functional.untile("bitserial_linear", tiles, coefficients, (1 << 40, 1 << 40))


def test_lazily_negated_inputs_are_resolved() -> None:
    input, step = torch.randn(2, 300), LINEAR.step()
    tiles, coefficients = LINEAR.tiles()
    weight = {"coefficients": coefficients, "weight_shape": LINEAR.shape}
    expected = functional.bitserial_linear(-input, tiles, -step, **weight)
    negated = [torch.complex(torch.zeros_like(values), values).conj().imag for values in (input, step)]
    assert all(values.is_neg() for values in negated)
    assert torch.equal(functional.bitserial_linear(negated[0], tiles, negated[1], **weight), expected)
    wanted = functional.bitserial_weight(tiles, -step, **weight)
    assert torch.equal(functional.bitserial_weight(tiles, negated[1], **weight), wanted)
