"""A layer's training step with its GEMM, and what launching the reconstruction costs."""

import argparse
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from harness import DTYPES, Case, Spread, interleave, report_caught, shape_list
from torch import Tensor, nn
from trust import Entry

from csq_kernels import functional
from csq_kernels.nn import CSQConv2d, CSQLinear

Result = tuple[list[dict[str, Any]], bool]
LAUNCHES = 100  # in one CUDA graph


def _step(layer: nn.Module, input: Tensor, grad_output: Tensor) -> Entry:
    """Forward and backward of a layer, with the gradient of its input as inside a network."""

    def run() -> Tensor:
        output = layer(input)
        output.backward(grad_output)
        return output

    def clear() -> None:
        input.grad = None
        layer.zero_grad(set_to_none=True)

    return Entry(run, clear, (input, grad_output), lambda output: [output, input.grad, layer.bias.grad])


def _share(layer: CSQLinear | CSQConv2d) -> Entry:
    """What CSQ adds to the step: the weight from the logits, and their gradients from the weight's."""
    grad_weight = torch.randn_like(layer.weight)

    def run() -> None:
        layer.weight.backward(grad_weight)

    return Entry(run, lambda: layer.zero_grad(set_to_none=True), (grad_weight,), lambda _: [layer.bit_logits.grad])


def _run_layer(
    op: str,
    shape: tuple[int, ...],
    options: argparse.Namespace,
    float_layer: nn.Module,
    csq_layer: CSQLinear | CSQConv2d,
    input_shape: tuple[int, ...],
) -> Result:
    """Time the steps of both layers, and CSQ's part alone, in turn; the CSQ layer computes with its own weight."""
    generator = torch.Generator(options.device).manual_seed(0)
    made = {"generator": generator, "device": options.device}
    input = torch.randn(input_shape, **made).to(options.dtype).requires_grad_()
    with torch.no_grad():
        csq_layer.temperature.fill_(30.0)
        float_layer.weight.copy_(csq_layer.weight)
        float_layer.bias.copy_(csq_layer.bias)
        output = float_layer(input)
        right = torch.equal(csq_layer(input), output)
    grad_output = torch.randn(output.shape, **made).to(options.dtype)
    entries = {
        "float": _step(float_layer, input, grad_output),
        "csq": _step(csq_layer, input, grad_output),
        "csq-weight": _share(csq_layer),
    }
    timing = interleave(entries, options.rounds, options.device, {"csq": "float"}.get, ahead=True)
    times, bandwidth = timing.spreads, timing.bandwidth
    report_caught(timing.caught, f"{op} {shape}")
    if timing.caught:
        return [], False
    return [
        {
            "op": op,
            "provider": name,
            "mode": "forward+backward",
            "shape": list(shape),
            "dtype": str(options.dtype).removeprefix("torch."),
            "n_bits": options.n_bits,
            "device": options.device,
            "rounds": options.rounds,
            "seconds": {"median": spread.median, "p20": spread.p20, "p80": spread.p80},
            "copy_bytes_per_second": bandwidth,
            "times_float": spread.median / times["float"].median,
            "share_of_csq_step": spread.median / times["csq"].median,
        }
        for name, spread in times.items()
    ], right


def run_linear(shape: tuple[int, ...], options: argparse.Namespace) -> Result:
    """``shape``: tokens, input features, output features."""
    tokens, inputs, outputs = shape
    made = {"device": options.device, "dtype": options.dtype}
    csq_layer = CSQLinear(inputs, outputs, n_bits=options.n_bits, **made)
    return _run_layer("csq_linear", shape, options, nn.Linear(inputs, outputs, **made), csq_layer, (tokens, inputs))


