"""The CSQ layers as a user of PyTorch expects them: conversion, state, copies, stages, hooks, compile."""

import copy
import inspect
import pickle

import pytest
import torch
import torch._dynamo.testing
from torch import nn

import csq_kernels as csq
from csq_kernels import reference
from csq_kernels.nn import ActivationQuantizer

LAYERS = {
    "linear": (csq.CSQLinear, (9, 5), lambda: torch.randn(3, 9)),
    "conv1d": (csq.CSQConv1d, (4, 6, 3), lambda: torch.randn(2, 4, 8)),
    "conv2d": (csq.CSQConv2d, (4, 6, 3, 2), lambda: torch.randn(2, 4, 9, 9)),
    "depthwise": (csq.CSQConv2d, (4, 4, 3, 1, 1, 1, 4), lambda: torch.randn(2, 4, 7, 7)),
    "conv3d": (csq.CSQConv3d, (2, 3, 3), lambda: torch.randn(2, 2, 5, 5, 5)),
    "transpose2d": (csq.CSQConvTranspose2d, (4, 6, 3), lambda: torch.randn(2, 4, 5, 5)),
    "embedding": (csq.CSQEmbedding, (11, 4), lambda: torch.tensor([[1, 10, 0]])),
}
GRANULARITIES = [("layer", "layer"), ("layer", "channel"), ("channel", "layer"), ("channel", "channel")]


@pytest.fixture(params=LAYERS, ids=str)
def kind(request):
    return LAYERS[request.param]


@pytest.fixture(params=GRANULARITIES, ids=lambda g: f"gates-{g[0]}-scale-{g[1]}")
def options(request):
    return {"gate_granularity": request.param[0], "scale_granularity": request.param[1]}


def advance(layer, stage, drop_planes):
    if stage != "search":
        layer.fix_scheme_((4, 6, 7), drop_planes=drop_planes)
    if stage == "hard":
        layer.harden_()


def test_conversion_reproduces_the_float_layer(kind, options):
    cls, args, make_input = kind
    layer = cls.float_class(*args)
    converted = cls.from_float(layer, **options)
    assert isinstance(converted, cls.float_class) and type(converted) is cls
    # Encoding at the initial temperature is exact up to the rounding of a few float32 operations.
    tolerance = 16 * torch.finfo(torch.float32).eps * layer.weight.abs().max().item()
    assert (converted.weight - layer.weight).abs().max().item() <= tolerance
    values = make_input()
    weight = layer.weight.detach().clone()
    layer.weight.data = converted.weight.detach()
    assert torch.equal(converted(values), layer(values))
    back = converted.to_float()
    assert type(back) is cls.float_class and isinstance(back.weight, nn.Parameter)
    assert (back.weight - weight).abs().max().item() <= tolerance
    assert set(back.state_dict()) == set(layer.state_dict())


def test_rounding_to_all_bits_is_to_the_nearest_code(kind):
    cls, args, _ = kind
    converted = cls(*args, n_bits=6)
    step = reference.along_channel(converted.scale / 63, converted.weight.ndim, cls.channel_axis)
    # Decided digits are worth 1/tanh(1) of what they are worth at the initial temperature.
    codes = converted.weight / step / torch.tanh(torch.tensor(1.0)) / torch.sigmoid(torch.tensor(1.0))
    assert (converted.integer_codes() - codes).abs().max().item() <= 0.5 + 1e-3


