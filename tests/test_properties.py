"""Invariants that hold for any shape, scheme and schedule, on examples that hypothesis chooses."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis.extra import numpy as arrays
from torch import nn

import csq_kernels as csq
from csq_kernels import _native, bitplanes, budget, functional, reference

EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

shapes = arrays.array_shapes(min_dims=1, max_dims=4, max_side=7)
schemes = st.integers(1, 16).flatmap(
    lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1).map(lambda bits: sorted(bits)))
)


@st.composite
def layers(draw):
    """The arguments of ``reconstruct`` with gates and scale for each channel of axis 0, or for the layer."""
    shape, (n_bits, bits) = draw(shapes), draw(schemes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    channels = (shape[0],) if draw(st.booleans()) else ()
    logits = torch.randn(2, len(bits), *shape, generator=generator)
    gates = torch.randn((len(bits), *channels), generator=generator)
    scale = torch.randn(channels, generator=generator)
    temperature = torch.tensor(draw(st.floats(0.5, 50)))
    return logits, gates, scale, temperature, {"bits": bits, "n_bits": n_bits}


def gradients(logits, gates, scale, temperature, options, grad):
    leaves = [tensor.clone().requires_grad_() for tensor in (logits, gates, scale)]
    weight = functional.reconstruct(*leaves, temperature, **options)
    return weight.detach(), torch.autograd.grad(weight, leaves, grad)


@EXAMPLES
@given(layers(), st.sampled_from([0.5, 2.0, -4.0]))
def test_linear_in_the_scale(layer, factor):
    """Powers of two are exact, so this holds to the last bit."""
    logits, gates, scale, temperature, options = layer
    weight = functional.reconstruct(logits, gates, scale, temperature, **options)
    assert torch.equal(functional.reconstruct(logits, gates, factor * scale, temperature, **options), factor * weight)


@EXAMPLES
@given(layers())
def test_swapping_the_signs_negates_the_weight(layer):
    logits, gates, scale, temperature, options = layer
    weight = functional.reconstruct(logits, gates, scale, temperature, **options)
    assert torch.equal(functional.reconstruct(logits.flip(0), gates, scale, temperature, **options), -weight)


@EXAMPLES
@given(layers(), st.data())
def test_gradient_of_the_permuted_weight_is_the_permuted_gradient(layer, data):
    """Elementwise gradients move with their weight bit for bit; sums may round differently."""
    logits, gates, scale, temperature, options = layer
    shape = logits.shape[2:]
    rest = math.prod(shape[1:])
    order = torch.tensor(data.draw(st.permutations(range(rest))), dtype=torch.int64)

    def permuted(tensor):
        lead = tensor.ndim - len(shape) + 1
        flat = tensor.reshape(*tensor.shape[:lead], rest)
        return flat[..., order].reshape(tensor.shape)

    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight, (own, *sums) = gradients(logits, gates, scale, temperature, options, grad)
    other, (moved, *other_sums) = gradients(permuted(logits), gates, scale, temperature, options, permuted(grad))
    assert torch.equal(other, permuted(weight)) and torch.equal(moved, permuted(own))
    for a, b in zip(sums, other_sums, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(grad.abs().sum() * scale.abs().max() + 1))


@pytest.mark.skipif(_native.module is None, reason="the native module is not built")
@EXAMPLES
@given(layers(), st.integers(2, 5))
def test_threads_change_no_bit(layer, threads):
    logits, gates, scale, temperature, options = layer
    grad = torch.randn(logits.shape[2:], generator=torch.Generator().manual_seed(1))
    torch.set_num_threads(1)
    alone, own = gradients(logits, gates, scale, temperature, options, grad)
    torch.set_num_threads(threads)
    together, shared = gradients(logits, gates, scale, temperature, options, grad)
    torch.set_num_threads(1)
    assert torch.equal(alone, together)
    assert all(torch.equal(a, b) for a, b in zip(own, shared, strict=True))


@EXAMPLES
@given(schemes, shapes, st.integers(0, 2**31), st.floats(-3, 3))
def test_packed_equals_the_hard_integers(scheme, shape, seed, drift):
    """Any digits at any set of exponents: what the planes hold is equation (7), with no more planes than promised."""
    _, bits = scheme
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, len(bits), *shape, generator=generator) + drift
    codes = reference.integer_codes(logits, torch.ones(len(bits)), bits, 0).to(torch.int32)
    planes, coefficients = bitplanes.encode(codes, bits)
    assert torch.equal(bitplanes.decode(planes, coefficients, shape), codes)
    assert len(coefficients) <= budget.stored_bits(bits)


@EXAMPLES
@given(
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3),
    st.integers(2, 8),
    st.floats(0.3, 1.2),
    st.integers(0, 2**31),
)
def test_the_repair_meets_any_budget_in_reach(sizes, n_bits, share, seed):
    model = nn.Sequential(*(nn.Linear(*size) for size in sizes))
    csq.prepare_(model, csq.Config(n_bits=n_bits))
    generator = torch.Generator().manual_seed(seed)
    for layer in model:
        layer.gate_logits.data = torch.randn(n_bits, generator=generator)
    limit = max(2.0, share * (n_bits + 1))
    report = csq.finalize_(model, budget=f"{limit:.6f} bits")
    assert report.budget_met and report.cost <= limit
    assert all(row.paper_bits <= n_bits for row in report.layers)


@EXAMPLES
@given(st.integers(1, 40), st.integers(1, 40), schemes, st.integers(0, 2**31))
def test_a_packed_layer_computes_what_the_hard_one_does(inputs, outputs, scheme, seed):
    n_bits, bits = scheme
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, outputs))
    csq.prepare_(model, csq.Config(n_bits=n_bits))
    with torch.no_grad():
        for bit in range(n_bits):
            model[0].gate_logits[bit] = 1.0 if bit in bits else -1.0
    csq.finalize_(model)
    x = torch.randn(3, inputs)
    exact = x.double() @ model[0].weight.double().T + model[0].bias.double()
    size = x.abs().double() @ model[0].weight.abs().double().T + model[0].bias.abs().double()
    plain = (model(x).double() - exact).abs()
    csq.pack_(model)
    packed = (model(x).double() - exact).abs()
    assert bool((packed <= 2 * plain + torch.finfo(torch.float32).eps * size).all())
