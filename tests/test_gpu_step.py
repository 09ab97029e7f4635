"""The single-pass step on a CUDA device, for each backend that has one."""

import pytest
import torch
from helpers import BFLOAT16, Case, assert_within, pool
from step_layers import REFERENCE, Backend, StepCase, Stepped, assert_step, changed, closed_plane, exact, small_scales

from csq_kernels import backends
from csq_kernels.step import STEP_OPS

pytestmark = pytest.mark.gpu

EIGHT = tuple(range(8))
PER_CHANNEL = {"gates_per_channel": True, "scale_per_channel": True}
# Accesses that are wide and that are not, both logit dtypes, every rule and momentum; many blocks; odd shapes.
CASES = [
    *(
        StepCase(Case(shape, EIGHT, 8, dtype=dtype), rule, narrow)
        for shape in ((512, 384), (211, 293))
        for dtype in (torch.float32, BFLOAT16)
        for rule, narrow in (
            ("plain", False),
            ("sgd", False),
            ("adam", False),
            ("nesterov", True),
            ("adam", True),
        )
    ),
    *(
        StepCase(Case((7, inner), (1, 2), 4, gates_per_channel=gates, scale_per_channel=scale, channel_axis=axis))
        for inner in (31, 40)
        for gates, scale in ((True, False), (False, True), (True, True))
        for axis in (0, 1)
    ),
    StepCase(Case((300, 64, 3, 3), (0, 1, 2), 3, 200.0, **PER_CHANNEL), "adam", narrow=True),
    StepCase(Case((300, 7, 3, 3), (0, 1, 2), 3, 200.0, **PER_CHANNEL, channel_axis=1, dtype=BFLOAT16), "adam"),
    StepCase(Case((512, 384), EIGHT, 8, dtype=BFLOAT16), "adam", narrow=True, weight_dtype=BFLOAT16),
    StepCase(Case((512, 384), EIGHT, 8), weight_dtype=BFLOAT16),
    *(StepCase(Case((size,), tuple(range(16)), 16, 200.0), "adam", narrow=True) for size in (255, 256, 257)),
    StepCase(Case((), (0, 1), 2)),
    StepCase(Case((17, 31), (), 4)),
    StepCase(Case((0, 5))),
    *(StepCase(Case((130, inner), (1, 2), 4, hard_gates=True, scale_per_channel=True)) for inner in (700, 701)),
    StepCase(Case((130, 700), (1, 2), 4, hard_gates=True, gates_per_channel=True, dtype=BFLOAT16)),
    StepCase(Case((130, 700), (1, 2), 4, layout="permuted")),
]


@pytest.fixture(params=["cuda", "triton"])
def backend(request: pytest.FixtureRequest) -> Backend:
    try:
        return Backend(*(backends.implementation(op, request.param) for op in (*STEP_OPS, "reconstruct")))
    except backends.Unavailable as reason:
        pytest.skip(str(reason))


def assert_equal(actual: Stepped, expected: Stepped) -> None:
    for own, wanted in zip(actual.flat(), expected.flat(), strict=True):
        assert torch.equal(own.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_within_the_error_of_pytorch(backend: Backend, case: StepCase, poisoned: None) -> None:
    assert_step(backend, case, seeds=2 if case.weight.grad_weight().numel() > 10_000 else 64, device="cuda")


@pytest.mark.parametrize("narrow", [False, True])
def test_a_hundred_runs_give_the_same_bits(backend: Backend, narrow: bool) -> None:
    layer = StepCase(Case((512, 384), EIGHT, 8, dtype=BFLOAT16, **PER_CHANNEL), "adam", narrow).layer(device="cuda")
    expected = backend.step([layer])[0]
    for _ in range(100):
        assert_equal(backend.step([layer])[0], expected)


def test_many_layers_of_every_kind_at_once(backend: Backend) -> None:
    layers = [case.layer(seed, "cuda") for seed in range(2) for case in CASES if case.weight.layout == "compact"]
    for layer, own in zip(layers, backend.step(layers), strict=True):
        assert_equal(own, backend.step([layer])[0])


@pytest.mark.parametrize("narrow", [False, True])
def test_arrays_that_are_not_aligned(backend: Backend, narrow: bool) -> None:
    layer = StepCase(Case((37, 64), EIGHT, 8), "adam", narrow).layer(device="cuda")

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
        return room[1:].view(tensor.shape).copy_(tensor)

    # A step of copies would be aligned again.
    moved = changed(layer, shifted)
    backend.step_update([moved])
    expected = backend.step([layer])[0]
    assert torch.equal(moved.bit_logits, expected.bit_logits)
    assert torch.equal(moved.weight, expected.weight)


@pytest.mark.parametrize("inner", [130, 132])
@pytest.mark.parametrize("scale_per_channel", [False, True])
def test_gradient_of_a_scale_too_small_to_divide_by(backend: Backend, scale_per_channel: bool, inner: int) -> None:
    layers = [changed(layer, torch.Tensor.cuda) for layer in small_scales(scale_per_channel, inner)]
    every = [
        [own.step_sums(layer)[1:] for layer in inputs]
        for own, inputs in ((backend, layers), (REFERENCE, [exact(layer) for layer in layers]), (REFERENCE, layers))
    ]
    assert_within(*(pool(found)[0] for found in every), name="grad_scale")


def test_planes_behind_closed_gates_move_by_their_momentum(backend: Backend) -> None:
    layer = changed(closed_plane(), torch.Tensor.cuda)
    own, eager = (functions.step([layer])[0] for functions in (backend, REFERENCE))
    assert torch.isfinite(own.weight).all()
    assert own.bit_logits.isnan().nonzero().tolist() == [[0, 1, 3, 7], [1, 1, 3, 7]]
    torch.testing.assert_close(own.bit_logits[:, 1], eager.bit_logits[:, 1], equal_nan=True)


def test_work_goes_to_the_current_stream(backend: Backend) -> None:
    layer = StepCase(Case((512, 384), EIGHT, 8)).layer(device="cuda")
    expected = backend.step([layer])[0]
    late = changed(layer, torch.Tensor.clone)
    late.bit_logits.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Whoever does not wait for this stream reads the zeros.
        torch.cuda._sleep(100_000_000)
        late.bit_logits.copy_(layer.bit_logits)
        backend.step_update([late])
    stream.synchronize()
    assert torch.equal(late.bit_logits, expected.bit_logits)
    assert torch.equal(late.weight, expected.weight)


@pytest.mark.parametrize("hard_gates", [False, True])
def test_no_call_waits_for_the_device(backend: Backend, hard_gates: bool) -> None:
    layer = StepCase(Case((37, 64), EIGHT, 8, hard_gates=hard_gates), "adam", narrow=True).layer(device="cuda")
    backend.step([layer])
    torch.cuda.set_sync_debug_mode("error")
    try:
        backend.step([layer])
    finally:
        torch.cuda.set_sync_debug_mode("default")
