"""Invariants that hold for any shape, scheme and schedule, on examples that hypothesis chooses."""

import io
import math

import hypothesis.strategies as st
import pytest
import torch
from helpers import Case
from hypothesis import HealthCheck, given, settings
from hypothesis.extra import numpy as arrays
from packed_weights import make_planes, signed
from step_layers import RULES, StepCase
from torch import nn

import csq_kernels as csq
from csq_kernels import _native, backends, bitplanes, budget, functional, reference
from csq_kernels._ops import PRECISIONS
from csq_kernels.search import SCHEDULES

native = pytest.mark.skipif(_native.module is None, reason="the native module is not built")
EXAMPLES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

shapes = arrays.array_shapes(min_dims=1, max_dims=4, max_side=7)
schemes = st.integers(1, 16).flatmap(
    lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1).map(lambda bits: sorted(bits)))
)


# Most of these, times their planes, are large enough for a team of threads.
wide_shapes = arrays.array_shapes(min_dims=2, max_dims=2, min_side=50, max_side=130)


@st.composite
def layers(draw, shapes=shapes):
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
    """Powers of two are exact, so this holds to the last bit of a normal number."""
    logits, gates, scale, temperature, options = layer
    weight = functional.reconstruct(logits, gates, scale, temperature, **options)
    scaled = functional.reconstruct(logits, gates, factor * scale, temperature, **options)
    # Below the smallest normal number there are fewer bits: one of them may be off.
    tiny = torch.finfo(torch.float32).tiny
    normal = (weight.abs() >= tiny) & (scaled.abs() >= tiny)
    assert torch.equal(scaled[normal], factor * weight[normal])
    assert bool(((scaled - factor * weight).abs() <= 4 * 2.0**-23 * tiny).all())


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


@native
@EXAMPLES
@given(layers(), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), st.data())
def test_strides_change_no_bit(layer, dtype, data):
    """Whatever the order of axes and the steps in memory, of the logits and of the incoming gradient.

    Not in float64: there PyTorch serves, whose vectorized and scalar functions round differently.
    """
    logits, gates, scale, temperature, options = layer
    logits = logits.to(dtype)
    grad = torch.randn(logits.shape[2:], generator=torch.Generator().manual_seed(1)).to(dtype)

    def scattered(tensor):
        order = data.draw(st.permutations(range(tensor.ndim)))
        steps = data.draw(st.tuples(*[st.integers(1, 3)] * tensor.ndim))
        room = tensor.new_full(
            [size * step for size, step in zip(tensor.permute(order).shape, steps, strict=True)], math.nan
        )
        back = [order.index(axis) for axis in range(tensor.ndim)]
        view = room[tuple(slice(None, None, step) for step in steps)].permute(back)
        return view.copy_(tensor)

    weight, own = gradients(logits, gates, scale, temperature, options, grad)
    leaves = [scattered(tensor).requires_grad_() for tensor in (logits, gates, scale)]
    other = functional.reconstruct(*leaves, temperature, **options)
    assert torch.equal(other, weight)
    for a, b in zip(torch.autograd.grad(other, leaves, scattered(grad)), own, strict=True):
        assert torch.equal(a, b)


@native
@settings(EXAMPLES, max_examples=30)
@given(layers(wide_shapes), st.integers(2, 5))
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


@native
@settings(EXAMPLES, max_examples=30)
@given(
    *(st.integers(1, side) for side in (40, 200, 500)),
    st.integers(1, 9),
    st.sampled_from(PRECISIONS),
    st.integers(2, 5),
)
def test_threads_change_no_bit_of_a_packed_product(batch, rows, columns, width, precision, threads):
    coefficients = signed(width)
    _, planes = make_planes(coefficients, rows, columns)
    planes = functional.tile("bitserial_linear", planes, coefficients, (rows, columns))
    generator = torch.Generator().manual_seed(batch)
    input, step = torch.randn(batch, columns, generator=generator), torch.rand(rows, generator=generator)
    options = {"coefficients": coefficients, "weight_shape": (rows, columns), "precision": precision}
    torch.set_num_threads(1)
    alone = functional.bitserial_linear(input, planes, step, **options)
    torch.set_num_threads(threads)
    assert torch.equal(functional.bitserial_linear(input, planes, step, **options), alone)


@native
@settings(EXAMPLES, max_examples=30)
@given(
    wide_shapes,
    schemes,
    st.sampled_from(sorted(RULES)),
    st.booleans(),
    st.booleans(),
    st.integers(2, 5),
)
def test_threads_change_no_bit_of_the_single_pass_step(shape, scheme, rule, narrow, per_channel, threads):
    n_bits, bits = scheme
    weight = Case(shape, tuple(bits), n_bits, gates_per_channel=per_channel, scale_per_channel=per_channel)
    results = []
    for count in (1, threads):
        torch.set_num_threads(count)
        layer = StepCase(weight, rule, narrow).layer()
        sums = backends.step_function("step_sums", "cpu")(layer)
        backends.step_function("step_update", "cpu")([layer])
        results.append([layer.weight, layer.bit_logits, *layer.momenta, *layer.momentum_scales, *sums])
    for alone, together in zip(*results, strict=True):
        assert torch.equal(alone.float(), together.float())


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


