"""Products with packed weights on a CUDA device: ``python bench/suites/bitserial_cuda.py [--out FILE]``.

Each call of a CUDA graph takes another layer of a set of 200 MB, four times the cache of an H100, so that weights come
from memory. In the same run: cuBLAS with weights in float16, rotated likewise, and a read of as many bytes.
A line is printed and appended for each width, batch and backend; one whose output is wrong has no time, and the command
fails.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BENCH = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(BENCH))
from harness import append_lines, circumstances  # noqa: E402

from csq_kernels import backends  # noqa: E402
from csq_kernels.backends import gpu_planes  # noqa: E402

ROTATED_BYTES = 200 << 20
ROWS = COLUMNS = 8192
WIDTHS = range(1, 9)
BATCHES = (1, 16, 512)
ROUNDS = 20


def graph_seconds(calls: list[Callable[[], object]]) -> list[float]:
    """Seconds of one call, of ``ROUNDS`` replays of a graph of all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(ROUNDS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return times[2:]


def spread(times: list[float]) -> dict[str, float]:
    quantiles = statistics.quantiles(times, n=10, method="inclusive")
    return {"median": statistics.median(times), "p20": quantiles[1], "p80": quantiles[7]}


def read_bandwidth() -> float:
    """Bytes that a sum reads per second from memory."""
    source = torch.ones(ROTATED_BYTES // 4, device="cuda")
    return ROTATED_BYTES / statistics.median(graph_seconds([lambda: source.sum()]))


def signed(planes: int) -> tuple[int, ...]:
    return (-1 << (planes - 1), *(1 << bit for bit in reversed(range(planes - 1))))


class Layers:
    """As many packed layers of one width as fill the rotated bytes; random planes are as good as trained ones."""

    def __init__(self, planes: int) -> None:
        self.coefficients = signed(planes)
        self.shape = (ROWS, COLUMNS)
        self.step = torch.full((ROWS,), 0.01 / (1 << planes), device="cuda")
        shape = gpu_planes.tile_shape(self.coefficients, self.shape)
        count = -(-ROTATED_BYTES // (ROWS * COLUMNS * planes // 8))
        self.tiles = [torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda") for _ in range(count)]

    def calls(self, linear: Callable[..., Tensor], input: Tensor) -> list[Callable[[], Tensor]]:
        return [
            lambda tiles=tiles: linear(input, tiles, self.step, None, self.coefficients, self.shape, "exact")
            for tiles in self.tiles
        ]

    def error(self, output: Tensor, input: Tensor) -> float:
        """Of the first layer's product, relative to the float64 one."""
        planes = gpu_planes.untile(self.tiles[0], self.coefficients, self.shape)
        weight = backends.implementation("bitserial_weight", "reference")(
            planes, self.step, self.coefficients, self.shape, 0
        )
        exact = input.double() @ weight.double().T
        return float((output.double() - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=BENCH / "results" / "bitserial_cuda.jsonl")
    parser.add_argument("--widths", type=int, nargs="*", default=list(WIDTHS))
    parser.add_argument("--batches", type=int, nargs="*", default=list(BATCHES))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, got none")
    common = circumstances("cuda")
    bandwidth = read_bandwidth()
    inputs = {batch: torch.randn(batch, COLUMNS, device="cuda").half() for batch in options.batches}
    dense = [torch.randn(ROWS, COLUMNS, device="cuda").half() for _ in range(-(-ROTATED_BYTES // (2 * ROWS * COLUMNS)))]
    floats = {
        batch: graph_seconds([lambda w=weight, x=input: x @ w.T for weight in dense]) for batch, input in inputs.items()
    }
    del dense
    wrong = False
    for width in options.widths:
        rows: list[dict[str, Any]] = []
        layers = Layers(width)
        for batch, input in inputs.items():
            opponent = spread(floats[batch])
            for backend in ("cuda", "triton"):
                try:
                    calls = layers.calls(backends.implementation("bitserial_linear", backend), input)
                except backends.Unavailable as reason:
                    print(f"{backend}: {reason}")
                    continue
                error = layers.error(calls[0](), input)
                red = not error < 1e-3
                wrong |= red
                seconds = None if red else spread(graph_seconds(calls))
                row = {"op": "bitserial_linear", "provider": backend, "shape": [ROWS, COLUMNS], "dtype": "float16"}
                row |= {"bits": width, "batch": batch, "precision": "exact", "rounds": ROUNDS, "seconds": seconds}
                row |= {"weight_bytes": ROWS * COLUMNS * width // 8, "read_bytes_per_second": bandwidth}
                row |= {"cublas_fp16_seconds": opponent, "relative_error": error}
                rows.append(row | common)
                took = "RED" if seconds is None else f"{seconds['median'] * 1e6:8.1f} us"
                print(
                    f"{width} bits  batch {batch:4}  {backend:6}  {took}  "
                    f"floor {row['weight_bytes'] / bandwidth * 1e6:6.1f} us  "
                    f"cuBLAS fp16 {opponent['median'] * 1e6:7.1f} us  error {error:.1e}",
                    flush=True,
                )
        del layers
        append_lines(options.out, rows)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
