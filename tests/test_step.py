"""The single-pass step against plain PyTorch in float64, for every instruction set; and its narrow formats."""

import dataclasses
import itertools
import random

import pytest
import torch
from helpers import BFLOAT16, FLOAT32, FLOAT64, assert_within
from torch import Tensor

from csq_kernels import _native, backends, functional, reference_step
from csq_kernels.step import MOMENTUM_BLOCK, Rule, StepLayer, Vectors, check_step, mix

native = pytest.mark.skipif(_native.module is None, reason="needs the native module")
ISAS = _native.module.supported_isas() if _native.module is not None else []
RULES = {
    "plain": Rule.sgd(1, 0.1, 0.0, 0.0, False, False),
    "momentum": Rule.sgd(2, 0.1, 0.9, 0.3, False, False),
    "nesterov": Rule.sgd(1, 0.1, 0.9, 0.0, True, True),
    "adam": Rule.adam(3, 0.1, (0.9, 0.999), 1e-8, False),
}
# Gates, scale per channel.
GRANULARITIES = ((False, False), (False, True), (True, False), (True, True))
SHAPES = ((), (1,), (37, 29), (4099,), (67, 1, 3, 3), (5, 300, 7))


def make_layer(
    shape: tuple[int, ...],
    rule: Rule,
    gates_per_channel: bool = False,
    scale_per_channel: bool = True,
    bits: tuple[int, ...] = (0, 2, 3, 4),
    channel_axis: int = 0,
    hard_gates: bool = False,
    narrow: bool = False,
    logits: torch.dtype = FLOAT32,
    weight: torch.dtype = FLOAT32,
    seed: int = 0,
) -> StepLayer:
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    channels = shape[channel_axis : channel_axis + 1]

    def vectors(temperature: float) -> Vectors:
        gates = normal(len(bits), *channels * gates_per_channel)
        scale = 0.5 + normal(*channels * scale_per_channel).abs()
        return Vectors(gates, scale, torch.tensor(temperature))

    momenta = [0.05 * normal(2, len(bits), *shape) for _ in range(rule.momenta)]
    if rule.momenta == 2:
        momenta[1] = momenta[1].square()
    scales: tuple[Tensor, ...] = ()
    if narrow:
        words = [reference_step.random_words(m.shape, seed + i, m.device) for i, m in enumerate(momenta)]
        pairs = [reference_step.narrow(m, word, i == 1) for i, (m, word) in enumerate(zip(momenta, words, strict=True))]
        momenta, scales = [codes for codes, _ in pairs], tuple(scale for _, scale in pairs)
    return StepLayer(
        weight=torch.full(shape, torch.nan, dtype=weight),
        grad_weight=(0.5 + normal(*shape)).to(weight),
        bit_logits=(0.5 * normal(2, len(bits), *shape)).to(logits),
        before=vectors(3.0),
        after=vectors(3.25),
        bits=bits,
        n_bits=6,
        channel_axis=channel_axis,
        hard_gates=hard_gates,
        rule=rule,
        momenta=tuple(momenta),
        momentum_scales=scales,
        key=mix(seed),
    )


def copy_of(layer: StepLayer, dtype: torch.dtype | None = None) -> StepLayer:
    """The layer with tensors of its own, all but narrow momenta in ``dtype``."""

    def copied(tensor: Tensor) -> Tensor:
        return tensor.clone() if dtype is None else tensor.to(dtype, copy=True)

    narrow = bool(layer.momentum_scales)
    return dataclasses.replace(
        layer,
        weight=copied(layer.weight),
        grad_weight=copied(layer.grad_weight),
        bit_logits=copied(layer.bit_logits),
        before=Vectors(*map(copied, layer.before)),
        after=Vectors(*map(copied, layer.after)),
        momenta=tuple(m.clone() if narrow else copied(m) for m in layer.momenta),
        momentum_scales=tuple(scale.clone() for scale in layer.momentum_scales),
    )


