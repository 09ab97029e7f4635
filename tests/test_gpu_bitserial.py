"""The ops on packed weights on a CUDA device."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import BFLOAT16, FLOAT16, FLOAT32, assert_within
from packed_weights import COEFFICIENTS, make_planes, signed
from torch import Tensor

from csq_kernels import backends, functional, reference
from csq_kernels.backends import gpu_planes

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["cuda", "triton"])
def implementation(request: pytest.FixtureRequest) -> Callable[[str], Callable[..., Tensor]]:
    """The ops as one backend computes them."""
    try:
        backends.implementation("bitserial_linear", request.param)
    except backends.Unavailable as reason:
        pytest.skip(str(reason))
    return lambda op: backends.implementation(op, request.param)


class Layer:
    """A packed linear layer on the device, an input for it, and the float64 answer."""

    def __init__(
        self, coefficients: tuple[int, ...], shape: tuple[int, int], batch: int, dtype: torch.dtype, seed: int = 0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        codes, planes = make_planes(coefficients, *shape, seed)
        self.coefficients, self.shape = coefficients, shape
        self.canonical = planes.cuda()
        self.tiles = gpu_planes.tile(self.canonical, coefficients, shape)
        step = (torch.rand(shape[0], generator=generator) + 0.1) / gpu_planes.largest_code(coefficients)
        self.step = step.cuda()
        self.bias = torch.randn(shape[0], generator=generator).cuda()
        self.input = torch.randn(batch, shape[1], generator=generator).to(dtype).cuda()
        self.codes = codes.cuda()

    def arguments(self, precision: str) -> tuple:
        return (self.input, self.tiles, self.step, self.bias, self.coefficients, self.shape, precision)

    def exact(self) -> Tensor:
        weight = self.codes.double() * self.step.double()[:, None]
        return F.linear(self.input.double(), weight, self.bias.double())

    def quantized(self) -> Tensor:
        rest = (self.canonical, self.step, self.bias, self.coefficients, self.shape, "int8")
        return reference.bitserial_linear(self.input.double(), *rest)

    def eager(self) -> Tensor:
        weight = self.codes.float() * self.step[:, None]
        return F.linear(self.input.float(), weight, self.bias).to(self.input.dtype)


def check(linear: Callable[..., Tensor], layer: Layer) -> None:
    for precision in ("exact", "high"):
        assert_within(linear(*layer.arguments(precision)), layer.exact(), layer.eager())
    quantized = layer.quantized()
    # Integers are exact within a block; what is left is the float32 sum over the blocks.
    sums = (
        layer.input.double().abs().sum(1)[:, None] * layer.step.double() * gpu_planes.largest_code(layer.coefficients)
    )
    allowed = 8 * torch.finfo(FLOAT32).eps * sums + quantized.abs() * torch.finfo(layer.input.dtype).eps
    assert ((linear(*layer.arguments("int8")).double() - quantized).abs() <= allowed).all()


@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_every_set_of_planes(implementation, coefficients: tuple[int, ...], dtype: torch.dtype) -> None:
    check(implementation("bitserial_linear"), Layer(coefficients, (70, 300), 3, dtype))


@pytest.mark.parametrize("batch", [*range(1, 18), 64, 65, 512, 2049])
@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16, BFLOAT16])
def test_every_batch(implementation, batch: int, dtype: torch.dtype) -> None:
    check(implementation("bitserial_linear"), Layer(signed(4), (100, 1000), batch, dtype))


@pytest.mark.parametrize("shape", [(1, 1), (33, 129), (4096, 4096), (1000, 11008)], ids=str)
@pytest.mark.parametrize("planes", range(1, 9))
def test_every_shape(implementation, shape: tuple[int, int], planes: int) -> None:
    for batch in (1, 16):
        check(implementation("bitserial_linear"), Layer(signed(planes), shape, batch, FLOAT16))


@pytest.mark.parametrize("coefficients", COEFFICIENTS, ids=str)
def test_weight_is_equal(implementation, coefficients: tuple[int, ...]) -> None:
    layer = Layer(coefficients, (37, 133), 1, FLOAT32)
    decode = implementation("bitserial_weight")
    for step, axis in ((torch.tensor(0.3).cuda(), 0), (layer.step, 0), (torch.rand(133).cuda(), 1)):
        expected = reference.bitserial_weight(layer.canonical, step, coefficients, layer.shape, axis)
        for planes in (layer.canonical, layer.tiles):
            assert torch.equal(decode(planes, step, coefficients, layer.shape, axis), expected)


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16])
def test_tiny_and_huge_inputs(implementation, dtype: torch.dtype) -> None:
    # Codes as halves are subnormal numbers, which a matrix instruction must not flush.
    layer = Layer(signed(4), (64, 256), 4, dtype)
    largest = 1e4 if dtype == FLOAT32 else 1e3  # times 1e4 the product is beyond the range of halves
    layer.input *= torch.tensor([1e-7, 1e-3, 1.0, largest], device="cuda", dtype=dtype)[:, None]
    layer.bias.zero_()
    actual = implementation("bitserial_linear")(*layer.arguments("exact"))
    exact, eager = layer.exact(), layer.eager()
    for row in range(4):
        assert_within(actual[row], exact[row], eager[row])


def test_bfloat16_far_from_one(implementation) -> None:
    layer = Layer(signed(4), (64, 256), 4, BFLOAT16)
    layer.input *= torch.tensor([1e-30, 1e-10, 1e10, 1e30], device="cuda", dtype=BFLOAT16)[:, None]
    layer.bias.zero_()
    actual = implementation("bitserial_linear")(*layer.arguments("exact"))
    exact, eager = layer.exact(), layer.eager()
    for row in range(4):
        assert_within(actual[row], exact[row], eager[row])


@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_graph_capture(implementation, precision: str) -> None:
    linear = implementation("bitserial_linear")
    layer, other = (Layer(signed(3), (256, 512), 4, FLOAT16, seed) for seed in (0, 1))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        linear(*layer.arguments(precision))
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear(*layer.arguments(precision))
    layer.input.copy_(other.input)
    graph.replay()
    assert torch.equal(captured, linear(*layer.arguments(precision)))


@pytest.mark.parametrize("precision", ["exact", "int8"])
def test_two_streams(implementation, precision: str) -> None:
    linear = implementation("bitserial_linear")
    layers = [Layer((-64, 8, 4, 2, 1), (512, 1024), 7, FLOAT16, seed) for seed in (0, 1)]
    expected = [linear(*layer.arguments(precision)) for layer in layers]
    inputs = [layer.input.clone() for layer in layers]
    streams = [torch.cuda.Stream() for _ in layers]
    for layer, stream in zip(layers, streams, strict=True):
        layer.input.zero_()
        stream.wait_stream(torch.cuda.current_stream())
    actual = []
    for layer, input, stream in zip(layers, inputs, streams, strict=True):
        with torch.cuda.stream(stream):
            # Whoever does not wait for this stream reads the zeros.
            torch.cuda._sleep(50_000_000)
            layer.input.copy_(input)
            actual.append(linear(*layer.arguments(precision)))
    torch.cuda.synchronize()
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16])
@pytest.mark.parametrize("precision", ["exact", "high", "int8"])
def test_conv2d(implementation, dtype: torch.dtype, precision: str) -> None:
    shape, coefficients = (64, 16, 3, 3), signed(4)
    _, planes = make_planes(coefficients, 64, 144)
    step, bias, input = torch.rand(64).cuda(), torch.randn(64).cuda(), torch.randn(2, 32, 20, 20).to(dtype).cuda()
    arguments = (planes.cuda(), step, bias, coefficients, shape, (1, 1), (1, 1), (1, 1), 2)
    with torch.backends.cudnn.flags(allow_tf32=False):
        kind = "int8" if precision == "int8" else "exact"
        exact = reference.bitserial_conv2d(input.double(), *arguments, kind)
        actual = implementation("bitserial_conv2d")(input, *arguments, precision)
        eager = reference.bitserial_conv2d(input, *arguments, kind)
    if precision == "int8" and dtype == FLOAT32:
        torch.testing.assert_close(actual.double(), exact, rtol=1e-6, atol=1e-6 * float(exact.abs().max()))
    else:
        assert_within(actual, exact, eager)


def test_gradients_and_compile() -> None:
    layer = Layer(signed(3), (96, 160), 4, FLOAT32)
    constants = {"coefficients": layer.coefficients, "weight_shape": layer.shape}

    def loss(input: Tensor) -> Tensor:
        return functional.bitserial_linear(input, layer.tiles, layer.step, layer.bias, **constants).square().sum()

    leaves = [layer.input.clone().requires_grad_() for _ in range(2)]
    loss(leaves[0]).backward()
    torch._dynamo.reset()
    torch.compile(loss, fullgraph=True)(leaves[1]).backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    weight = layer.codes.double() * layer.step.double()[:, None]
    expected = 2 * layer.exact() @ weight
    torch.testing.assert_close(leaves[0].grad.double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
