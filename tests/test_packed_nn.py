"""The packed layers as a user of PyTorch expects them, and ``pack_`` and ``unpack_``: equation (7), bit for bit."""

import copy
import pickle
import threading

import pytest
import torch
from helpers import assert_within, harden
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import csq_kernels as csq
from csq_kernels import functional, reference
from csq_kernels.nn import PackedLayer
from csq_kernels.reference import always_exact

LAYERS = {
    "linear": (csq.CSQLinear, (13, 5), {}, lambda: torch.randn(3, 13)),
    "linear-plain": (csq.CSQLinear, (13, 5), {"bias": False}, lambda: torch.randn(2, 3, 13)),
    "linear-unbatched": (csq.CSQLinear, (13, 5), {}, lambda: torch.randn(13)),
    "conv1d": (csq.CSQConv1d, (4, 6, 3), {"padding": 1, "stride": 2}, lambda: torch.randn(2, 4, 9)),
    "conv1d-groups": (csq.CSQConv1d, (4, 6, 4), {"padding": "same", "groups": 2}, lambda: torch.randn(2, 4, 9)),
    "conv1d-unbatched": (csq.CSQConv1d, (4, 6, 3), {}, lambda: torch.randn(4, 9)),
    "conv2d": (csq.CSQConv2d, (5, 6, (3, 2)), {"stride": (2, 1), "dilation": (1, 2)}, lambda: torch.randn(2, 5, 9, 8)),
    "conv2d-same": (csq.CSQConv2d, (5, 6, (4, 3)), {"padding": "same"}, lambda: torch.randn(2, 5, 7, 8)),
    "conv2d-valid": (csq.CSQConv2d, (5, 6, 3), {"padding": "valid", "bias": False}, lambda: torch.randn(2, 5, 7, 8)),
    "conv2d-reflect": (
        csq.CSQConv2d,
        (5, 6, 3),
        {"padding": (2, 1), "padding_mode": "reflect"},
        lambda: torch.randn(2, 5, 7, 8),
    ),
    "conv2d-circular": (
        csq.CSQConv2d,
        (5, 6, (3, 4)),
        {"padding": "same", "padding_mode": "circular"},
        lambda: torch.randn(2, 5, 7, 8),
    ),
    "conv2d-unbatched": (csq.CSQConv2d, (5, 6, 3), {"padding": 1}, lambda: torch.randn(5, 7, 8)),
    "conv2d-thin": (csq.CSQConv2d, (3, 6, 3), {"padding": 1}, lambda: torch.randn(2, 3, 7, 8)),
    "depthwise": (csq.CSQConv2d, (4, 4, 3), {"padding": 1, "groups": 4}, lambda: torch.randn(2, 4, 7, 7)),
    "conv3d": (csq.CSQConv3d, (2, 3, 3), {"padding": 1}, lambda: torch.randn(2, 2, 5, 4, 5)),
    "transpose2d": (
        csq.CSQConvTranspose2d,
        (4, 6, 3),
        {"stride": 2, "output_padding": 1, "groups": 2},
        lambda: torch.randn(2, 4, 5, 5),
    ),
    "embedding": (csq.CSQEmbedding, (11, 5), {"padding_idx": 3}, lambda: torch.tensor([[1, 10, 0], [3, 5, 1]])),
    "embedding-bytes": (csq.CSQEmbedding, (6, 16), {}, lambda: torch.tensor([5, 0, 2])),
}
GRANULARITIES = [("layer", "layer"), ("layer", "channel"), ("channel", "layer"), ("channel", "channel")]
PACKED_KINDS = [name for name in LAYERS if not name.startswith("embedding")]


def hard_layer(name, active=(1, 2, 5), n_bits=6, gates="layer", scales="channel", seed=0):
    """A hard CSQ layer with random digits at the active exponents; gates per channel close at random."""
    cls, args, options, _ = LAYERS[name]
    layer = cls(*args, **options, n_bits=n_bits, gate_granularity=gates, scale_granularity=scales)
    return harden(layer, active, seed)


def packed(layer):
    twin = copy.deepcopy(layer)
    csq.pack_(twin)
    return twin


@pytest.fixture(params=LAYERS, ids=str)
def kind(request):
    return request.param


