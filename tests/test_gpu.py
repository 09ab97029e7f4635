"""What only a CUDA device can show. ``test_ops.py`` judges the same backends there on every small case."""

from collections.abc import Callable

import pytest
import torch
from helpers import BFLOAT16, FLOAT16, OUTPUTS, Arguments, Case, assert_within, autograd_of_reference, exact_outputs
from torch import Tensor

from csq_kernels import backends, functional

pytestmark = pytest.mark.gpu

EIGHT = tuple(range(8))
PER_LAYER = Case((37, 64), EIGHT, 8)
PER_CHANNEL = Case((37, 64), EIGHT, 8, gates_per_channel=True, scale_per_channel=True)
# Many blocks, where aligned with several steps a thread; rows of odd lengths; channels first, in the middle and last.
LARGE = [
    Case((2048, 2048), EIGHT, 8),
    Case((2048, 2048), (0, 1, 2), 3, dtype=BFLOAT16),
    Case((2048, 2048), (0, 1, 2), 3, dtype=FLOAT16, gates_per_channel=True, scale_per_channel=True),
    Case((1021, 1031), (0, 1, 2), 3),
    Case((1000, 64, 3, 3), (0, 1, 2), 3, gates_per_channel=True, scale_per_channel=True),
    Case((1000, 64, 3, 3), (0, 1, 2), 3, gates_per_channel=True, channel_axis=1),
    Case((1000, 7, 3, 3), (0, 1, 2), 3, scale_per_channel=True),
    Case((700, 1000), (0, 1, 2), 3, gates_per_channel=True, scale_per_channel=True, channel_axis=1),
]

Outputs = Callable[[Arguments, Tensor], tuple[Tensor, ...]]


@pytest.fixture(params=["cuda", "triton", "reference"])
def outputs(request: pytest.FixtureRequest) -> Outputs:
    """``OUTPUTS`` as one backend computes them."""
    try:
        forward, backward = (
            backends.implementation(op, request.param) for op in ("reconstruct", "reconstruct_backward")
        )
    except backends.Unavailable as reason:
        pytest.skip(str(reason))
    return lambda arguments, grad_weight: (forward(*arguments), *backward(grad_weight, *arguments))


def on_device(case: Case, seed: int = 0) -> tuple[Arguments, Tensor]:
    return case.arguments(seed).to("cuda"), case.grad_weight(seed).to("cuda")


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for name, *values in zip(OUTPUTS, actual, expected, strict=True):
        assert torch.equal(*values), name


def assert_accurate(actual: tuple[Tensor, ...], inputs: tuple[Arguments, Tensor]) -> None:
    exact, eager = exact_outputs(*inputs), autograd_of_reference(*inputs)
    for name, *values in zip(OUTPUTS, actual, exact, eager, strict=True):
        # One sum may come out right by luck; at the size of these, a wrong one is far off.
        if values[0].numel() < 100:
            torch.testing.assert_close(
                values[0].double(), values[1], rtol=1e-5, atol=1e-5 * float(values[1].abs().max())
            )
        else:
            assert_within(*values, name=name)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_weights(outputs: Outputs, case: Case, poisoned: None) -> None:
    inputs = on_device(case)
    actual = outputs(*inputs)
    assert_accurate(actual, inputs)
    for _ in range(3):
        assert_equal(outputs(*inputs), actual)


@pytest.mark.parametrize("case", [PER_LAYER, PER_CHANNEL], ids=str)
def test_arrays_that_are_not_aligned(outputs: Outputs, case: Case) -> None:
    arguments, grad_weight = on_device(case)

    def shifted(tensor: Tensor) -> Tensor:
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
        return room[1:].view(tensor.shape).copy_(tensor)

    inputs = arguments._replace(bit_logits=shifted(arguments.bit_logits)), shifted(grad_weight)
    actual, expected = outputs(*inputs), outputs(arguments, grad_weight)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    for sums, wanted in zip(actual[2:], expected[2:], strict=True):
        torch.testing.assert_close(sums, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [PER_LAYER, PER_CHANNEL], ids=str)
def test_work_goes_to_the_current_stream(outputs: Outputs, case: Case) -> None:
    arguments, grad_weight = on_device(case)
    expected = outputs(arguments, grad_weight)
    late = arguments._replace(bit_logits=torch.zeros_like(arguments.bit_logits))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Whoever does not wait for this stream reads the zeros.
        torch.cuda._sleep(100_000_000)
        late.bit_logits.copy_(arguments.bit_logits)
        actual = outputs(late, grad_weight)
    stream.synchronize()
    assert_equal(actual, expected)


@pytest.mark.parametrize("case", [PER_LAYER, PER_CHANNEL], ids=str)
def test_graph_capture(outputs: Outputs, case: Case) -> None:
    arguments, grad_weight = on_device(case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs(arguments, grad_weight)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs(arguments, grad_weight)
    other, other_grad = on_device(case, seed=1)
    for tensor, values in zip((*arguments[:3], grad_weight), (*other[:3], other_grad), strict=True):
        tensor.copy_(values)
    arguments.temperature.fill_(7.0)
    graph.replay()
    assert_equal(captured, outputs(other._replace(temperature=torch.full_like(other.temperature, 7.0)), other_grad))


@pytest.mark.parametrize("case", [PER_LAYER, PER_CHANNEL], ids=str)
def test_compiled_equals_eager(case: Case) -> None:
    torch._dynamo.reset()
    arguments, grad_weight = on_device(case)

    def doubled(bit_logits: Tensor, gate_logits: Tensor, scale: Tensor, temperature: Tensor) -> Tensor:
        return 2 * functional.reconstruct(2 * bit_logits, gate_logits, scale, temperature)

    def weight_and_gradients(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaves = [tensor.detach().clone().requires_grad_() for tensor in arguments[:3]]
        weight = function(*leaves, arguments.temperature)
        weight.backward(grad_weight)
        return weight.detach(), *(leaf.grad for leaf in leaves)

    assert_equal(weight_and_gradients(torch.compile(doubled, fullgraph=True)), weight_and_gradients(doubled))


def test_no_call_waits_for_the_device() -> None:
    arguments, grad_weight = on_device(PER_CHANNEL)
    leaves = [tensor.requires_grad_() for tensor in arguments[:3]]
    functional.reconstruct(*leaves, arguments.temperature).backward(grad_weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        functional.reconstruct(*leaves, arguments.temperature).backward(grad_weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
