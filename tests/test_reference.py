"""The reference against equations (3) to (6): finite differences, autograd, and a model written from them anew."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import FLOAT32, FLOAT64, OUTPUTS, Case, assert_within, autograd_of_reference, pool
from torch import Tensor

from csq_kernels import functional, reference

SMALL = [
    *(Case((3, 2), tuple(range(n)), n, 2.0, dtype=FLOAT64) for n in range(1, 5)),
    Case((), (0, 1), 2, 2.0, dtype=FLOAT64),
    Case((3, 2), (0, 2), 4, 2.0, dtype=FLOAT64),
    *(
        Case((3, 2), (0, 1, 2), 3, 2.0, gates, scale, axis, FLOAT64)
        for gates, scale in ((True, False), (False, True), (True, True))
        for axis in (0, 1)
    ),
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case: Case) -> None:
    arguments = case.arguments()
    leaves = [t.requires_grad_() for t in arguments[:3]]

    def weight(*leaves: Tensor) -> Tensor:
        return functional.reconstruct(
            *leaves,
            arguments.temperature,
            bits=arguments.bits,
            n_bits=arguments.n_bits,
            channel_axis=arguments.channel_axis,
        )

    assert torch.autograd.gradcheck(weight, leaves)


@pytest.mark.parametrize("hard_gates", [False, True], ids=["soft", "hard"])
@pytest.mark.parametrize("case", [*SMALL, Case((0, 2), (0, 1), 2, dtype=FLOAT64)], ids=str)
def test_backward_equals_autograd_of_forward(case: Case, hard_gates: bool) -> None:
    arguments, grad_weight = case.arguments()._replace(hard_gates=hard_gates), case.grad_weight()
    expected = autograd_of_reference(arguments, grad_weight)[1:]
    for actual, grad in zip(reference.reconstruct_backward(grad_weight, *arguments), expected, strict=True):
        torch.testing.assert_close(actual, grad, rtol=1e-12, atol=1e-14)


def test_hard_limit() -> None:
    logits = torch.tensor([[[0.3, -0.1, 2.0], [1.0, -1.0, 0.2]], [[-0.3, 0.1, 1.0], [-1.0, 1.0, -0.2]]])
    gates = torch.tensor([0.5, 0.5])
    codes = reference.integer_codes(logits, gates, [0, 3], 0)
    assert codes.dtype == torch.int32 and codes.tolist() == [9, -9, 8]
    weight = reference.hard_weight(codes, torch.tensor(3.0, dtype=FLOAT64), 4, 0)
    assert weight.tolist() == [9 * 0.2, -9 * 0.2, 8 * 0.2]
    assert reference.integer_codes(logits, -gates, [0, 3], 0).tolist() == [0, 0, 0]
    per_channel = torch.tensor([[0.5, 0.5, 0.5], [0.5, -0.5, 0.0]])
    assert reference.integer_codes(logits, per_channel, [0, 3], 0).tolist() == [9, -1, 0]


def linear(weight: Tensor) -> Tensor:
    inputs = torch.linspace(-1, 1, 11 * weight.shape[1], dtype=FLOAT64).view(11, -1).to(weight.dtype)
    return F.linear(inputs, weight)


def depthwise_conv(weight: Tensor) -> Tensor:
    channels = weight.shape[0]
    inputs = torch.linspace(-1, 1, 2 * channels * 63, dtype=FLOAT64).view(2, channels, 9, 7).to(weight.dtype)
    return F.conv2d(inputs.sin(), weight, padding=1, groups=channels)


def strided_conv(weight: Tensor) -> Tensor:
    channels = weight.shape[1]
    inputs = torch.linspace(-3, 3, 2 * channels * 63, dtype=FLOAT64).view(2, channels, 9, 7).to(weight.dtype)
    return F.conv2d(inputs.cos(), weight, stride=2, padding=1)


LAYERS = [(linear, (13, 7)), (depthwise_conv, (6, 1, 3, 3)), (strided_conv, (5, 3, 3, 3))]


def loss_of(outputs: Tensor) -> Tensor:
    return (outputs + 0.3).square().mean()


def weight_of_the_equations(p: list[Tensor], q: list[Tensor], u: list[Tensor], s: Tensor, beta: float) -> Tensor:
    """(1), (2), (3) with one tensor per bit; ``u[b]`` and ``s`` broadcast against the weight."""
    n = len(p)
    weight = torch.zeros_like(p[0])
    for b in range(n):
        c_b = 2**b / (2**n - 1)
        positive = 1 / (1 + torch.exp(-beta * p[b]))
        negative = 1 / (1 + torch.exp(-beta * q[b]))
        gate = 1 / (1 + torch.exp(-beta * u[b]))
        weight = weight + s * c_b * gate * (positive - negative)
    return weight


def grads_of_the_equations(layer: Callable, case: Case, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """``OUTPUTS`` of a loss behind ``layer``, from the equations and autograd alone, stacked as the op has them."""
    arguments = case.arguments(seed)
    column = (-1, *[1] * (len(case.shape) - 1))
    p, q = ([t.to(dtype).requires_grad_() for t in planes] for planes in arguments.bit_logits)
    u = [(t.view(column) if t.ndim else t).to(dtype).requires_grad_() for t in arguments.gate_logits]
    s = (arguments.scale.view(column) if arguments.scale.ndim else arguments.scale).to(dtype).requires_grad_()
    weight = weight_of_the_equations(p, q, u, s, case.temperature)
    loss_of(layer(weight)).backward()
    return (
        weight.detach(),
        torch.stack([torch.stack([t.grad for t in planes]) for planes in (p, q)]),
        torch.stack([t.grad for t in u]).view(arguments.gate_logits.shape),
        s.grad.view(arguments.scale.shape),
    )


def grads_of_the_op(layer: Callable, case: Case, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    arguments = case.arguments(seed).to(dtype)
    leaves = [t.requires_grad_() for t in arguments[:3]]
    weight = functional.reconstruct(*leaves, arguments.temperature)
    loss_of(layer(weight)).backward()
    return weight.detach(), *(leaf.grad for leaf in leaves)


def test_gradients_may_be_those_of_another_temperature() -> None:
    case = Case((4, 6), tuple(range(3)), 3, 30.0, True, True)
    arguments, softer = case.arguments(0).to(FLOAT64), torch.tensor(2.0, dtype=FLOAT64)
    leaves = [tensor.requires_grad_() for tensor in arguments[:3]]
    weight = functional.reconstruct(*leaves, arguments.temperature, gradient_temperature=softer)
    assert torch.equal(weight, functional.reconstruct(*leaves, arguments.temperature))
    ours = torch.autograd.grad(weight.square().sum() / 2, leaves)
    soft = torch.autograd.grad(functional.reconstruct(*leaves, softer), leaves, grad_outputs=weight.detach())
    own = torch.autograd.grad(weight.detach().mul(functional.reconstruct(*leaves, arguments.temperature)).sum(), leaves)
    for actual, expected, other in zip(ours, soft, own, strict=True):
        assert torch.equal(actual, expected) and not torch.allclose(actual, other)
    with pytest.raises(ValueError, match=r"expected gradient_temperature of shape \(\), got \(1,\)"):
        functional.reconstruct(*leaves, arguments.temperature, gradient_temperature=softer[None])


@pytest.mark.parametrize("per_channel", [False, True], ids=["per_layer", "per_channel"])
@pytest.mark.parametrize("temperature", [1.0, 30.0])
@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[layer.__name__ for layer, _ in LAYERS])
def test_layers_follow_the_equations(
    layer: Callable, shape: tuple[int, ...], temperature: float, per_channel: bool
) -> None:
    # Logits hold float32 values in both dtypes, so that the float64 result is the truth for the float32 one.
    case = Case(shape, tuple(range(6)), 6, temperature, per_channel, per_channel)
    seeds = range(16)
    exact = pool([grads_of_the_equations(layer, case, FLOAT64, seed) for seed in seeds])
    double = pool([grads_of_the_op(layer, case, FLOAT64, seed) for seed in seeds])
    for name, actual, expected in zip(OUTPUTS, double, exact, strict=True):
        # Relative to the largest: an element that cancels to nearly 0 has no relative accuracy of its own.
        assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max(), name
    eager = pool([grads_of_the_equations(layer, case, FLOAT32, seed) for seed in seeds])
    single = pool([grads_of_the_op(layer, case, FLOAT32, seed) for seed in seeds])
    for name, *values in zip(OUTPUTS, single, exact, eager, strict=True):
        assert_within(*values, name=name)