@pytest.mark.parametrize("granularities", GRANULARITIES, ids="-".join)
@pytest.mark.parametrize("active", [(), (3,), (0, 1, 2), (0, 2, 3), (0, 4, 5)], ids=str)
def test_codes_and_weight_are_those_of_equation_7(kind, granularities, active):
    layer = hard_layer(kind, active, 6, *granularities)
    twin = packed(layer)
    assert isinstance(twin, layer.float_class) and isinstance(twin, PackedLayer)
    assert torch.equal(twin.integer_codes(), layer.integer_codes().int())
    assert torch.equal(twin.weight, layer.weight) and twin.weight.dtype == layer.weight.dtype
    assert twin.active == layer.active_bits() and twin.paper_bits == len(twin.active)
    assert twin.stored_bits == len(twin.coefficients) == len(twin.state_dict()["planes"])
    restored = nn.Sequential(twin)
    csq.unpack_(restored)
    assert type(restored[0]) is layer.float_class and isinstance(restored[0].weight, nn.Parameter)
    assert torch.equal(restored[0].weight, layer.weight)
    assert restored[0].state_dict().keys() == layer.float_class(*LAYERS[kind][1], **LAYERS[kind][2]).state_dict().keys()


@pytest.mark.parametrize("columns", [1, 7, 33])
@pytest.mark.parametrize("n_bits", range(1, 17))
def test_every_width(n_bits, columns):
    layer = harden(csq.CSQLinear(columns, 3, n_bits=n_bits), range(n_bits), n_bits)
    twin = packed(layer)
    assert torch.equal(twin.integer_codes(), layer.integer_codes().int()) and torch.equal(twin.weight, layer.weight)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_random_gates_with_gaps(data):
    n_bits = data.draw(st.integers(1, 16))
    active = data.draw(st.sets(st.integers(0, n_bits - 1)))
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 19))
    gates, scales = data.draw(st.sampled_from(GRANULARITIES))
    layer = csq.CSQLinear(columns, rows, n_bits=n_bits, gate_granularity=gates, scale_granularity=scales)
    twin = packed(harden(layer, active, data.draw(st.integers(0, 99))))
    assert torch.equal(twin.integer_codes(), layer.integer_codes().int()) and torch.equal(twin.weight, layer.weight)


def float_twin(layer, dtype=torch.float32):
    return layer.to_float().to(dtype)


@pytest.mark.parametrize("active", [(), (0, 1, 4)], ids=["removed", "gap"])
def test_exact_outputs(kind, active):
    layer = hard_layer(kind, active)
    values = LAYERS[kind][3]()
    with torch.no_grad():
        eager, wide = float_twin(layer)(values), values.double() if values.is_floating_point() else values
        assert_within(packed(layer)(values), float_twin(layer, torch.float64)(wide), eager, name=kind)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", PACKED_KINDS)
def test_the_output_has_the_dtype_of_the_input(name, dtype):
    layer = hard_layer(name)
    values = LAYERS[name][3]().to(dtype)
    with torch.no_grad():
        output, wide = packed(layer)(values), float_twin(layer, torch.float64)(values.double())
        if dtype == torch.float64:
            torch.testing.assert_close(output, wide, rtol=1e-13, atol=1e-13)
        else:
            assert_within(output, wide, float_twin(layer, dtype)(values))


