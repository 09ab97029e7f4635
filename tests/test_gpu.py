"""What only a CUDA device can show. ``test_ops.py`` judges the same backends there on every small case."""

from collections.abc import Callable

import pytest
import torch
from helpers import BFLOAT16, FLOAT16, OUTPUTS, Arguments, Case, assert_within, autograd_of_reference, exact_outputs
from torch import Tensor
from torch.nn.functional import linear as functional_linear

from csq_kernels import backends, functional, nn

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
    assert_accurate(outputs(*inputs), inputs)


@pytest.mark.parametrize("case", [LARGE[0], LARGE[2], LARGE[4], LARGE[-1], PER_CHANNEL], ids=str)
def test_a_hundred_runs_give_the_same_bits(outputs: Outputs, case: Case) -> None:
    inputs = on_device(case)
    expected = outputs(*inputs)
    for _ in range(100):
        assert_equal(outputs(*inputs), expected)


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


@pytest.mark.parametrize("case", [LARGE[0], LARGE[4]], ids=str)
def test_two_streams_at_once(outputs: Outputs, case: Case) -> None:
    inputs = [on_device(case, seed) for seed in (0, 1)]
    expected = [outputs(*i) for i in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    actual: list[list[tuple[Tensor, ...]]] = [[], []]
    for _ in range(5):
        for stream, own, found in zip(streams, inputs, actual, strict=True):
            with torch.cuda.stream(stream):
                found.append(outputs(*own))
    torch.cuda.synchronize()
    for found, wanted in zip(actual, expected, strict=True):
        for run in found:
            assert_equal(run, wanted)


def test_tensors_of_another_device(outputs: Outputs) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    arguments, grad_weight = PER_CHANNEL.arguments().to("cuda:1"), PER_CHANNEL.grad_weight().to("cuda:1")
    with torch.cuda.device(0):
        actual = outputs(arguments, grad_weight)
    assert all(output.device == torch.device("cuda:1") for output in actual)
    assert_equal(tuple(output.cuda(0) for output in actual), outputs(*on_device(PER_CHANNEL)))


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


def test_autocast_leaves_the_weight_alone() -> None:
    layer = nn.CSQLinear(192, 96, gate_granularity="channel", device="cuda")
    input = torch.randn(40, 192, device="cuda")
    weight = layer.weight.detach()
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.equal(layer.weight.detach(), weight)
        output = layer(input)
    assert output.dtype == BFLOAT16
    assert torch.equal(output, functional_linear(input.bfloat16(), weight.bfloat16(), layer.bias.bfloat16()))
    output.float().square().sum().backward()
    for name in ("bit_logits", "gate_logits", "scale"):
        gradient = getattr(layer, name).grad
        assert gradient.dtype == torch.float32 and torch.isfinite(gradient).all() and gradient.any(), name


@pytest.mark.parametrize(
    "case",
    [
        LARGE[0],
        Case((2048, 2048), EIGHT, 8, dtype=BFLOAT16, gates_per_channel=True, scale_per_channel=True),
        Case((4096, 4096), EIGHT, 8, gates_per_channel=True, scale_per_channel=True, channel_axis=1),
    ],
    ids=str,
)
def test_no_memory_beyond_the_results(case: Case) -> None:
    arguments, grad_weight = on_device(case)
    forward, backward = (backends.choose(op, "cuda")[1] for op in ("reconstruct", "reconstruct_backward"))

    def peak(call: Callable[[], object]) -> int:
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    logits = arguments.bit_logits.nbytes
    assert peak(lambda: forward(*arguments)) <= grad_weight.nbytes + 4096
    # The sums of the blocks: a few of 8 bytes per plane and block, whatever the layout.
    assert peak(lambda: backward(grad_weight, *arguments)) <= 1.05 * logits


# Beyond 2^31 weights; the logits of the second sign lie beyond 2^32.
@pytest.mark.slow
@pytest.mark.parametrize("per_channel", [False, True], ids=["per_layer", "per_channel"])
def test_more_than_two_to_the_31_weights(outputs: Outputs, request: pytest.FixtureRequest, per_channel: bool) -> None:
    if "reference" in request.node.callspec.params.values():
        pytest.skip("plain PyTorch needs more memory")
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of free device memory")
    rows, columns = 2**16 + 8, 2**15
    generator = torch.Generator("cuda").manual_seed(0)
    # A period that divides no power of two, so that a wrapped index reads another value.
    period = torch.randn(2, 1_000_003, dtype=BFLOAT16, device="cuda", generator=generator) / 30
    period[0] += 0.02  # or the sums would vanish
    copies = -(-rows * columns // period.shape[1])
    logits = torch.empty(2, 1, rows, columns, dtype=BFLOAT16, device="cuda")
    for sign in range(2):
        logits[sign].view(-1).copy_(period[sign].repeat(copies)[: rows * columns])
    grad_weight = torch.ones(rows, columns, dtype=BFLOAT16, device="cuda")
    gates = torch.full((1, rows) if per_channel else (1,), 0.05, device="cuda")
    scale = torch.full((rows,) if per_channel else (), 0.7, device="cuda")
    arguments = Arguments(logits, gates, scale, torch.tensor(30.0, device="cuda"), [0], 1)
    weight, grad_bits, grad_gates, grad_scale = outputs(arguments, grad_weight)
    sums = torch.zeros(2, dtype=torch.float64, device="cuda")
    step = 2**13
    for start in range(0, rows, step):
        block = slice(start, min(start + step, rows))
        own = arguments._replace(
            bit_logits=logits[:, :, block].contiguous(),
            gate_logits=gates[:, block].contiguous() if per_channel else gates,
            scale=scale[block] if per_channel else scale,
        )
        expected = outputs(own, grad_weight[block])
        assert torch.equal(weight[block], expected[0])
        assert torch.equal(grad_bits[:, :, block], expected[1])
        sums += torch.stack([expected[2].double().sum(), expected[3].double().sum()])
    actual = torch.stack([grad_gates.double().sum(), grad_scale.double().sum()])
    torch.testing.assert_close(actual, sums, rtol=1e-6, atol=0)


def test_no_call_waits_for_the_device() -> None:
    arguments, grad_weight = on_device(PER_CHANNEL)
    leaves = [tensor.requires_grad_() for tensor in arguments[:3]]
    functional.reconstruct(*leaves, arguments.temperature).backward(grad_weight)
    torch.cuda.set_sync_debug_mode("error")
    try:
        functional.reconstruct(*leaves, arguments.temperature).backward(grad_weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
