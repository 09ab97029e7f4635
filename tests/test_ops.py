"""Every implementation of the ops against float64, and the contract of ``_ops`` that all of them keep."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch._dynamo.testing
from helpers import (
    BFLOAT16,
    CASES,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    OUTPUTS,
    Arguments,
    Case,
    assert_within,
    autograd_of_reference,
    exact_outputs,
    lay_out,
    make_case,
    pool,
)
from packed_weights import make_planes, signed
from torch import Tensor

from csq_kernels import _native, backends, functional, reference
from csq_kernels._ops import CHECKS, SCHEMAS

IMPLEMENTATIONS = (
    "reference",
    "cpu-scalar",
    "cpu-avx2",
    "cpu-avx512",
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("triton", marks=pytest.mark.gpu),
)
PER_LAYER = Case((5, 7), tuple(range(8)), 8)
PER_CHANNEL = Case((5, 7), tuple(range(8)), 8, gates_per_channel=True, scale_per_channel=True, channel_axis=1)


class Implementation(NamedTuple):
    """The two ops as one implementation computes them, for tensors on the processor wherever it runs."""

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    device: str = "cpu"

    def weight(self, arguments: Arguments) -> Tensor:
        return self.forward(*arguments.to(self.device)).cpu()

    def outputs(self, arguments: Arguments, grad_weight: Tensor) -> tuple[Tensor, ...]:
        gradients = self.backward(grad_weight.to(self.device), *arguments.to(self.device))
        return self.weight(arguments), *(grad.cpu() for grad in gradients)

    @property
    def reference(self) -> "Implementation":
        """Plain PyTorch on the same device: its own rounding is what an implementation there is judged by."""
        return REFERENCE._replace(device=self.device)

    def eager(self, arguments: Arguments, grad_weight: Tensor) -> tuple[Tensor, ...]:
        outputs = autograd_of_reference(arguments.to(self.device), grad_weight.to(self.device))
        return tuple(output.cpu() for output in outputs)


REFERENCE = Implementation(reference.reconstruct, reference.reconstruct_backward)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> Implementation:
    backend, _, isa = request.param.partition("-")
    try:
        functions = [backends.implementation(op, backend) for op in ("reconstruct", "reconstruct_backward")]
    except backends.Unavailable as reason:
        pytest.skip(str(reason))
    if isa:
        if isa not in _native.module.supported_isas():
            pytest.skip(f"this processor has no {isa}")
        _native.module.set_isa(isa)
    return Implementation(*functions, device="cuda" if backend in ("cuda", "triton") else "cpu")


def seeds_of(case: Case) -> range:
    """How often to draw the inputs: the smaller the weight, the more of its results are a single number."""
    return range(64 if math.prod(case.shape) < 100 else 16)


@functools.cache
def judges(case: Case, on: Implementation) -> tuple[list[Tensor], list[Tensor]]:
    """``OUTPUTS`` of the case for all its seeds, in float64 and by plain PyTorch in the dtype of the case."""
    inputs = [(case.arguments(seed), case.grad_weight(seed)) for seed in seeds_of(case)]
    return pool([exact_outputs(*i) for i in inputs]), pool([on.eager(*i) for i in inputs])


def assert_same(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    """Equal in every bit, except that one NaN is as good as another."""
    for name, a, b in zip(OUTPUTS, first, second, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num()), name
        assert torch.equal(a.signbit(), b.signbit()), name


@pytest.mark.parametrize("case", [*CASES, *map(make_case, range(40))], ids=str)
def test_weight_and_every_gradient(implementation: Implementation, case: Case, poisoned: None) -> None:
    exact, eager = judges(case, implementation.reference)
    outputs = [implementation.outputs(case.arguments(seed), case.grad_weight(seed)) for seed in seeds_of(case)]
    assert all(output.is_contiguous() for output in outputs[0])
    for name, *values in zip(OUTPUTS, pool(outputs), exact, eager, strict=True):
        assert_within(*values, name=name)


@pytest.mark.parametrize("per_channel", [False, True], ids=["per_layer", "per_channel"])
def test_float64_is_the_reference(implementation: Implementation, per_channel: bool) -> None:
    case = Case((37, 29), (0, 2, 3), 4, 200.0, per_channel, per_channel, 1, FLOAT64)
    inputs = case.arguments(), case.grad_weight()
    assert_same(implementation.outputs(*inputs), implementation.reference.outputs(*inputs))


@pytest.mark.parametrize(
    "case",
    [
        Case((4097,), tuple(range(8)), 8),
        Case((300, 1001), (0, 1, 2), 3),
        Case((129, 1031), (0, 1, 2), 3, gates_per_channel=True, scale_per_channel=True),
        Case((129, 1031), (0, 1, 2), 3, gates_per_channel=True, scale_per_channel=True, channel_axis=1),
        Case((3, 70001), (0, 1, 2), 3, dtype=BFLOAT16, scale_per_channel=True),
    ],
    ids=str,
)
def test_result_depends_neither_on_the_run_nor_on_the_threads(implementation: Implementation, case: Case) -> None:
    if implementation == REFERENCE:
        pytest.skip("the order of PyTorch's own sums depends on its threads")
    inputs = case.arguments(), case.grad_weight()
    runs = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(implementation.outputs(*inputs))
    for run in runs[1:]:
        assert_same(run, runs[0])


def test_inputs_are_not_written(implementation: Implementation) -> None:
    for case in (PER_LAYER, PER_CHANNEL):
        arguments, grad_weight = case.arguments(), case.grad_weight()
        before = [t.clone() for t in (*arguments[:4], grad_weight)]
        implementation.outputs(arguments, grad_weight)
        assert all(map(torch.equal, (*arguments[:4], grad_weight), before))


EXTREMES = [1e30, -1e30, 3e38, -3e38, math.inf, -math.inf, 1e-40, -1e-40, 1e-45, 0.0, -0.0, 0.5, -0.5]


@pytest.mark.parametrize("temperature", [1.0, 30.0, 200.0, 5000.0])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
def test_extreme_logits_stay_finite(implementation: Implementation, dtype: torch.dtype, temperature: float) -> None:
    logits = torch.cartesian_prod(torch.tensor(EXTREMES), torch.tensor(EXTREMES)).to(dtype).T[:, None].contiguous()
    grad_weight = torch.rand(logits.shape[2:]).to(dtype)
    inputs = [
        (Arguments(logits, torch.tensor([gate]), torch.tensor(0.7), torch.tensor(temperature), [0], 1), grad_weight)
        for gate in EXTREMES
    ]
    outputs, exact, eager = (
        pool([compute(*i) for i in inputs]) for compute in (implementation.outputs, exact_outputs, implementation.eager)
    )
    for name, *values in zip(OUTPUTS, outputs, exact, eager, strict=True):
        assert_within(*values, name=name)


@pytest.mark.parametrize("size", [1, 7, 8, 9, 16, 33])
def test_nan_logit_gives_nan_at_its_place_only(implementation: Implementation, size: int) -> None:
    case = Case((3, size), (0, 1, 2), 3)
    for sign, plane, place in ((0, 0, (0, 0)), (1, 1, (1, size // 2)), (0, 2, (2, size - 1))):
        arguments = case.arguments()
        arguments.bit_logits[(sign, plane, *place)] = torch.nan
        expected = torch.zeros(case.shape, dtype=torch.bool)
        expected[place] = True
        weight, grad_bits, grad_gates, grad_scale = implementation.outputs(arguments, case.grad_weight())
        assert torch.equal(weight.isnan(), expected)
        assert torch.equal(grad_bits.isnan(), arguments.bit_logits.isnan())
        assert grad_gates.isnan().tolist() == [b == plane for b in range(3)]
        assert grad_scale.isnan()


@pytest.mark.parametrize("case", [PER_LAYER, PER_CHANNEL], ids=str)
def test_scale_of_zero(implementation: Implementation, case: Case) -> None:
    arguments = case.arguments()._replace(scale=torch.zeros_like(case.arguments().scale))
    inputs = arguments, case.grad_weight()
    weight, grad_bits, grad_gates, grad_scale = implementation.outputs(*inputs)
    assert not weight.any() and not grad_bits.any() and not grad_gates.any()
    assert_within(grad_scale, exact_outputs(*inputs)[3], implementation.eager(*inputs)[3])
    assert grad_scale.abs().min() > 0


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16, FLOAT16], ids=str)
@pytest.mark.parametrize("n_bits", [1, 2, 5, 8, 13, 16])
@pytest.mark.parametrize("per_channel", [False, True], ids=["per_layer", "per_channel"])
def test_decided_bits_equal_the_integer_model(
    implementation: Implementation, n_bits: int, per_channel: bool, dtype: torch.dtype
) -> None:
    bits = tuple(range(n_bits))
    case = Case((61, 67), bits, n_bits, 5000.0, per_channel, per_channel, 1, dtype)
    arguments = case.arguments()
    arguments = arguments._replace(
        bit_logits=arguments.bit_logits.sign() + (arguments.bit_logits == 0).to(dtype),
        gate_logits=arguments.gate_logits.sign(),
        scale=arguments.scale / 3,
    )
    codes = reference.integer_codes(arguments.bit_logits, arguments.gate_logits, arguments.bits, 1)
    expected = reference.hard_weight(codes, arguments.scale, n_bits, 1).to(dtype)
    assert torch.equal(implementation.weight(arguments), expected)
    assert torch.equal(implementation.weight(arguments._replace(hard_gates=True)), expected)


@pytest.mark.parametrize("hard_gates", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("size", [1, 8, 31, 4097])
def test_closed_planes_are_not_read(
    implementation: Implementation, size: int, hard_gates: bool, poisoned: None
) -> None:
    case = Case((size,), tuple(range(8)), 8, hard_gates=hard_gates)
    arguments, grad_weight = case.arguments(), case.grad_weight()
    closed = [0, 3, 7]
    arguments.gate_logits[closed] = -1e4
    if hard_gates:
        closed = (arguments.gate_logits <= 0).nonzero().flatten().tolist()
    expected = implementation.outputs(arguments, grad_weight)
    arguments.bit_logits[:, closed] = torch.nan
    outputs = implementation.outputs(arguments, grad_weight)
    assert_same(outputs, expected)
    assert all(torch.isfinite(output).all() for output in outputs)
    assert not outputs[1][:, closed].any() and not outputs[2][closed].any()


# test_autograd_registration is left out: it looks for a formula registered on the op, and ours is the
# autograd.Function above it; a graph through the bare op must not be claimed to be differentiable.
OPCHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


def packed_arguments(*weight_shape: int) -> tuple:
    """Planes, step, bias, coefficients and shape of a weight of 5 channels."""
    coefficients = signed(3)
    _, planes = make_planes(coefficients, 5, math.prod(weight_shape) // 5)
    return planes, torch.rand(5), torch.randn(5), coefficients, weight_shape


# Arguments of every op of the table, the test below being for whichever is there.
SAMPLES = {
    "reconstruct": PER_CHANNEL.arguments(),
    "reconstruct_backward": (PER_CHANNEL.grad_weight(), *PER_CHANNEL.arguments()),
    "bitserial_linear": (torch.randn(2, 3, 9), *packed_arguments(5, 9), "exact"),
    "bitserial_conv2d": (
        *(torch.randn(2, 4, 6, 7), *packed_arguments(5, 4, 3, 2)),
        *([2, 1], [1, 0], [1, 2], 1, "exact"),
    ),
    "bitserial_weight": (*(packed_arguments(5, 9)[i] for i in (0, 1, 3, 4)), 0),
}


@pytest.mark.parametrize("op", SCHEMAS)
def test_opcheck_of_the_whole_table(op: str) -> None:
    torch.library.opcheck(getattr(torch.ops.csq, op).default, SAMPLES[op], test_utils=OPCHECKS)


@pytest.mark.parametrize("layout", ["compact", "permuted", "strided"])
@pytest.mark.parametrize("case", [PER_LAYER, PER_CHANNEL, Case((0, 5)), Case(())], ids=str)
def test_opcheck(case: Case, layout: str) -> None:
    arguments, grad_weight = case.arguments(), case.grad_weight()
    arguments = arguments._replace(bit_logits=lay_out(arguments.bit_logits, layout))
    torch.library.opcheck(torch.ops.csq.reconstruct.default, tuple(arguments), test_utils=OPCHECKS)
    torch.library.opcheck(
        torch.ops.csq.reconstruct_backward.default,
        (lay_out(grad_weight, layout), *arguments),
        test_utils=OPCHECKS,
    )


def weight_and_gradients(reconstruct: Callable, arguments: Arguments, grad_weight: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in arguments[:3]]
    weight = reconstruct(
        *leaves,
        arguments.temperature,
        bits=arguments.bits,
        n_bits=arguments.n_bits,
        channel_axis=arguments.channel_axis,
        hard_gates=arguments.hard_gates,
    )
    weight.backward(grad_weight)
    return weight.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("case", [PER_LAYER, PER_CHANNEL, Case((9, 4), (0, 2), 4, hard_gates=True)], ids=str)
def test_compiled_equals_eager_and_compiles_once(case: Case) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(functional.reconstruct, fullgraph=True, backend=counter)
    arguments, grad_weight = case.arguments(), case.grad_weight()
    for step in range(12):
        arguments.temperature.fill_(1.7**step)
        expected = weight_and_gradients(functional.reconstruct, arguments, grad_weight)
        assert_same(weight_and_gradients(compiled, arguments, grad_weight), expected)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiled_by_inductor_equals_eager() -> None:
    torch._dynamo.reset()
    case = PER_CHANNEL

    def through_strides(bit_logits: Tensor, *rest: Tensor, **options) -> Tensor:
        # The op receives a result of the compiler and feeds one: neither needs to be contiguous.
        return 2 * functional.reconstruct(2 * bit_logits.transpose(2, 3), *rest, **options).T

    arguments = case.arguments()
    arguments = arguments._replace(bit_logits=arguments.bit_logits.transpose(2, 3).contiguous())
    grad_weight = case.grad_weight().T
    compiled = torch.compile(through_strides, fullgraph=True)
    assert_same(
        weight_and_gradients(compiled, arguments, grad_weight),
        weight_and_gradients(through_strides, arguments, grad_weight),
    )


def test_functional_defaults_and_unwanted_gradients() -> None:
    arguments = PER_LAYER.arguments()
    logits = arguments.bit_logits.requires_grad_()
    weight = functional.reconstruct(logits, *arguments[1:4])
    assert torch.equal(weight, functional.reconstruct(*arguments[:4], bits=list(range(8)), n_bits=8))
    weight.sum().backward()
    assert logits.grad is not None and arguments.gate_logits.grad is None and arguments.scale.grad is None


def meta(tensor: Tensor) -> Tensor:
    return tensor.to("meta")


def integers(tensor: Tensor) -> Tensor:
    return tensor.to(torch.int32)


def first_half(tensor: Tensor) -> Tensor:
    return tensor[: len(tensor) // 2]


# (argument that is wrong, what is done to it, the error); everything else is PER_CHANNEL: 8 planes of a 5 x 7 weight.
BAD = [
    ("bit_logits", integers, TypeError),
    ("bit_logits", lambda t: t[0, 0, 0, 0], ValueError),
    ("bit_logits", lambda t: t[0, 0, 0], ValueError),
    ("bit_logits", lambda t: t[:1], ValueError),
    ("bit_logits", lambda t: t[:, 1:], ValueError),
    ("gate_logits", lambda t: t[0, 0], ValueError),
    ("gate_logits", lambda t: t[:, 0][:3], ValueError),
    ("gate_logits", lambda t: t[:, :6], ValueError),
    ("gate_logits", lambda t: t[:7], ValueError),
    ("gate_logits", lambda t: t[None], ValueError),
    ("gate_logits", integers, TypeError),
    ("gate_logits", meta, ValueError),
    ("scale", first_half, ValueError),
    ("scale", lambda t: t[None], ValueError),
    ("scale", integers, TypeError),
    ("scale", meta, ValueError),
    ("temperature", lambda t: t[None], ValueError),
    ("temperature", integers, TypeError),
    ("temperature", meta, ValueError),
    ("bits", lambda bits: bits[::-1], ValueError),
    ("bits", lambda bits: [0, *bits[:-1]], ValueError),
    ("bits", lambda bits: [-1, *bits[1:]], ValueError),
    ("bits", lambda bits: [*bits[:-1], 8], ValueError),
    ("n_bits", lambda n: 0, ValueError),
    ("n_bits", lambda n: 17, ValueError),
    ("channel_axis", lambda axis: 2, ValueError),
    ("channel_axis", lambda axis: -1, ValueError),
    ("grad_weight", first_half, ValueError),
    ("grad_weight", integers, TypeError),
    ("grad_weight", meta, ValueError),
]


@pytest.mark.parametrize(("name", "spoil", "error"), BAD, ids=[f"{name}{i}" for i, (name, *_) in enumerate(BAD)])
@pytest.mark.parametrize("op", ["reconstruct", "reconstruct_backward"])
def test_bad_arguments_are_named(op: str, name: str, spoil: Callable, error: type[Exception]) -> None:
    arguments = PER_CHANNEL.arguments()._asdict()
    if op == "reconstruct_backward":
        arguments = {"grad_weight": PER_CHANNEL.grad_weight(), **arguments}
    elif name == "grad_weight":
        pytest.skip("only the backward has a grad_weight")
    arguments[name] = spoil(arguments[name])
    with pytest.raises(error, match=rf"^expected {name}\b.*, got "):
        CHECKS[op](*arguments.values())
    with pytest.raises(error, match=rf"expected {name}\b.*, got "):
        getattr(torch.ops.csq, op).default(*arguments.values())


@pytest.mark.parametrize("value", [math.nan, -1.0, 0.0, math.inf])
@pytest.mark.parametrize("op", ["reconstruct", "reconstruct_backward"])
def test_temperature_must_be_positive_and_finite_on_the_cpu(op: str, value: float) -> None:
    arguments = PER_LAYER.arguments()._replace(temperature=torch.tensor(value))
    leading = (PER_LAYER.grad_weight(),) if op == "reconstruct_backward" else ()
    with pytest.raises(ValueError, match="expected temperature .*, got "):
        getattr(torch.ops.csq, op).default(*leading, *arguments)
