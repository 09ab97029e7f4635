"""Python's threads on shared inputs, each with a team of its own: ``python tests/reliability/threads.py --rounds 20``.

Meant to run under ThreadSanitizer (``sanitize.py thread``). Eight threads at once compute forward and backward passes,
products with one packed weight, tiles of it, and single-pass steps of a layer of their own with shared gradients, on
every instruction set; results must be those of one thread, bit for bit.
"""

import argparse
import dataclasses
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from csq_kernels import _native, backends, bitplanes, functional, step

THREADS = 8
TEAM = 3


def work() -> list[Callable[[], list[Tensor]]]:
    """Calls that share what they read; large enough that the kernels wake a team."""
    logits, gates = torch.randn(2, 8, 64, 80), torch.randn(8, 64)
    scale, beta, grad = torch.rand(64) + 0.5, torch.tensor(30.0), torch.randn(64, 80)
    bits = list(range(8))
    codes = torch.randint(-127, 128, (130, 32, 3, 3))
    planes, coefficients = bitplanes.encode(codes)
    flat = {"coefficients": coefficients, "weight_shape": (130, 288)}
    square = {"coefficients": coefficients, "weight_shape": (130, 32, 3, 3)}
    tiles = backends.tile("bitserial_linear", planes, *flat.values())
    conv_tiles = backends.tile("bitserial_conv2d", planes, *square.values())
    rows, image, unit = torch.randn(19, 288), torch.randn(2, 32, 9, 9), torch.tensor(0.01)
    vectors = step.Vectors(gates, scale, beta)
    layer = step.StepLayer(
        weight=torch.zeros(64, 80),
        grad_weight=grad,
        bit_logits=logits,
        before=vectors,
        after=vectors,
        bits=tuple(bits),
        n_bits=8,
        channel_axis=0,
        hard_gates=False,
        rule=step.Rule.sgd(2, 0.1, 0.9, 0.0, False, False),
        momenta=(torch.zeros(2, 8, 64, 80),),
        momentum_scales=(),
        key=1,
    )

    def stepped() -> list[Tensor]:
        own = dataclasses.replace(
            layer,
            weight=layer.weight.clone(),
            bit_logits=logits.clone(),
            momenta=tuple(momentum.clone() for momentum in layer.momenta),
        )
        sums = backends.step_function("step_sums", "cpu")(own)
        backends.step_function("step_update", "cpu")([own])
        return [*sums, own.weight, own.bit_logits, *own.momenta]

    def products(precision: str) -> Callable[[], list[Tensor]]:
        def compute() -> list[Tensor]:
            few = functional.bitserial_linear(rows[:1], tiles, unit, **flat, precision=precision)
            many = functional.bitserial_linear(rows, tiles, unit, **flat, precision=precision)
            convolved = functional.bitserial_conv2d(image, conv_tiles, unit, **square, precision=precision)
            return [few, many, convolved]

        return compute

    return [
        lambda: [torch.ops.csq.reconstruct(logits, gates, scale, beta, bits, 8, 0, False)],
        lambda: list(torch.ops.csq.reconstruct_backward(grad, logits, gates, scale, beta, bits, 8, 0, False)),
        lambda: [functional.bitserial_weight(tiles, unit, **flat)],
        lambda: [backends.untile("bitserial_linear", tiles, *flat.values())],
        lambda: [backends.tile("bitserial_conv2d", planes, *square.values())],
        *(products(precision) for precision in ("exact", "high", "int8")),
        stepped,
    ]


def run(rounds: int) -> int:
    """Calls that were made; ``AssertionError`` if one gave something else than alone."""
    torch.manual_seed(0)
    # PyTorch's own team, of libgomp, would look like races: what is made here is made by one thread.
    torch.set_num_threads(1)
    calls = work()
    made = 0
    for isa in _native.module.supported_isas():
        _native.module.set_isa(isa)
        torch.set_num_threads(1)
        alone = [call() for call in calls]
        torch.set_num_threads(TEAM)
        with ThreadPoolExecutor(THREADS) as pool:
            for turn in range(rounds):
                # Every thread begins with another call.
                order = [(thread + turn + i) % len(calls) for i in range(len(calls)) for thread in range(THREADS)]
                for index, result in zip(order, pool.map(lambda index: calls[index](), order), strict=True):
                    assert all(map(torch.equal, result, alone[index])), f"call {index} on {isa}: another result"
                made += len(order)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    made = run(options.rounds)
    isas = _native.module.supported_isas()
    tried = f"{made:,} calls by {THREADS} threads with teams of {TEAM}, on {', '.join(isas)}"
    print(tried)


if __name__ == "__main__":
    sys.exit(main())