def run_conv2d(shape: tuple[int, ...], options: argparse.Namespace) -> Result:
    """``shape``: images, input channels, output channels, height and width of the image, width of the kernel."""
    images, inputs, outputs, size, kernel = shape
    arguments = {"padding": kernel // 2, "device": options.device, "dtype": options.dtype}
    csq_layer = CSQConv2d(inputs, outputs, kernel, n_bits=options.n_bits, **arguments)
    float_layer = nn.Conv2d(inputs, outputs, kernel, **arguments)
    return _run_layer("csq_conv2d", shape, options, float_layer, csq_layer, (images, inputs, size, size))


def _graph(run: Callable[[], Tensor | None], *inputs: Tensor) -> Entry:
    """``LAUNCHES`` calls in one CUDA graph: the device's time, without Python's."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        for _ in range(LAUNCHES):
            result = run()
    return Entry(graph.replay, inputs=inputs, outputs=lambda _: [result])


def run_launch(shape: tuple[int, ...], options: argparse.Namespace) -> Result:
    """``shape``: of a small weight, whose reconstruction is compared with a kernel that does nothing."""
    logits = torch.randn(2, options.n_bits, *shape, device="cuda").to(options.dtype)
    gates = torch.randn(options.n_bits, device="cuda")
    scale, temperature = torch.ones((), device="cuda"), torch.ones((), device="cuda")
    entries = {
        "empty": _graph(lambda: torch.cuda._sleep(0) or scale),  # computes nothing, so that no input may change it
        "csq": _graph(lambda: functional.reconstruct(logits, gates, scale, temperature), logits),
    }
    timing = interleave(entries, options.rounds, options.device)
    bandwidth = timing.bandwidth
    report_caught(timing.caught, f"reconstruct_launch {shape}")
    if timing.caught:
        return [], False
    each = {
        name: Spread(spread.median / LAUNCHES, spread.p20 / LAUNCHES, spread.p80 / LAUNCHES)
        for name, spread in timing.spreads.items()
    }
    return [
        {
            "op": "reconstruct_launch",
            "provider": name,
            "mode": "forward",
            "shape": list(shape),
            "dtype": str(options.dtype).removeprefix("torch."),
            "n_bits": options.n_bits,
            "device": options.device,
            "rounds": options.rounds,
            "seconds": {"median": spread.median, "p20": spread.p20, "p80": spread.p80},
            "copy_bytes_per_second": bandwidth,
            "seconds_beyond_empty": spread.median - each["empty"].median,
        }
        for name, spread in each.items()
    ], True


def print_rows(rows: list[dict[str, Any]]) -> None:
    """Name, shape, provider, median and spread, then what the suite compares."""
    known = ("op", "provider", "mode", "shape", "dtype", "n_bits", "device", "rounds", "seconds")
    for row in rows:
        ms = {name: f"{1e3 * value:.4f}" for name, value in row["seconds"].items()}
        compared = {key: value for key, value in row.items() if key not in (*known, "copy_bytes_per_second")}
        print(
            f"{row['op']} {'x'.join(map(str, row['shape']))} {row['dtype']} {row['provider']:10}",
            f"{ms['median']} ms ({ms['p20']}..{ms['p80']})",
            " ".join(f"{key} {value:.3g}" for key, value in compared.items()),
        )


@dataclass(frozen=True)
class Suite:
    """One of these benchmarks as ``run.py`` takes it."""

    measure: Callable[[tuple[int, ...], argparse.Namespace], Result]
    shapes: str
    devices: tuple[str, ...] = ("cpu", "cuda")

    @property
    def __doc__(self) -> str:
        return self.measure.__doc__

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--device", choices=self.devices, default=self.devices[0])
        parser.add_argument("--shapes", type=shape_list, default=self.shapes, help=self.measure.__doc__)
        parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the whole layer")
        parser.add_argument("--n-bits", type=int, default=8)
        parser.add_argument("--threads", type=int, default=torch.get_num_threads())
        parser.add_argument("--rounds", type=int, default=5)

    def cases(self, options: argparse.Namespace) -> list[Case]:
        """One for each shape."""
        options.dtype = DTYPES[options.dtype]
        torch.set_num_threads(options.threads)
        return [
            Case("x".join(map(str, shape)), math.prod(shape), functools.partial(self.measure, shape, options))
            for shape in options.shapes
        ]

    print_rows = staticmethod(print_rows)


SUITES = {
    "csq_linear": Suite(run_linear, "256x512x512,512x1024x1024"),
    "csq_conv2d": Suite(run_conv2d, "8x64x64x16x3"),
    "reconstruct_launch": Suite(run_launch, "64x64,512x512", ("cuda",)),
}