def updated(layer: StepLayer, device: str | None = "cpu", dtype: torch.dtype | None = None) -> StepLayer:
    """A copy after its step: by the backend of ``device``, or by the reference."""
    moved = copy_of(layer, dtype)
    update = reference_step.step_update if device is None else backends.step_function("step_update", device)
    update([moved])
    return moved


def weight_of(layer: StepLayer, logits: Tensor) -> Tensor:
    """What ``reconstruct`` makes of the logits after the step."""
    return functional.reconstruct(logits, *layer.after, **layer.constants())


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> str:
    _native.module.set_isa(request.param)
    return request.param


@native
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_update_errs_no_more_than_twice_as_much_as_plain_pytorch(isa: str, shape: tuple[int, ...], name: str) -> None:
    for (gates, scale), hard_gates in itertools.product(GRANULARITIES, (False, True)):
        if not shape and (gates or scale):
            continue
        layers = [
            make_layer(shape, RULES[name], gates, scale, hard_gates=hard_gates, seed=seed)
            for seed in range(8 >> len(shape))
        ] or [make_layer(shape, RULES[name], gates, scale, hard_gates=hard_gates)]
        results = [(updated(layer), updated(layer, None, FLOAT64), updated(layer, None)) for layer in layers]
        for field in ("bit_logits", "weight"):
            values = [torch.stack([getattr(result[i], field) for result in results]) for i in range(3)]
            assert_within(*values, name=field)
        for index in range(RULES[name].momenta):
            values = [torch.stack([result[i].momenta[index] for result in results]) for i in range(3)]
            assert_within(*values, name=f"momentum {index}")


@native
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_weight_is_what_reconstruct_makes_of_the_new_logits(isa: str, granularity, axis: int) -> None:
    for shape, logits in itertools.product(((37, 29), (3, 1031), (67, 9, 3, 3)), (FLOAT32, BFLOAT16)):
        layer = make_layer(shape, RULES["momentum"], *granularity, channel_axis=axis, logits=logits)
        moved = updated(layer)
        assert torch.equal(moved.weight, weight_of(moved, moved.bit_logits.float()))