@pytest.mark.parametrize("name", PACKED_KINDS)
def test_gradients_are_those_of_the_float_layer(name):
    layer = hard_layer(name)
    inputs = [LAYERS[name][3]().requires_grad_() for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    twin, float_layer = packed(layer), float_twin(layer)
    grads = []
    for module, values in zip((twin, float_layer), inputs, strict=True):
        output = module(values)
        output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
        grads.append([values.grad] + ([] if module.bias is None else [module.bias.grad]))
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_int8_and_high_are_near_and_cannot_reach_what_is_decoded(kind):
    layer = hard_layer(kind)
    twin, values = packed(layer), LAYERS[kind][3]()
    with torch.no_grad():
        exact = twin(values)
        for precision, bound in (("high", 5e-5), ("int8", 2e-2)):
            csq.set_precision_(nn.Sequential(twin), precision)
            output = twin(values)
            assert (output - exact).norm() <= bound * exact.norm()
            decoded = isinstance(twin, (csq.PackedConv3d, csq.PackedConvTranspose2d, csq.PackedEmbedding))
            if isinstance(twin, (csq.PackedConv1d, csq.PackedConv2d)):
                decoded = always_exact(twin.weight_shape, twin.groups)
            assert torch.equal(output, exact) is decoded


def test_state_dict_restores_the_layer(kind):
    layer = packed(hard_layer(kind))
    values = LAYERS[kind][3]()
    cls, (_, args, options, _) = type(layer), LAYERS[kind]
    other = packed(hard_layer(kind, (3,), scales="layer", seed=1))
    for fresh in (cls(*args, **options), other, pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        fresh.load_state_dict(layer.state_dict(), strict=True)
        assert (fresh.coefficients, fresh.active, fresh.n_bits) == (layer.coefficients, layer.active, layer.n_bits)
        assert torch.equal(fresh.weight, layer.weight) and torch.equal(fresh(values), layer(values))
    with torch.device("meta"):
        fresh = cls(*args, **options)
    assert fresh(values.to("meta")).shape == layer(values).shape
    fresh.load_state_dict(layer.state_dict(), assign=True)
    fresh.to_empty(device="cpu").load_state_dict(layer.state_dict())
    assert torch.equal(fresh(values), layer(values))


def test_a_new_layer_has_no_weight(kind):
    _, args, options, make_input = LAYERS[kind]
    layer = type(packed(hard_layer(kind)))(*args, **options)
    assert layer.stored_bits == 0 and torch.equal(layer.weight, torch.zeros(layer.weight_shape))
    output = layer(make_input())
    bias = getattr(layer, "bias", None)
    expected = torch.zeros_like(output)
    if bias is not None:
        expected += bias.view(-1, *[1] * len(getattr(layer, "kernel_size", ())))
    assert torch.equal(output, expected)


def test_bad_states_name_the_problem_and_change_nothing():
    layer = packed(hard_layer("linear"))
    good, weight = layer.state_dict(), layer.weight
    for change, message in [
        ({"_extra_state": torch.tensor([9, 6, 1, 1, 0])}, "version 1, got 9"),
        ({"_extra_state": torch.tensor(1.0)}, "integer tensor"),
        ({"_extra_state": torch.tensor([1, 17, 1, 1, 0])}, "n_bits from 1 to 16"),
        ({"_extra_state": torch.tensor([1, 6, 1, 1, 2])}, "the negative ones among them"),
        ({"_extra_state": torch.tensor([1, 6, 1, 8, 0])}, "expected coefficients that"),
        ({"planes": good["planes"][:, :-1]}, "expected planes as uint8 of shape"),
        ({"planes": good["planes"].int()}, "expected planes as uint8 of shape"),
        ({"scale": torch.ones(3)}, r"expected scale of shape \(\) or \(5,\), got \(3,\)"),
        ({"scale": torch.full((5,), torch.nan)}, "expected scale to be finite"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict({**good, **change})
        assert torch.equal(layer.weight, weight)
    without = {name: value for name, value in good.items() if name != "scale"}
    with pytest.raises(RuntimeError, match=r"Missing key.*planes.*scale"):
        layer.load_state_dict(without)
    layer.load_state_dict({}, strict=False)
    assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.type(torch.float16),
    ],
    ids=["half", "to", "double", "type"],
)
def test_casts_leave_planes_and_scale_alone(kind, cast):
    layer = packed(hard_layer(kind))
    weight, buffers = layer.weight, dict(layer.named_buffers())
    cast(layer)
    for name in ("planes", "scale", "step"):
        assert torch.equal(getattr(layer, name), buffers[name]) and getattr(layer, name).dtype == buffers[name].dtype
    assert layer.weight.dtype == layer.dtype != torch.float32 and torch.equal(layer.weight, weight.to(layer.dtype))
    values = LAYERS[kind][3]()
    values = values.to(layer.dtype) if values.is_floating_point() else values
    assert layer(values).dtype == layer.dtype
    csq.unpack_(container := nn.Sequential(layer))
    assert container(values).dtype == layer.weight.dtype


def test_a_cast_layer_trains_its_bias():
    layer = packed(hard_layer("linear")).to(torch.bfloat16)
    layer(torch.randn(4, 13, dtype=torch.bfloat16)).sum().backward()
    assert layer.bias.grad.dtype == torch.bfloat16 and torch.equal(layer.bias.grad.float(), torch.full((5,), 4.0))


def tied_model():
    embedding, head, other = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False), nn.Linear(8, 12, bias=False)
    head.weight = other.weight = embedding.weight
    model = nn.ModuleDict({"embedding": embedding, "head": head, "other": other})
    csq.prepare_(model, csq.Config(n_bits=4))
    csq.finalize_(model)
    return model


def test_tied_layers_share_one_set_of_planes():
    model = tied_model()
    weight = model["head"].weight.detach().clone()
    shown = str(csq.pack_(model))
    assert shown.count("tied to embedding") == 2
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).half()):
        assert each["head"].planes is each["other"].planes
        assert each["head"].scale is each["other"].scale is each["embedding"].scale
    restored = copy.deepcopy(model)
    restored.load_state_dict(model.state_dict())
    assert restored["head"].planes is restored["other"].planes
    csq.unpack_(restored)
    assert restored["head"].weight is restored["embedding"].weight and torch.equal(restored["head"].weight, weight)


