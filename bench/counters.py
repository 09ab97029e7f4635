"""One launch of each GPU kernel, at the size that the claims are about, for a profiler: ``ncu ... counters.py``.

Each call is made twice before, so that compilation and first use are not in it. Run ``ncu`` with
``--profile-from-start off --clock-control none``; ``gpu.sh`` names the sections.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH))
from suites.bitserial_cuda import COLUMNS, Layers  # noqa: E402

from csq_kernels import backends, functional, optim  # noqa: E402
from csq_kernels.nn import CSQLinear  # noqa: E402

SIDE = 4096


def reconstructions(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The weight of 8 planes, and its gradients."""
    logits = torch.randn(2, 8, SIDE, SIDE, device="cuda", dtype=dtype).requires_grad_()
    gates = torch.randn(8, device="cuda").requires_grad_()
    scale = torch.tensor(0.7, device="cuda").requires_grad_()
    temperature = torch.tensor(30.0, device="cuda")
    grad = torch.randn(SIDE, SIDE, device="cuda", dtype=dtype)

    def forward() -> torch.Tensor:
        return functional.reconstruct(logits, gates, scale, temperature)

    weight = forward()

    def backward() -> object:
        return torch.autograd.grad(weight, (logits, gates, scale), grad, retain_graph=True)

    return {f"forward {dtype}": forward, f"backward {dtype}": backward}


def step(narrow: bool) -> Callable[[], object]:
    """The single pass over a layer with SGD and momentum."""
    model = nn.Sequential(CSQLinear(SIDE, SIDE, bias=False, device="cuda"))
    optimizer = optim.SGD(model, lr=1e-3, momentum=0.9, narrow=narrow)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    return optimizer.step


def product(planes: int, batch: int) -> Callable[[], object]:
    """A packed layer of 8192 x 8192."""
    layers = Layers(planes)
    input = torch.randn(batch, COLUMNS, device="cuda").half()
    return layers.calls(backends.implementation("bitserial_linear", "cuda"), input)[0]


def main() -> None:
    calls = reconstructions(torch.float32) | reconstructions(torch.bfloat16)
    calls |= {"step": step(narrow=False), "narrow step": step(narrow=True)}
    calls |= {
        f"{planes} planes, batch {batch}": product(planes, batch)
        for planes, batch in ((1, 1), (2, 1), (4, 1), (8, 1), (3, 16))
    }
    for name, call in calls.items():
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        print(name, flush=True)
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