@native
@pytest.mark.parametrize("hard_gates", [False, True])
@pytest.mark.parametrize("logits", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_sums(isa: str, granularity, logits: torch.dtype, hard_gates: bool) -> None:
    for shape in ((37, 29), (67, 1, 3, 3), (5, 300, 7)):
        results = []
        for seed in range(8):
            layer = make_layer(shape, RULES["plain"], *granularity, hard_gates=hard_gates, logits=logits, seed=seed)
            layer.weight.copy_(functional.reconstruct(layer.bit_logits.float(), *layer.before, **layer.constants()))
            found = backends.step_function("step_sums", "cpu")(layer)
            results.append((found, reference_step.step_sums(copy_of(layer, FLOAT64)), reference_step.step_sums(layer)))
        for i, name in enumerate(("gates", "scale")):
            assert_within(*(torch.stack([result[j][i] for result in results]) for j in range(3)), name=name)


@native
def test_a_scale_of_zero_has_the_right_gradient() -> None:
    layer = make_layer((7, 300), RULES["plain"], hard_gates=True)
    layer.before.gate_logits.fill_(1.0)
    layer.before.scale[3] = 0
    layer.weight.copy_(functional.reconstruct(layer.bit_logits, *layer.before, **layer.constants()))
    _, found = backends.step_function("step_sums", "cpu")(layer)
    _, exact = reference_step.step_sums(copy_of(layer, FLOAT64))
    assert exact[3] != 0
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


@native
@pytest.mark.parametrize("name", ["momentum", "adam"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_narrow_state_is_that_of_the_reference(isa: str, shape: tuple[int, ...], name: str) -> None:
    """Equal but where a rounding error of fp32 crosses the threshold of a random number."""
    layer = make_layer(shape, RULES[name], False, bool(shape), narrow=True, logits=BFLOAT16)
    found, right = updated(layer), updated(layer, None)
    for a, b in zip((found.bit_logits, *found.momenta), (right.bit_logits, *right.momenta), strict=True):
        assert (a.float() != b.float()).sum() <= 1 + a.numel() // 10000
        torch.testing.assert_close(a.float(), b.float(), rtol=2 * torch.finfo(a.dtype).eps, atol=2.0**-9)
    for a, b in zip(found.momentum_scales, right.momentum_scales, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)


@native
def test_threads_and_instruction_sets_do_not_change_narrow_roundings() -> None:
    layer = make_layer((300, 70), RULES["momentum"], narrow=True, logits=BFLOAT16)
    torch.set_num_threads(1)
    alone = updated(layer)
    torch.set_num_threads(4)
    assert torch.equal(alone.bit_logits, updated(layer).bit_logits)


@native
def test_many_layers_at_once_are_each_as_alone() -> None:
    draw = random.Random(0)
    layers = [
        make_layer(draw.choice(SHAPES[1:]), RULES[draw.choice(list(RULES))], *draw.choice(GRANULARITIES), seed=seed)
        for seed in range(40)
    ]
    alone = [updated(layer) for layer in layers]
    torch.set_num_threads(3)
    together = [copy_of(layer) for layer in layers]
    backends.step_function("step_update", "cpu")(together)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a.bit_logits, b.bit_logits)
        assert torch.equal(a.weight, b.weight)


@native
def test_bits_that_are_not_there_and_nothing_at_all() -> None:
    moved = updated(make_layer((3, 5), RULES["momentum"], bits=()))
    assert torch.equal(moved.weight, torch.zeros(3, 5))
    assert updated(make_layer((0, 5), RULES["momentum"])).weight.shape == (0, 5)


@native
def test_a_closed_plane_moves_by_its_momentum_and_ignores_nan() -> None:
    for per_channel in (False, True):
        layer = make_layer((9, 33), RULES["momentum"], per_channel, hard_gates=True)
        for vectors in (layer.before, layer.after):
            vectors.gate_logits[1] = -1.0
        layer.bit_logits[:, 1, 4] = torch.nan
        moved = updated(layer)
        assert torch.isfinite(moved.weight).all()
        momentum = RULES["momentum"].decay * layer.momenta[0][:, 1, :4]
        torch.testing.assert_close(moved.bit_logits[:, 1, :4], layer.bit_logits[:, 1, :4] - 0.1 * momentum)


def test_stochastic_rounding_is_unbiased_and_reproducible() -> None:
    values = torch.full((1 << 16,), 1.0 + 2.0**-9)
    words = reference_step.random_words(values.shape, 7, values.device)
    rounded = reference_step.round_to_bfloat16(values, words)
    assert set(rounded.tolist()) == {1.0, 1.0 + 2.0**-7}
    # A quarter of the step; the deviation of the mean of 2^16 draws is 0.0017 of it.
    assert abs((rounded.float().mean() - 1.0) * 2.0**7 - 0.25) < 0.01
    assert torch.equal(rounded, reference_step.round_to_bfloat16(values, words))
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0])
    kept = reference_step.round_to_bfloat16(special, torch.full((5,), 0xFFFFFFFF))
    assert torch.equal(kept.float(), special) or torch.equal(kept[:2].float(), special[:2]) and kept[2].isnan()