@pytest.fixture
def tiles(monkeypatch):
    """An order of planes that is not the canonical one."""
    monkeypatch.setattr(functional, "tile", lambda op, planes, *_: planes if planes.is_meta else planes.flip(1)[None])
    monkeypatch.setattr(functional, "untile", lambda op, planes, *_: planes[0].flip(1) if planes.ndim > 2 else planes)


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d"])
def test_planes_lie_in_the_order_of_the_device_and_leave_it_canonical(name, tiles):
    layer = hard_layer(name)
    codes = layer.integer_codes().int()
    twin = packed(layer)
    assert twin.planes.ndim == 3 and twin.state_dict()["planes"].ndim == 2
    assert torch.equal(twin.integer_codes(), codes)
    fresh = type(twin)(*LAYERS[name][1], **LAYERS[name][2])
    fresh.load_state_dict(twin.state_dict())
    assert torch.equal(fresh.planes, twin.planes) and torch.equal(fresh.integer_codes(), codes)
    fresh.half()
    assert fresh.planes.ndim == 3
    away = copy.deepcopy(twin).to("meta")
    assert away.planes.shape == twin.canonical_planes().shape
    assert away.to_empty(device="cpu").planes.ndim == 3


def test_grouped_convolutions_and_embeddings_stay_canonical(tiles):
    for name in ("depthwise", "conv3d", "transpose2d", "embedding"):
        assert packed(hard_layer(name)).planes.ndim == 2


def test_empty_and_scattered_inputs(kind):
    layer, values = packed(hard_layer(kind)), LAYERS[kind][3]()
    with torch.inference_mode():
        expected = layer(values)
        scattered = torch.stack([values, values], -1)[..., 0]
        assert not scattered.is_contiguous() and torch.equal(layer(scattered), expected)
        if "unbatched" not in kind:
            assert layer(values[:0]).shape == (0, *expected.shape[1:])


def test_embedding_refuses_what_is_out_of_range():
    layer = packed(hard_layer("embedding"))
    for index in (11, -1):
        with pytest.raises((IndexError, RuntimeError)):
            layer(torch.tensor([0, index]))
    with pytest.raises(RuntimeError, match="index"):
        layer(torch.tensor([0.5]))


def test_transposed_convolution_takes_an_output_size():
    layer, values = hard_layer("transpose2d"), torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        expected = layer.to_float()(values, output_size=[11, 11])
        torch.testing.assert_close(packed(layer)(values, output_size=[11, 11]), expected)


class Tokens(nn.Module):
    """Every kernel once: gather, product, convolution."""

    def __init__(self):
        super().__init__()
        self.embedding, self.linear, self.conv = nn.Embedding(20, 12), nn.Linear(12, 16), nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, tokens):
        return self.conv(self.linear(self.embedding(tokens)).unsqueeze(1))


def test_compiled_equals_eager():
    model = Tokens()
    csq.prepare_(model, csq.Config(n_bits=5))
    csq.finalize_(model)
    csq.pack_(model)
    tokens = torch.randint(0, 20, (2, 7))
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens), model(tokens))
    compiled(tokens).sum().backward()
    mine = model.linear.bias.grad.clone()
    model.zero_grad()
    model(tokens).sum().backward()
    torch.testing.assert_close(mine, model.linear.bias.grad)


def test_eight_threads_agree():
    model = nn.Sequential(packed(hard_layer("conv2d-same")), nn.Flatten(1), nn.Linear(6 * 7 * 8, 4))
    csq.set_precision_(model, "int8")
    values = torch.randn(2, 5, 7, 8)
    with torch.inference_mode():
        expected = model(values)
    outputs = {}

    def work(number):
        with torch.inference_mode():
            outputs[number] = [model(values) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outputs) == list(range(8))
    assert all(torch.equal(output, expected) for results in outputs.values() for output in results)


