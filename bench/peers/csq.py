"""This library's packed layers, judged against float64 before they are timed."""

import copy
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from accuracy import Norms, Verdict, twice
from torch import Tensor, nn

from csq_kernels import reference
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


def pack(codes: Tensor, precision: str) -> nn.Module:
    from csq_kernels.nn.packed import PackedLinear

    return PackedLinear.from_codes(codes, SCALE, N_BITS, precision=precision)


def rounded_to_int8(x: Tensor) -> Tensor:
    """``x`` in 8 bits with a step for each 128 columns, in float64: what ONNX Runtime's int8 mode multiplies with."""
    blocks = F.pad(x.double(), (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))
    step = blocks.abs().amax(-1, keepdim=True) / 127
    return ((blocks / step).round() * step).flatten(-2)[..., : x.shape[-1]]


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def judge(layer: nn.Module, codes: Tensor, precision: str, batch: int) -> Verdict:
    """The error of one layer on random inputs over what its precision allows."""
    x = torch.randn(batch, codes.shape[1], generator=torch.Generator().manual_seed(0))
    weight = reference.hard_weight(codes, SCALE.double(), N_BITS, 0)
    exact = F.linear(x.double(), weight)
    found = layer(x)
    if precision == "exact":
        baseline = F.linear(x, reference.hard_weight(codes, SCALE, N_BITS, 0))
        errors, baseline_errors = (Norms().add(y.double() - exact) for y in (found, baseline))
        return twice("the product", errors, baseline_errors, Norms().add(exact))
    allowed = HIGH_ERROR
    if precision == "int8":
        allowed = SAMPLING * relative_error(F.linear(rounded_to_int8(x), weight), exact)
    error = relative_error(found, exact)
    return Verdict(error / allowed, f"relative error of the product {error:.2e}, allowed {allowed:.2e}")


@dataclass
class Packed:
    name: str
    bits: int
    activation: str
    packed: dict[Shape, nn.Module] = field(default_factory=dict)

    def layers(self, shapes: list[Shape]) -> list[nn.Module]:
        """Packs each shape once; the layers that follow it are copies in memory of their own."""
        self.packed = {
            shape: self.packed.get(shape) or pack(random_codes(shape, self.bits), self.activation)
            for shape in dict.fromkeys(shapes)
        }
        used = len(self.packed)
        states = {shape: layer.state_dict() for shape, layer in self.packed.items()}
        return [*self.packed.values(), *(self._again(shape, states[shape]) for shape in shapes[used:])]

    def _again(self, shape: Shape, state: dict[str, Tensor]) -> nn.Module:
        """A layer that got its planes as one from a file does: a mere copy would not lie where huge pages begin."""
        layer = copy.copy(self.packed[shape])
        layer._buffers = dict(layer._buffers)
        layer.load_state_dict(state)
        return layer

    def walk(self, shape: Shape, batch: int, threads: int) -> Walk:
        torch.set_num_threads(threads)
        shapes = chain(shape, self.bits, batch)
        with torch.inference_mode():
            layers = self.layers(shapes)
            verdict: Verdict | None = None
            for each, layer in self.packed.items():
                latest = judge(layer, random_codes(each, self.bits), self.activation, batch)
                if latest.worse(verdict):
                    verdict = latest
        stored = {layer.stored_bits for layer in layers}
        if stored != {self.bits}:
            raise RuntimeError(f"expected {self.bits} stored bits of {self.name}, got {sorted(stored)}")
        inputs = {each: torch.randn(batch, each[1]) for each in self.packed}
        calls = [(layer, inputs[each]) for layer, each in zip(layers, shapes, strict=True)]

        def run() -> None:
            with torch.inference_mode():
                for layer, x in calls:
                    layer(x)

        weight_bytes = sum(n * k for n, k in shapes) * self.bits // 8
        return Walk(run, layers=len(shapes), weight_bytes=weight_bytes, verdict=verdict)


def available() -> str | None:
    return None


def version() -> dict[str, str]:
    return {}


def providers() -> list[Provider]:
    return [Packed(f"csq {precision}", bits, precision) for precision in PRECISIONS for bits in WIDTHS]
