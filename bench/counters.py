"""One launch of each GPU kernel, at the size that the claims are about, for a profiler: ``ncu ... counters.py``.

Each call is made twice before, so that compilation and first use are not in it. Run ``ncu`` with
``--profile-from-start off --clock-control none``; ``gpu.sh`` names the sections. Then ``counters.py --read LOG --out
FILE`` appends a line for each of our kernels in what it printed.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

BENCH = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCH))
from harness import append_lines, circumstances  # noqa: E402
from suites.bitserial_cuda import COLUMNS, Layers  # noqa: E402

from csq_kernels import backends, functional, optim  # noqa: E402
from csq_kernels.nn import CSQLinear  # noqa: E402

SIDE = 4096
# Of the profiler's report: names of ours, and what turns its unit into ours.
UNITS = {"us": 1e-6, "ms": 1e-3, "ns": 1e-9, "%": 1e-2, "register/thread": 1, "Kbyte/block": 1000, "byte/block": 1}
METRICS = {
    "Duration": "seconds",
    "DRAM Throughput": "share_of_dram_peak",
    "Compute (SM) Throughput": "share_of_sm_peak",
    "One or More Eligible": "share_of_issue_slots",
    "Achieved Occupancy": "occupancy",
    "Registers Per Thread": "registers",
    "Dynamic Shared Memory Per Block": "shared_bytes",
}


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


def kernels(report: str) -> Iterator[dict[str, Any]]:
    """Name, launch and metrics of each kernel of this library in what ``ncu`` printed."""
    head = re.compile(r"^  (?:void )?csq::<unnamed>::(.+?)\(.*\) \((\d+), (\d+), \d+\)x\((\d+), ", re.MULTILINE)
    found = list(head.finditer(report))
    ends = [match.start() for match in re.finditer(r"^  \S.*, Context \d+, Stream", report, re.MULTILINE)]
    for match in found:
        body = report[match.end() : next((end for end in ends if end > match.end()), len(report))]
        name = re.sub(r"csq::<unnamed>::", "", match[1])
        row: dict[str, Any] = {"kernel": name, "blocks": int(match[2]) * int(match[3]), "threads": int(match[4])}
        for line in body.splitlines():
            metric = re.match(r"^    (\S.*?)\s{2,}(\S+)\s+([\d.,]+)\s*$", line)
            if metric is not None and metric[1] in METRICS:
                row[METRICS[metric[1]]] = round(float(metric[3].replace(",", "")) * UNITS[metric[2]], 9)
        yield row


def launch() -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--read", type=Path, help="what ncu printed; without it the kernels are launched")
    parser.add_argument("--out", type=Path, default=BENCH / "results" / "counters.jsonl")
    options = parser.parse_args()
    if options.read is None:
        launch()
        return
    common = circumstances("cuda")
    rows = [{"op": "counters", **row, **common} for row in kernels(options.read.read_text())]
    if not rows:
        parser.error(f"expected a report of ncu with kernels of this library, got {options.read}")
    append_lines(options.out, rows)


if __name__ == "__main__":
    main()