def test_packing_keeps_the_identity_of_modules():
    layer = csq.CSQLinear(5, 3, n_bits=4, act_bits=4)
    model = nn.Sequential(layer)
    seen = []
    layer.register_forward_hook(lambda module, inputs, output: seen.append(type(module)))
    model(torch.randn(8, 5))
    csq.finalize_(model)
    model.eval()
    values = torch.randn(8, 5)
    expected = model(values)
    quantizer = layer.input_quantizer
    summary = csq.pack_(model)
    assert model[0] is layer and layer.input_quantizer is quantizer and not layer.training
    torch.testing.assert_close(model(values), expected)
    assert seen[-1] is csq.PackedLinear and "paper_bits=4" in repr(layer) and "precision='exact'" in repr(layer)
    assert [name for name, _ in model.named_parameters()] == ["0.bias", "0.input_quantizer.range"]
    assert "PackedLinear" in str(summary) and summary.layers[0].bytes == summary.bytes == layer.stored_bits * 2 + 12


def test_pack_refuses_and_leaves_the_model_alone():
    with pytest.raises(ValueError, match="expected model with CSQ layers, got none"):
        csq.pack_(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="expected precision as one of exact, high, int8, got 'low'"):
        csq.pack_(nn.Sequential(hard_layer("linear")), "low")
    soft = nn.Sequential(hard_layer("linear"), csq.CSQLinear(5, 2))
    with pytest.raises(ValueError, match="expected hard layers, got 1 in the search stage; call finalize_ first"):
        csq.pack_(soft)
    broken = nn.Sequential(hard_layer("linear"), hard_layer("linear"))
    broken[1].scale.data[1] = torch.inf
    with pytest.raises(ValueError, match="1: expected scale to be finite"):
        csq.pack_(broken)
    with pytest.raises(TypeError, match="0: expected scale of dtype float32, got torch.float64"):
        csq.pack_(nn.Sequential(hard_layer("linear").double()))
    assert all(isinstance(layer, csq.CSQLinear) for layer in (*soft, *broken))
    for function in (csq.unpack_, lambda model: csq.set_precision_(model, "high")):
        with pytest.raises(ValueError, match="expected model with packed layers, got none"):
            function(soft)


@pytest.mark.parametrize("name", LAYERS)
def test_from_codes(name):
    layer = hard_layer(name)
    codes, _, options, make_input = layer.integer_codes(), *LAYERS[name][1:]
    options = {key: value for key, value in options.items() if key != "bias"}
    bias = getattr(layer, "bias", None)
    cls = type(packed(layer))
    made = cls.from_codes(codes, layer.scale.detach(), layer.n_bits, bias, active=layer.active_bits(), **options)
    values = make_input()
    assert torch.equal(made.weight, layer.weight) and torch.equal(made(values), packed(layer)(values))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": torch.zeros(2, 3, 1, dtype=torch.int32)}, "expected codes of 2 axes"),
        ({"codes": torch.zeros(2, 3)}, "expected codes of an integer dtype"),
        ({"codes": torch.full((2, 3), 8)}, "expected digits at exponents from 0 to 2"),
        ({"active": (0,)}, "expected codes with digits -1, 0, 1 at the exponents"),
        ({"n_bits": 17}, "expected n_bits from 1 to 16, got 17"),
        ({"scale": torch.ones(3)}, r"expected scale of shape \(\) or \(2,\), got \(3,\)"),
        ({"scale": torch.tensor(torch.nan)}, "expected scale to be finite"),
        ({"bias": torch.zeros(3)}, r"expected bias of shape \(2,\), got \(3,\)"),
    ],
)
def test_from_codes_refuses(changes, message):
    arguments = {"codes": torch.full((2, 3), 7), "scale": torch.tensor(1.0), "n_bits": 3}
    with pytest.raises((ValueError, TypeError), match=message):
        csq.PackedLinear.from_codes(**{**arguments, **changes})


def test_step_is_that_of_the_reference():
    scale = torch.rand(5)
    layer = csq.PackedLinear.from_codes(torch.randint(-127, 128, (5, 9)), scale, 7)
    assert torch.equal(layer.weight, reference.hard_weight(layer.integer_codes(), scale, 7, 0))
