"""PyTorch's own linear layers on the CPU."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from peers import Provider, Shape, Walk, chain

GROUP = 128


@dataclass(frozen=True)
class Layer:
    """One layer, with a memory of its own."""

    run: Callable[[Tensor], Tensor]
    weight_bytes: int


def dense(shape: Shape, dtype: torch.dtype) -> Layer:
    weight = (torch.randn(shape) / shape[1] ** 0.5).to(dtype)
    return Layer(lambda x: F.linear(x, weight), weight.nbytes)


def int4pack(shape: Shape) -> Layer:
    codes = torch.randint(1, 16, shape, dtype=torch.int32)  # less 8, of mean 0
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales_and_zeros = torch.zeros(shape[1] // GROUP, shape[0], 2, dtype=torch.bfloat16)
    scales_and_zeros[..., 0] = 1 / (4.3 * shape[1] ** 0.5)
    return Layer(
        lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales_and_zeros),
        packed.nbytes + scales_and_zeros.nbytes,
    )


def int8pack(shape: Shape) -> Layer:
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    scales = torch.full(shape[:1], 1 / (73 * shape[1] ** 0.5), dtype=torch.bfloat16)
    return Layer(lambda x: torch.ops.aten._weight_int8pack_mm(x, codes, scales), codes.nbytes + scales.nbytes)


def prepack(codes: Tensor, scales: Tensor, bias: Tensor | None = None):
    """What ``quantized.linear_dynamic`` of the current engine takes for the weight ``scales * codes``."""
    zeros = torch.zeros(codes.shape[0], dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and still the fastest int8 layer of PyTorch on a CPU
        weight = torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)
    return torch.ops.quantized.linear_prepack(weight, bias)


def dynamic(shape: Shape, engine: str) -> Layer:
    torch.backends.quantized.engine = engine
    codes = torch.randint(-127, 128, shape, dtype=torch.int8)
    packed = prepack(codes, torch.full(shape[:1], 1 / (73 * shape[1] ** 0.5)))
    return Layer(lambda x: torch.ops.quantized.linear_dynamic(x, packed, True), codes.nbytes + 4 * shape[0])


@dataclass(frozen=True)
class Linear:
    name: str
    bits: int
    activation: str
    layer: Callable[[Shape], Layer]

    def walk(self, shape: Shape, batch: int, threads: int) -> Walk:
        torch.set_num_threads(threads)
        shapes = chain(shape, self.bits, batch)
        layers = [self.layer(each) for each in shapes]
        dtype = torch.bfloat16 if self.activation == "bf16" else torch.float32
        first = torch.randn(batch, shapes[0][1]).to(dtype)

        def run() -> Tensor:
            x = first
            with torch.inference_mode():
                for layer in layers:
                    x = layer.run(x)
            return x

        weight_bytes = sum(layer.weight_bytes for layer in layers)
        return Walk(run, inputs=(first,), layers=len(layers), weight_bytes=weight_bytes)


def available() -> str | None:
    return None


def version() -> dict[str, str]:
    return {}


def providers() -> list[Provider]:
    engines = [e for e in ("x86", "onednn") if e in torch.backends.quantized.supported_engines]
    return [
        Linear("torch fp32", 32, "fp32", lambda shape: dense(shape, torch.float32)),
        Linear("torch bf16", 16, "bf16", lambda shape: dense(shape, torch.bfloat16)),
        *(Linear(f"torch dynamic {e}", 8, "int8", lambda shape, e=e: dynamic(shape, e)) for e in engines),
        Linear("torch int8pack", 8, "bf16", int8pack),
        Linear("torch int4pack", 4, "bf16", int4pack),
    ]