@pytest.mark.parametrize("stage", ["search", "finetune", "hard"])
@pytest.mark.parametrize("drop_planes", [False, True], ids=["keep", "drop"])
def test_state_dict_restores_every_stage(kind, options, stage, drop_planes):
    cls, args, make_input = kind
    layer = cls(*args, **options)
    advance(layer, stage, drop_planes)
    values = make_input()
    for fresh in (cls(*args, **options), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        fresh.load_state_dict(layer.state_dict(), strict=True)
        assert (fresh.stage, fresh.bits) == (layer.stage, layer.bits)
        assert torch.equal(fresh.weight, layer.weight) and torch.equal(fresh(values), layer(values))
        assert fresh.gate_logits.requires_grad is (stage == "search")


def test_loading_goes_back_from_hard_to_search(kind):
    cls, args, _ = kind
    start = cls(*args)
    saved, weight = copy.deepcopy(start.state_dict()), start.weight.detach().clone()
    advance(start, "hard", True)
    start.load_state_dict(saved)
    assert start.stage == "search" and start.codes is None and torch.equal(start.weight, weight)
    start.weight.sum().backward()
    assert start.bit_logits.grad.shape == start.bit_logits.shape


def test_float_checkpoint_loads_strictly(kind, options):
    cls, args, _ = kind
    source, target = cls.float_class(*args), cls(*args, **options)
    target.load_state_dict(source.state_dict(), strict=True)
    assert (target.weight - source.weight).abs().max() <= 1e-5 * source.weight.abs().max()


def test_bad_checkpoints_name_the_problem():
    layer = csq.CSQLinear(3, 2)
    good = layer.state_dict()
    weight = layer.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"expected weight of shape \(2, 3\), got \(3, 2\)"):
        layer.load_state_dict({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)})
    for state, message in [
        (torch.tensor([9, 1, 8, 0]), "version 1, got 9"),
        (torch.tensor([1, 1, 6, 0]), "n_bits 8, got a checkpoint with n_bits 6"),
        (torch.tensor([1, 7, 8, 0]), "stage and increasing bits"),
        (torch.tensor([1, 1, 8, 3, 2]), "stage and increasing bits"),
        (torch.tensor(1.0), "integer tensor"),
        ({"stage": 1}, "integer tensor"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict({**good, "_extra_state": state})
        assert torch.equal(layer.weight, weight) and layer.stage == "search"


def test_hard_weight_is_integer_times_step(kind, options):
    cls, args, _ = kind
    layer = cls(*args, **options)
    layer.fix_scheme_((2, 5, 6))
    expected = layer.hard_weight()
    layer.harden_()
    assert layer.bit_logits.numel() == 0 and layer.codes.dtype == torch.int16
    assert torch.equal(layer.weight, expected)
    step = layer.scale / 255
    rebuilt = layer.codes.to(torch.float32) * reference.along_channel(step, layer.codes.ndim, cls.channel_axis)
    assert torch.equal(layer.weight, rebuilt)
    assert set(layer.bits) <= {2, 5, 6}


def test_soft_weight_equals_hard_weight_once_decided(kind, options):
    cls, args, _ = kind
    layer = cls(*args, **options)
    layer.fix_scheme_((5, 6, 7))
    layer.temperature.fill_(1e6)
    with torch.no_grad():
        layer.bit_logits[layer.bit_logits.abs() < 1e-3] = -1.0
    assert torch.equal(layer.weight, layer.hard_weight())


def test_fixing_the_scheme_keeps_the_weight():
    layer = csq.CSQLinear(64, 32)
    weight = layer.weight.detach().clone()
    layer.fix_scheme_(range(2, 8), drop_planes=True)
    assert layer.bit_logits.shape == (2, 6, 32, 64) and layer.stage == "finetune"
    assert (layer.weight - weight).norm() <= 1e-6 * weight.norm()
    layer.weight.sum().backward()
    assert layer.gate_logits.grad is None and layer.bit_logits.grad.shape == layer.bit_logits.shape
    with pytest.raises(RuntimeError, match="expected a layer in the search stage, got one in the finetune stage"):
        layer.fix_scheme_((7,))


def test_a_bit_that_the_search_had_closed_can_be_fixed_open():
    layer = csq.CSQLinear(64, 32)
    with torch.no_grad():
        layer.gate_logits.fill_(-1.0)
    layer.fix_scheme_((7,), drop_planes=True)
    assert layer.active_bits() == (7,) and layer.hard_weight().abs().max() > 0


def test_planes_can_be_dropped_while_an_old_graph_lives():
    layer = csq.CSQLinear(6, 4)
    old_loss = layer(torch.ones(1, 6)).sum()
    old_loss.backward()
    layer.fix_scheme_((6, 7), drop_planes=True)
    layer(torch.ones(1, 6)).sum().backward()
    assert layer.bit_logits.grad.shape == (2, 2, 4, 6) and old_loss.grad_fn is not None


def test_meta_device_then_reset(kind):
    cls, args, make_input = kind
    layer = cls(*args, device="meta")
    assert layer.bit_logits.is_meta and layer.temperature.is_meta
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert torch.isfinite(layer(make_input())).all() and layer.weight.abs().max() > 0


def test_reset_parameters_draws_what_the_float_layer_draws():
    torch.manual_seed(5)
    expected = nn.Linear(8, 4)
    layer = csq.CSQLinear(8, 4)
    layer.fix_scheme_((7,))
    torch.manual_seed(5)
    layer.reset_parameters()
    assert layer.stage == "search" and torch.allclose(layer.weight, expected.weight, atol=1e-6)
    assert torch.equal(layer.bias, expected.bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    layer = csq.CSQLinear(8, 4, dtype=dtype)
    assert layer.bit_logits.dtype == dtype
    assert layer.gate_logits.dtype == layer.scale.dtype == torch.promote_types(dtype, torch.float32)
    assert layer(torch.ones(2, 8, dtype=dtype)).dtype == dtype
    advance(layer, "hard", True)
    assert layer.weight.dtype == dtype and layer(torch.ones(2, 8, dtype=dtype)).dtype == dtype


def test_autocast_keeps_gates_in_float32():
    layer = csq.CSQLinear(8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(torch.ones(2, 8))
        assert layer.weight.dtype == torch.float32
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert torch.isfinite(layer.gate_logits.grad).all() and layer.gate_logits.grad.dtype == torch.float32


def test_zero_weight_stays_trainable():
    layer = csq.CSQLinear.from_float(nn.Linear(8, 4))
    layer.set_weight_(torch.zeros(4, 8))
    assert (layer.scale > 0).all() and torch.equal(layer.weight, torch.zeros(4, 8))
    layer(torch.randn(3, 8)).square().sum().backward()
    assert torch.isfinite(layer.bit_logits.grad).all()
    with pytest.raises(ValueError, match=r"expected weight of shape \(4, 8\), got \(8, 4\)"):
        layer.set_weight_(torch.zeros(8, 4))


def test_signature_and_repr_say_what_the_layer_takes():
    parameters = inspect.signature(csq.CSQLinear).parameters
    assert list(parameters)[:3] == ["in_features", "out_features", "bias"]
    assert parameters["n_bits"].kind is inspect.Parameter.KEYWORD_ONLY and parameters["n_bits"].default == 8
    assert "n_bits=4, stage=search, bits=0,1,2,3" in repr(csq.CSQLinear(2, 2, n_bits=4))
    with pytest.raises(TypeError, match="bits"):
        csq.CSQLinear(2, 2, bits=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_bits": 0}, "expected n_bits from 1 to 16, got 0"),
        ({"n_bits": 17}, "expected n_bits from 1 to 16, got 17"),
        ({"initial_bits": 9}, "expected initial_bits from 1 to 8, got 9"),
        ({"min_bits": 9}, "expected min_bits from 0 to 8, got 9"),
        ({"gate_granularity": "row"}, "expected gate_granularity as one of layer, channel, got 'row'"),
        ({"act_bits": 1}, "expected act_bits from 2 to 8, got 1"),
        ({"act_bits": 4, "act_quantizer": "dorefa"}, "expected act_quantizer as one of lsq, pact, got 'dorefa'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        csq.Config(**options)
    with pytest.raises(ValueError, match=message):
        csq.CSQLinear(2, 2, **options)


def test_embedding_refuses_in_place_options():
    for options in ({"max_norm": 1.0}, {"sparse": True}):
        with pytest.raises(ValueError, match=f"expected {next(iter(options))}"):
            csq.CSQEmbedding(4, 2, **options)
    table = csq.CSQEmbedding.from_pretrained(torch.randn(5, 3), n_bits=6)
    assert not table.bit_logits.requires_grad and table.n_bits == 6


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.norm(self.embedding(tokens)))


def test_prepare_keeps_identity_hooks_and_frozen_weights():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
    first, calls = model[0], []
    first.register_forward_hook(lambda *_: calls.append(1))
    first.weight.requires_grad_(False)
    model.eval()
    plan = csq.prepare_(model)
    assert model[0] is first and isinstance(first, csq.CSQConv2d) and not first.training
    assert not any(p.requires_grad for name, p in first.named_parameters() if name != "bias")
    model(torch.zeros(1, 1, 4, 4))
    assert calls == [1]
    assert plan.swapped == {"0": 18, "2": 24} and not plan.skipped
    # 42 weights of 4 bytes: 3 tensors as floats; logits of 16 planes, three times, with W and dL/dW as CSQ.
    assert plan.bytes_float == 42 * 4 * 3 and plan.bytes_csq == 42 * 4 * (3 * 16 + 2)
    assert "2 layers swapped, 42 weights" in str(plan)


@pytest.mark.parametrize("state", ["single_pass", "narrow", "csq", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_estimated_bytes_are_those_held_in_training(state, dtype):
    model = nn.Sequential(nn.Conv2d(3, 33, 5, bias=False), nn.Flatten(), nn.Linear(297, 65, bias=False)).to(dtype)
    prepared = copy.deepcopy(model)
    plan = csq.prepare_(prepared)
    if state == "float":
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    elif state == "csq":
        model = prepared
        optimizer = torch.optim.SGD(csq.param_groups(model, lr=0.1), lr=0.1, momentum=0.9)
    else:
        model = prepared
        optimizer = csq.optim.SGD(model, lr=0.1, momentum=0.9, narrow=state == "narrow")
    model(torch.ones(2, 3, 7, 7, dtype=dtype)).float().square().sum().backward()
    optimizer.step()
    tensors = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in model.parameters())]
    tensors += [value for momenta in optimizer.state.values() for value in momenta.values()]
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    assert getattr(plan, f"bytes_{state}") == pytest.approx(held, rel=0.05)
    assert f"{plan.bytes_narrow / 1e6:.1f} MB" in str(plan)


def test_prepare_rules_and_filter():
    def build():
        return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Bilinear(2, 2, 2))

    model = build()
    plan = csq.prepare_(model, csq.Config(n_bits=6, rules={"0": None, r"re:1\.[1]": {"n_bits": 3}}))
    assert plan.skipped == {"0": "rule '0'", "2": "Bilinear is not supported"}
    assert model[1][0].n_bits == 6 and model[1][1].n_bits == 3
    model = build()
    plan = csq.prepare_(model, filter_fn=lambda module, name: name == "0")
    assert list(plan.swapped) == ["0"] and plan.skipped["1.0"] == "filter_fn"
    assert csq.prepare_(model).skipped["0"] == "already a CSQ layer"


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"conv*": None}, r"expected rule 'conv\*' to match a layer, got none of 0"),
        ({"0": {"nbits": 3}}, "expected rule '0' with options of Config, got nbits"),
        ({"re:(": None}, r"expected rule 're:\(' to be a regular expression"),
        ({"0": {"n_bits": 99}}, "expected n_bits from 1 to 16, got 99"),
        ({"0": None}, "expected model with a layer to swap, got none"),
    ],
)
def test_bad_rules_leave_the_model_alone(rules, message):
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=message):
        csq.prepare_(model, csq.Config(rules=rules))
    assert type(model[0]) is nn.Linear


