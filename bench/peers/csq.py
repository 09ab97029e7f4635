"""This library's packed layers, judged against float64 before they are timed."""

import copy
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accuracy import Norms, Verdict, twice
from torch import Tensor

from csq_kernels import reference
from csq_kernels._ops import MAX_BITS
from csq_kernels.backends.memory import new_empty_aligned
from csq_kernels.nn.packed import PackedLinear
from peers import Provider, Shape, Walk, chain

WIDTHS = range(1, 9)
PRECISIONS = ("int8", "high", "exact")
N_BITS = 8
SCALE = torch.tensor(0.7)
HIGH_ERROR = 5e-5
# Rounding errors of a few thousand inputs are a sample: an equally good kernel may come out as much worse.
SAMPLING = 1.01


def random_codes(shape: Shape, bits: int) -> Tensor:
    """Integers that need exactly so many planes."""
    low, high = (0, 2) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.int32)


def n_bits_of(bits: int) -> int:
    """``n`` of equation (7) for so many planes."""
    return N_BITS if bits <= N_BITS else MAX_BITS


@functools.cache
def packed(shape: Shape, bits: int) -> PackedLinear:
    return PackedLinear.from_codes(random_codes(shape, bits), SCALE, n_bits_of(bits))


def another(layer: PackedLinear, precision: str) -> PackedLinear:
    """The layer with planes of its own, which lie as those of a loaded layer do: where huge pages begin."""
    again = copy.copy(layer)
    again.precision = precision
    planes = new_empty_aligned(layer.planes, layer.planes.numel()).view_as(layer.planes).copy_(layer.planes)
    again._buffers = {**layer._buffers, "planes": planes}
    return again


def rounded_to_int8(x: Tensor, block: int = 128) -> Tensor:
    """``x`` in 8 bits with a step for each 128 columns, in float64: what ONNX Runtime's int8 mode multiplies with."""
    blocks = F.pad(x.double(), (0, -x.shape[-1] % block)).unflatten(-1, (-1, block))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / step).nan_to_num().round() * step).flatten(-2)[..., : x.shape[-1]]


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@dataclass(frozen=True)
class Products:
    """Of random inputs with the weight of ``packed``: in float64, in float32, and in float64 of rounded inputs."""

    input: Tensor
    exact: Tensor
    fp32: Tensor
    rounded: Tensor


@functools.cache
def products(shape: Shape, bits: int, batch: int) -> Products:
    codes = random_codes(shape, bits)
    x = torch.randn(batch, shape[1], generator=torch.Generator().manual_seed(0))
    fp32 = F.linear(x, reference.hard_weight(codes, SCALE, n_bits_of(bits), 0))
    weight = reference.hard_weight(codes, SCALE.double(), n_bits_of(bits), 0)
    exact, rounded = F.linear(torch.stack([x.double(), rounded_to_int8(x)]), weight)
    return Products(x, exact, fp32, rounded)


def judge(layer: PackedLinear, precision: str, judged: Products) -> Verdict:
    """The error of one layer on random inputs over what its precision allows."""
    found, exact = layer(judged.input), judged.exact
    if precision == "exact":
        errors, baseline_errors = (Norms().add(y.double() - exact) for y in (found, judged.fp32))
        return twice("the product", errors, baseline_errors, Norms().add(exact))
    allowed = HIGH_ERROR if precision == "high" else SAMPLING * relative_error(judged.rounded, exact)
    error = relative_error(found, exact)
    return Verdict(error / allowed, f"relative error of the product {error:.2e}, allowed {allowed:.2e}")


@dataclass(frozen=True)
class Packed:
    name: str
    bits: int
    activation: str

    def walk(self, shape: Shape, batch: int, threads: int) -> Walk:
        torch.set_num_threads(threads)
        shapes = chain(shape, self.bits, batch)
        with torch.inference_mode():
            layers = [another(packed(each, self.bits), self.activation) for each in shapes]
            verdict: Verdict | None = None
            for each, layer in zip(shapes[:2], layers, strict=False):
                latest = judge(layer, self.activation, products(each, self.bits, batch))
                if latest.worse(verdict):
                    verdict = latest
        stored = {layer.stored_bits for layer in layers}
        if stored != {self.bits}:
            raise RuntimeError(f"expected {self.bits} stored bits of {self.name}, got {sorted(stored)}")
        inputs = {each: torch.randn(batch, each[1]) for each in shapes[:2]}
        calls = [(layer, inputs[each]) for layer, each in zip(layers, shapes, strict=True)]

        def run() -> list[Tensor]:
            with torch.inference_mode():
                return [layer(x) for layer, x in calls]

        weight_bytes = sum(n * k for n, k in shapes) * self.bits // 8
        given = tuple(inputs.values())
        return Walk(run, inputs=given, layers=len(shapes), weight_bytes=weight_bytes, verdict=verdict)


def available() -> str | None:
    return None


def version() -> dict[str, str]:
    return {}


def providers() -> list[Provider]:
    return [Packed(f"csq {precision}", bits, precision) for precision in PRECISIONS for bits in WIDTHS]