@settings(EXAMPLES, max_examples=40)
@given(
    st.integers(2, 40),
    st.floats(0, 1, exclude_max=True),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(SCHEDULES),
    st.floats(1, 300),
    st.floats(1, 1e6),
    st.floats(0.1, 10),
    st.floats(1.3, 4),
)
def test_temperature_and_target_rise_and_fall_to_what_was_promised(
    total_steps, search_share, decision_share, schedule, search_temperature, final_temperature, lateness, limit
):
    model = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))
    csq.prepare_(model, csq.Config(n_bits=4))
    search = csq.Search(
        model,
        f"{limit:.3f} bits" if limit >= 2 else f"{limit:.3f} paper bits",
        total_steps,
        search_share=search_share,
        decision_share=decision_share,
        schedule=schedule,
        search_temperature=search_temperature,
        final_temperature=final_temperature,
        lateness=lateness,
    )
    stages, temperatures, targets = [], [], []
    for _ in range(total_steps):
        stages.append(search.stage)
        temperatures.append(search.temperature)
        targets.append(search.target())
        assert model[0].temperature.item() == pytest.approx(search.temperature)
        search.step()
    searching = stages.count("search")
    assert stages == ["search"] * searching + ["finetune"] * (total_steps - searching)
    assert 1 <= searching < total_steps and abs(searching - total_steps * search_share) <= 1
    for stage, last in ((slice(0, searching), search_temperature), (slice(searching, None), final_temperature)):
        rising = temperatures[stage]
        assert rising[0] == 1.0 and rising == sorted(rising) and rising[-1] <= last * (1 + 1e-9)
    assert search.temperature == pytest.approx(final_temperature)
    assert targets[0] == search.first_cost
    falling = targets if targets[-1] <= targets[0] else targets[::-1]
    assert falling == sorted(falling, reverse=True) and search.target() == pytest.approx(search.cost.budget.value)
    assert csq.report(model, str(search.cost.budget)).budget_met


def short_run(total_steps, optimizer_class, options, schedule, interruptions):
    """The state after a search in which the process ended after each of the steps ``interruptions``."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 6), torch.randint(0, 3, (16,))
    saved = None
    for first, last in zip([0, *interruptions], [*interruptions, total_steps], strict=True):
        torch.manual_seed(0 if saved is None else 1)
        model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
        csq.prepare_(model, csq.Config(n_bits=5))
        if saved is not None:
            states = torch.load(io.BytesIO(saved), weights_only=True)
            model.load_state_dict(states["model"])
        optimizer = optimizer_class(model, 0.05, gate_lr=0.1, **options)
        search = csq.Search(model, "3 bits", total_steps, optimizer=optimizer, schedule=schedule)
        if saved is not None:
            optimizer.load_state_dict(states["optimizer"])
            search.load_state_dict(states["search"])
        for _ in range(first, last):
            loss = nn.functional.cross_entropy(model(x), y) + search.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            search.step()
        file = io.BytesIO()
        parts = {"model": model, "optimizer": optimizer, "search": search}
        torch.save({name: part.state_dict() for name, part in parts.items()}, file)
        saved = file.getvalue()
    return torch.load(io.BytesIO(saved), weights_only=True)


@settings(EXAMPLES, max_examples=6)
@given(
    st.integers(3, 16).flatmap(
        lambda total: st.tuples(st.just(total), st.sets(st.integers(1, total - 1), min_size=1, max_size=3).map(sorted))
    ),
    st.sampled_from([(csq.optim.SGD, {"momentum": 0.9}), (csq.optim.SGD, {}), (csq.optim.AdamW, {})]),
    st.booleans(),
    st.sampled_from(SCHEDULES),
)
def test_interruptions_anywhere_change_no_bit(run, optimizer, narrow, schedule):
    total_steps, interruptions = run
    optimizer_class, options = optimizer
    options = options | {"narrow": narrow}
    interrupted = short_run(total_steps, optimizer_class, options, schedule, interruptions)
    whole = short_run(total_steps, optimizer_class, options, schedule, [])
    for mine, theirs in zip(
        torch.utils._pytree.tree_leaves(interrupted), torch.utils._pytree.tree_leaves(whole), strict=True
    ):
        assert type(mine) is type(theirs)
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == theirs.dtype and torch.equal(mine.double(), theirs.double())
        else:
            assert mine == theirs