def test_tied_weights_stay_tied():
    model = Tied()
    expected = model(torch.tensor([1, 2]))
    plan = csq.prepare_(model)
    assert plan.tied == {"head": "embedding"} and list(plan.swapped) == ["embedding"]
    assert model.head.bit_logits is model.embedding.bit_logits
    assert torch.allclose(model(torch.tensor([1, 2])), expected, atol=1e-5)
    clone = copy.deepcopy(model)
    assert clone.head.bit_logits is clone.embedding.bit_logits
    optimizer = torch.optim.SGD(csq.param_groups(model, lr=0.1), lr=0.1)
    search = csq.Search(model, "3 bits", total_steps=6, optimizer=optimizer)
    for _ in range(6):
        (model(torch.tensor([1, 2])).square().mean() + search.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        search.step()
        assert torch.equal(model.head.weight, model.embedding.weight)
    csq.finalize_(model, budget="3 bits")
    assert torch.equal(model.head.weight, model.embedding.weight) and model.head.stage == "hard"
    fresh = Tied()
    csq.prepare_(fresh)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(fresh(torch.tensor([3])), model(torch.tensor([3])))


def test_half_of_a_tie_is_an_error():
    model = Tied()
    with pytest.raises(ValueError, match="expected tied layers embedding and head to be both swapped"):
        csq.prepare_(model, csq.Config(rules={"head": None}))
    assert type(model.embedding) is nn.Embedding


@pytest.mark.parametrize("inputs, kernel", [(1, 3), (4, 3), (4, 1)])
def test_a_channels_last_weight_stays_so(inputs: int, kernel: int) -> None:
    """Where the image does not say which format it has, as with one channel, a float layer answers in the weight's."""
    layer = nn.Conv2d(inputs, 8, kernel).to(memory_format=torch.channels_last)
    image = torch.randn(2, inputs, 6, 6)
    strides, output = layer.weight.stride(), layer(image).stride()
    model = nn.Sequential(layer)
    csq.prepare_(model)

    def check() -> None:
        assert (layer.weight.stride(), layer(image).stride()) == (strides, output)

    check()
    optimizer = csq.optim.SGD(model, 0.1)
    check()
    layer(image).square().sum().backward()
    optimizer.step()
    check()
    assert copy.deepcopy(layer).to_float().weight.stride() == strides
    csq.finalize_(model)
    check()
    unchanged = nn.Conv2d(inputs, 8, kernel)
    weight, expected = unchanged.weight.stride(), unchanged(image).stride()
    csq.prepare_(nn.Sequential(unchanged))
    assert (unchanged.weight.stride(), unchanged(image).stride()) == (weight, expected)


def test_multihead_attention_runs_with_its_projection_left_float():
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    with pytest.raises(ValueError, match="NonDynamicallyQuantizableLinear is not supported"):
        csq.prepare_(model)


def test_param_groups_never_decay_logits():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    csq.prepare_(model, csq.Config(rules={"2": None}))
    groups = {g["name"]: g for g in csq.param_groups(model, 0.1, 0.01, logit_lr=1.0, gate_lr=0.5, scale_lr=0.2)}
    assert {name: g["weight_decay"] for name, g in groups.items() if g["weight_decay"]} == {"decay": 0.01}
    assert (groups["bit_logits"]["lr"], groups["gate_logits"]["lr"], groups["scale"]["lr"]) == (1.0, 0.5, 0.2)
    assert groups["decay"]["params"] == [model[2].weight]
    assert sum(len(g["params"]) for g in groups.values()) == len(list(model.parameters()))


@pytest.mark.parametrize("kind", ["lsq", "pact"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_activation_quantizer(kind, bits, signed):
    quantizer = ActivationQuantizer(bits, kind)
    values = torch.randn(64, 32) if signed else torch.rand(64, 32)
    assert torch.equal(quantizer.eval()(values), values)
    output = quantizer.train()(values)
    assert 2 <= output.unique().numel() <= 2**bits
    assert (output.min() < 0) == signed
    output.square().sum().backward()
    assert quantizer.range.grad.abs() > 0
    quantizer.eval()
    single = torch.cat([quantizer(row[None]) for row in values])
    assert torch.equal(single, quantizer(values)), "the result depends on the batch"
    fresh = ActivationQuantizer(bits, kind)
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh.eval()(values), quantizer(values))


def test_activation_gradients_follow_the_papers():
    values = torch.tensor([-1.0, 0.26, 0.9, 3.0], requires_grad=True)
    pact = ActivationQuantizer(2, "pact")
    pact.calibrate_(torch.tensor([0.0, 1.5]))
    pact(values).sum().backward()
    assert pact.range.grad.item() == 1.0 and values.grad.tolist() == [0.0, 1.0, 1.0, 0.0]
    lsq = ActivationQuantizer(2, "lsq")
    lsq.calibrate_(torch.tensor([0.0, 1.0]))
    with torch.no_grad():
        lsq.range.fill_(0.5)
    values.grad = None
    lsq(values).sum().backward()
    ratio = (values.detach() / 0.5).clamp(0, 3)
    inside = torch.tensor([0.0, 1.0, 1.0, 0.0])
    expected = (ratio.round() - ratio * inside).sum() / (4 * 3) ** 0.5
    assert torch.allclose(lsq.range.grad, expected) and values.grad.tolist() == inside.tolist()


def test_quantized_input_of_a_layer():
    model = nn.Sequential(nn.Linear(8, 4))
    csq.prepare_(model, csq.Config(act_bits=3))
    model(torch.randn(16, 8))
    assert model[0].input_quantizer.calibrated
    assert type(model[0].to_float()) is nn.Linear


@pytest.mark.parametrize("limit", [None, 3.0])
def test_compiled_once_over_a_temperature_schedule(limit):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    csq.prepare_(model)
    if limit:
        csq.Search(model, "3 bits", 10, search_share=0.0, gradient_temperature=limit).fix_scheme()
    eager = copy.deepcopy(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    values = torch.randn(2, 1, 4, 4)
    for temperature in (1.0, 1.7, 3.0, 9.0, 40.0, 200.0):
        for network in (model, eager):
            for layer in (network[0], network[3]):
                layer.temperature.fill_(temperature)
            network.zero_grad()
        loss, expected = compiled(values).square().sum(), eager(values).square().sum()
        loss.backward()
        expected.backward()
        assert torch.allclose(loss, expected, rtol=1e-5)
        for mine, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            assert mine.requires_grad == theirs.requires_grad
            if mine.requires_grad:
                assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1