@pytest.mark.parametrize("root", [False, True])
def test_narrow_momenta_keep_what_they_are_given(root: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 3, 1000, generator=generator) * 10.0 ** torch.randint(
        -6, 1, (2, 3, 1000), generator=generator
    )
    values = values.square() if root else values
    sums = torch.zeros_like(values)
    rounds = 200
    for key in range(rounds):
        codes, scales = reference_step.narrow(
            values, reference_step.random_words(values.shape, key, values.device), root
        )
        sums += reference_step.widen(codes, scales, root)
    assert scales.shape == (2, 3, -(-1000 // MOMENTUM_BLOCK))
    largest = reference_step._blocks(values.abs()).amax(-1, keepdim=True).expand(-1, -1, -1, MOMENTUM_BLOCK)
    largest = reference_step._like(largest, values)
    # Steps of an eighth of the value, of which the mean over the rounds averages most out; far below the largest of
    # the block the steps stay.
    tolerance = 0.125 * values.abs() / 3 + largest * 2.0**-17
    assert ((sums / rounds - values).abs() <= tolerance).all()
    assert (not root) or (codes.float()[values > 0] > 0).all()


def test_vectors_of_another_size_are_refused() -> None:
    layer = make_layer((5, 7), RULES["momentum"])
    short = Vectors(torch.zeros(1), *layer.after[1:])
    with pytest.raises(ValueError, match=r"expected gate_logits of shape \(4,\).*, got \(1,\)"):
        check_step(dataclasses.replace(layer, before=short, after=short))


def test_memory_that_is_written_is_nobody_elses() -> None:
    layer = make_layer((5, 7), RULES["momentum"])
    check_step(layer)
    for change, message in (
        ({"grad_weight": layer.weight}, "in memory of their own"),
        ({"momenta": (layer.bit_logits,)}, "in memory of their own"),
        ({"after": Vectors(layer.weight.flatten()[:4], *layer.after[1:])}, "in memory of their own"),
        ({"weight": layer.weight[:1].expand(5, 7)}, "expected weight with memory for each element"),
        ({"weight": layer.weight.as_strided((5, 7), (1, 1))}, "expected weight with memory for each element"),
        ({"grad_weight": torch._neg_view(layer.grad_weight)}, "expected grad_weight as it is in memory"),
    ):
        with pytest.raises(ValueError, match=message):
            check_step(dataclasses.replace(layer, **change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bit_logits": torch.zeros(2, 3, 5, 7)}, r"expected bit_logits of shape \(2, 4, 5, 7\), got \(2, 3, 5, 7\)"),
        ({"grad_weight": torch.zeros(7, 5)}, r"expected grad_weight of shape \(5, 7\), got \(7, 5\)"),
        ({"momenta": ()}, "expected 1 momenta, got 0"),
        ({"momenta": (torch.zeros(2, 3, 5, 7),)}, r"expected momenta of shape \(2, 4, 5, 7\), got \(2, 3, 5, 7\)"),
        (
            {"bit_logits": torch.zeros(2, 4, 5, 7, dtype=torch.float16)},
            "expected bit_logits of dtype float32, bfloat16",
        ),
    ],
)
def test_a_layer_that_does_not_fit_is_refused(change: dict, message: str) -> None:
    layer = dataclasses.replace(make_layer((5, 7), RULES["momentum"]), **change)
    with pytest.raises((TypeError, ValueError), match=message):
        check_step(layer)


@native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 0}, "expected weight as the address of an array, got 0"),
        ({"momenta": []}, "expected momenta as 1 addresses, got 0"),
        ({"dtype": "float16"}, "expected dtype and weight_dtype as float32 or bfloat16"),
        ({"bits": [0, 0]}, "expected bits as increasing integers"),
        ({"inner": 1 << 62}, "expected outer \\* channels \\* inner that fits in memory"),
    ],
)
def test_native_layers_check_what_they_get(change: dict, message: str) -> None:
    values = torch.zeros(64)
    address = values.data_ptr()
    rule = _native.module.StepRule(**dataclasses.asdict(RULES["momentum"]))
    arguments = {
        "bit_logits": address,
        "before": [address] * 3,
        "after": [address] * 3,
        "grad_weight": address,
        "weight": address,
        "weight_dtype": "float32",
        "momenta": [address],
        "momentum_scales": [],
        "rule": rule,
        "key": 0,
        "outer": 1,
        "channels": 1,
        "inner": 1,
        "bits": [0, 1],
        "n_bits": 2,
        "dtype": "float32",
        "gates_per_channel": False,
        "scale_per_channel": False,
        "hard_gates": False,
    }
    _native.module.StepLayer(**arguments)
    with pytest.raises(ValueError, match=message):
        _native.module.StepLayer(**(arguments | change))
