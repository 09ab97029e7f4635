"""The optimizers of the single-pass step: equal to torch.optim on the logits, and at home among PyTorch's tools."""

import copy
import gc
import io

import pytest
import torch
from helpers import FLOAT32, FLOAT64, assert_within
from torch import Tensor, nn

import csq_kernels as csq
from csq_kernels.nn import CSQLinear
from csq_kernels.nn.prepare import csq_layers
from csq_kernels.optim import SinglePassOptimizer

KINDS = ("sgd", "adam", "adamw")
OURS = {"sgd": csq.optim.SGD, "adam": csq.optim.Adam, "adamw": csq.optim.AdamW}
STOCK = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
# Of weights by SGD and Adam: strong enough that 40 steps show it.
DECAY = 10.0
STEPS = 40


def make_model(dtype: torch.dtype = FLOAT32, config: csq.Config | None = None) -> nn.Sequential:
    """Convolutions plain and depth-wise, and two linear layers; prepared."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Flatten(),
        nn.Linear(8 * 16, 16),
        nn.LayerNorm(16),
        nn.Linear(16, 5, bias=False),
    ).to(dtype)
    csq.prepare_(model, config or csq.Config(n_bits=6))
    return model


def make_optimizer(model: nn.Module, kind: str, single_pass: bool, **options) -> torch.optim.Optimizer:
    rates = {"logit_lr": 0.05, "gate_lr": 0.03, "scale_lr": 0.01}
    lr, decay = 0.05 if kind == "sgd" else 2e-3, options.pop("weight_decay", DECAY)
    if kind == "sgd":
        options = {"momentum": 0.9, "nesterov": True} | options
    if single_pass:
        return OURS[kind](model, lr, weight_decay=decay, **rates, **options)
    return STOCK[kind](csq.param_groups(model, lr, decay, **rates), lr, **options)


def batch(dtype: torch.dtype, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(16, 2, 8, 8, generator=generator, dtype=FLOAT64).to(dtype)
    return images, torch.randint(0, 5, (16,), generator=generator)


def train(model: nn.Module, optimizer, search: csq.Search | None, first: int, last: int) -> None:
    dtype = next(model.parameters()).dtype
    for step in range(first, last):
        images, labels = batch(dtype, step)
        loss = nn.functional.cross_entropy(model(images), labels)
        if search is not None:
            loss = loss + search.penalty()
        if type(optimizer) in (torch.optim.SGD, torch.optim.Adam):
            # What the optimizer of the same name here does by itself, to weights that shrink whatever the loss does.
            decayed = sum(layer.decay_term() for layer in csq_layers(model).values())
            loss = loss + DECAY * decayed * (-1 if optimizer.defaults["maximize"] else 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if search is not None:
            search.step()


def trained(
    kind: str,
    single_pass: bool,
    steps: int,
    dtype: torch.dtype,
    config: csq.Config | None = None,
    gradient_temperature: float | None = None,
    **options,
):
    model = make_model(dtype, config)
    optimizer = make_optimizer(model, kind, single_pass, **options)
    search = csq.Search(
        model,
        budget="3 bits",
        total_steps=STEPS,
        optimizer=optimizer,
        search_temperature=10.0,
        gradient_temperature=gradient_temperature,
    )
    train(model, optimizer, search, 0, steps)
    return model, optimizer, search


def codes_of(model: nn.Module) -> list[Tensor]:
    return [layer.integer_codes() for layer in csq_layers(model).values()]


@pytest.mark.parametrize("granularity", ["layer", "channel"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 10, STEPS])
def test_trajectories_equal_those_of_torch_optim(kind: str, steps: int, granularity: str) -> None:
    """In float64 to rounding, through the end of the search; in float32 under the 2x rule, until chaos sets in."""
    config = csq.Config(n_bits=6, gate_granularity=granularity)
    stock, _, _ = trained(kind, False, steps, FLOAT64, config)
    single, _, _ = trained(kind, True, steps, FLOAT64, config)
    expected = stock.state_dict()
    found = single.state_dict()
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-7, atol=1e-9)
    assert all(torch.equal(a, b) for a, b in zip(codes_of(stock), codes_of(single), strict=True))
    if steps > 10:
        return
    narrow, wide = (trained(kind, single_pass, steps, FLOAT32, config)[0].state_dict() for single_pass in (True, False))
    names = [name for name in expected if name.endswith(("bit_logits", "scale"))]
    values = ([state[name].flatten() for name in names] for state in (narrow, expected, wide))
    assert_within(*map(torch.cat, values), name="logits and scales")


@pytest.mark.parametrize(
    "options", [{"momentum": 0.0, "nesterov": False}, {"dampening": 0.3, "nesterov": False}, {"maximize": True}]
)
def test_options_of_sgd(options: dict) -> None:
    pair = [trained("sgd", single_pass, 4, FLOAT64, **options)[0].state_dict() for single_pass in (False, True)]
    for name, tensor in pair[0].items():
        torch.testing.assert_close(pair[1][name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_lower_temperature(kind: str) -> None:
    models = [trained(kind, single_pass, STEPS, FLOAT64, None, 2.0)[0] for single_pass in (False, True)]
    pair = [model.state_dict() for model in models]
    for name, tensor in pair[0].items():
        torch.testing.assert_close(pair[1][name], tensor, rtol=1e-7, atol=1e-9)
    free, _, _ = trained(kind, True, STEPS, FLOAT64)
    # The temperature of the weight itself is the same, and it had passed 2 by then.
    assert torch.equal(free[4].temperature, models[1][4].temperature)
    differing = (free[4].bit_logits - models[1][4].bit_logits).abs().max()
    assert differing > 1e-3


def test_the_weights_of_bits_decay_by_a_group_that_can_be_changed() -> None:
    norms = []
    for decay in (0.0, 3000.0):
        model = make_model()
        optimizer = make_optimizer(model, "sgd", True, weight_decay=decay)
        assert {g["name"]: g["weight_decay"] for g in optimizer.param_groups if g["weight_decay"]} == (
            {"bit_logits": decay} if decay else {}
        )
        train(model, optimizer, None, 0, 5)
        norms.append([layer.weight.detach().norm() for layer in csq_layers(model).values()])
    assert all(decayed < 0.9 * kept for kept, decayed in zip(*norms, strict=True))
    grad = model[4].weight.grad.clone()
    optimizer.step()
    assert torch.equal(model[4].weight.grad, grad), "decay was added to the gradient that others see"
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    still = make_model()
    still.load_state_dict(model.state_dict())
    follower = make_optimizer(still, "sgd", True, weight_decay=0.0)
    follower.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, stepped in ((model, optimizer), (still, follower)):
        train(one, stepped, None, 5, 6)
    assert torch.equal(model[4].bit_logits, still[4].bit_logits)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_decay_moves_bits_alone(kind: str) -> None:
    model = make_model()
    optimizer = make_optimizer(model, kind, True, weight_decay=0.5)
    before = copy.deepcopy(model.state_dict())
    signs = {name: layer.weight.detach().sign() for name, layer in csq_layers(model).items()}
    for layer in csq_layers(model).values():
        layer.leaf.grad = torch.zeros_like(layer.leaf)
    optimizer.step()
    for name, layer in csq_layers(model).items():
        assert torch.equal(layer.gate_logits, before[f"{name}.gate_logits"])
        assert torch.equal(layer.scale, before[f"{name}.scale"])
        moved = layer.bit_logits - before[f"{name}.bit_logits"]
        # Towards a weight of 0: positive bits of positive weights fall, negative bits rise.
        assert (moved * signs[name] * torch.tensor([1, -1]).view(2, *[1] * (moved.ndim - 1)) <= 0).all()
        assert moved.abs().max() > 0


def test_gradients_accumulate() -> None:
    models = []
    for single_pass in (False, True):
        model = make_model(FLOAT64)
        optimizer = make_optimizer(model, "sgd", single_pass, weight_decay=0.0)
        for step in range(6):
            images, labels = batch(FLOAT64, step)
            nn.functional.cross_entropy(model(images), labels).backward()
            if step % 3 == 2:
                optimizer.step()
                optimizer.zero_grad(set_to_none=step == 2)
        models.append(model.state_dict())
    for name, tensor in models[0].items():
        torch.testing.assert_close(models[1][name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("interrupted_after", [3, STEPS // 2, STEPS // 2 + 5])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(kind: str, narrow: bool, interrupted_after: int) -> None:
    whole, whole_optimizer, _ = trained(kind, True, STEPS, FLOAT32, narrow=narrow)
    model, optimizer, search = trained(kind, True, interrupted_after, FLOAT32, narrow=narrow)
    saved = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, search)], saved)
    del model, optimizer, search
    saved.seek(0)
    states = torch.load(saved)
    model = make_model()
    model.load_state_dict(states[0])
    optimizer = make_optimizer(model, kind, True, narrow=narrow)
    optimizer.load_state_dict(states[1])
    search = csq.Search(model, budget="3 bits", total_steps=STEPS, optimizer=optimizer, search_temperature=10.0)
    search.load_state_dict(states[2])
    train(model, optimizer, search, interrupted_after, STEPS)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    for a, b in zip(whole_optimizer.state.values(), optimizer.state.values(), strict=True):
        for name in a:
            left, right = (torch.as_tensor(state[name]).float() for state in (a, b))
            assert torch.equal(left, right), name


def test_a_checkpoint_fits_both_modes() -> None:
    model, _, _ = trained("sgd", True, 5, FLOAT32)
    ordinary = make_model()
    ordinary.load_state_dict(model.state_dict())
    images, _ = batch(FLOAT32, 0)
    assert torch.equal(ordinary(images), model(images))
    again, _, _ = trained("sgd", True, 2, FLOAT32)
    again.load_state_dict(ordinary.state_dict())
    assert torch.equal(again(images), model(images))


def test_finalize_pack_and_back_to_float() -> None:
    model, optimizer, _ = trained("sgd", True, STEPS, FLOAT32, narrow=True)
    images, _ = batch(FLOAT32, 0)
    as_float = model[0].to_float()
    assert type(as_float) is nn.Conv2d
    assert torch.equal(as_float.weight, model[0].weight)
    report = csq.finalize_(model, budget="3 bits")
    assert report.budget_met
    assert all(layer.stage == "hard" and layer.dtype == FLOAT32 for layer in csq_layers(model).values())
    hard = model(images)
    csq.pack_(model)
    torch.testing.assert_close(model(images), hard)
    del optimizer


def test_a_change_by_hand_refreshes_the_weight() -> None:
    model = make_model()
    optimizer = make_optimizer(model, "sgd", True)
    layer = model[4]
    before = layer.weight.detach().clone()
    layer.temperature.fill_(5.0)
    assert not torch.equal(layer.weight, before)
    with torch.no_grad():
        layer.scale.mul_(2)
    twin = copy.deepcopy(layer)
    twin.make_weight_computed_()
    assert torch.equal(layer.weight, twin.weight)
    layer.set_weight_(before)
    torch.testing.assert_close(layer.weight.detach(), before, rtol=1e-3, atol=1e-3)
    del optimizer


def test_a_weight_written_from_outside_is_not_hardened_silently() -> None:
    model, optimizer, _ = trained("sgd", True, 3, FLOAT32)
    with torch.no_grad():
        model[4].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="expected the weight that bit_logits make, got one that differs by"):
        csq.finalize_(model)
    del optimizer


def test_moving_average_of_the_bits() -> None:
    model = make_model()
    optimizer = make_optimizer(model, "sgd", True)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    expected = model[4].bit_logits.clone()
    for step in range(4):
        train(model, optimizer, None, step, step + 1)
        average.update_parameters(model)
        latest = model[4].bit_logits.clone()
        expected = latest if step == 0 else 0.5 * expected + 0.5 * latest
    torch.testing.assert_close(average.module[4].bit_logits.detach(), expected.detach())
    twin = copy.deepcopy(average.module[4])
    twin.refresh_weight_()
    assert torch.equal(average.module[4].weight, twin.weight)
    csq.finalize_(average.module)


def test_scheduler_groups_and_a_frozen_layer() -> None:
    model = make_model()
    optimizer = make_optimizer(model, "sgd", True)
    assert [group["name"] for group in optimizer.param_groups] == ["no_decay", "bit_logits", "gate_logits", "scale"]
    model[0].requires_grad_(False)
    before = copy.deepcopy(model[0].state_dict())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    search = csq.Search(model, budget="3 bits", total_steps=100)
    images, labels = batch(FLOAT32, 0)
    (nn.functional.cross_entropy(model(images), labels) + search.penalty()).backward()
    optimizer.step()
    scheduler.step()
    assert all(torch.equal(before[name], tensor) for name, tensor in model[0].state_dict().items())
    moved = copy.deepcopy(model.state_dict())
    train(model, optimizer, None, 1, 3)
    assert all(torch.equal(moved[name], tensor) for name, tensor in model.state_dict().items())


def test_a_layer_without_gradient_keeps_its_state() -> None:
    model, optimizer, _ = trained("sgd", True, 3, FLOAT32)
    before = model[4].bit_logits.clone()
    momentum = optimizer.state[model[4].weight]["momentum_buffer"].clone()
    images, _ = batch(FLOAT32, 0)
    optimizer.zero_grad()
    model[:4](images).sum().backward()
    optimizer.step()
    assert torch.equal(model[4].bit_logits, before)
    assert torch.equal(optimizer.state[model[4].weight]["momentum_buffer"], momentum)


def test_grad_scaler_and_autocast() -> None:
    model = make_model()
    optimizer = make_optimizer(model, "sgd", True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    twin = make_model()
    plain = make_optimizer(twin, "sgd", True)
    search, twin_search = (csq.Search(m, budget="3 bits", total_steps=100) for m in (model, twin))
    for step in range(3):
        images, labels = batch(FLOAT32, step)
        scaler.scale(nn.functional.cross_entropy(model(images), labels) + search.penalty()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        search.step()
        (nn.functional.cross_entropy(twin(images), labels) + twin_search.penalty()).backward()
        plain.step()
        plain.zero_grad()
        twin_search.step()
    torch.testing.assert_close(model[4].bit_logits, twin[4].bit_logits)
    torch.testing.assert_close(model[4].gate_logits, twin[4].gate_logits)
    images, labels = batch(FLOAT32, 0)
    images[0, 0, 0, 0] = torch.inf
    before = model[4].bit_logits.clone()
    scaler.scale(nn.functional.cross_entropy(model(images), labels)).backward()
    scaler.step(optimizer)
    assert torch.equal(model[4].bit_logits, before)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).dtype == torch.bfloat16


def test_clipping_is_of_the_gradient_of_the_weight() -> None:
    model = make_model()
    optimizer = make_optimizer(model, "sgd", True)
    images, labels = batch(FLOAT32, 0)
    nn.functional.cross_entropy(model(images), labels).backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    squares = [parameter.grad.square().sum() for parameter in model.parameters()]
    assert norm > 1e-3
    torch.testing.assert_close(torch.stack(squares).sum().sqrt(), torch.tensor(1e-3), rtol=1e-3, atol=0)
    optimizer.step()


def test_tied_layers_share_one_leaf() -> None:
    embedding, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    csq.prepare_(model, csq.Config(n_bits=4))
    optimizer = csq.optim.SGD(model, 0.1)
    assert model[0].weight is model[1].weight
    assert [name for name, _ in model.named_parameters()] == ["0.weight"]
    search = csq.Search(model, budget="3 bits", total_steps=10, optimizer=optimizer)
    for _ in range(10):
        optimizer.zero_grad()
        (model(torch.arange(11)).square().mean() + search.penalty()).backward()
        optimizer.step()
        search.step()
    csq.finalize_(model)
    assert torch.equal(model[0].weight, model[1].weight)


def test_a_compiled_model_sees_every_step() -> None:
    model = make_model()
    optimizer = make_optimizer(model, "sgd", True)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    images, _ = batch(FLOAT32, 0)
    for _ in range(3):
        torch.testing.assert_close(compiled(images), model(images))
        compiled(images).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_closures_are_evaluated_once() -> None:
    model = make_model()
    optimizer = make_optimizer(model, "sgd", True)
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        optimizer.zero_grad()
        loss = model(batch(FLOAT32, 0)[0]).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    assert calls == [1]


def test_channels_last_weights_are_stepped_alike() -> None:
    weights = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = make_model()
        optimizer = make_optimizer(model, "sgd", True)
        model.to(memory_format=memory_format)
        train(model, optimizer, None, 0, 2)
        weights.append(model[0].weight.detach())
    torch.testing.assert_close(*weights)


def test_narrow_state_has_the_bytes_that_were_promised() -> None:
    for narrow, most in ((False, 136), (True, 60)):
        layer = nn.Sequential(CSQLinear(256, 256, bias=False))
        optimizer = csq.optim.SGD(layer, 0.1, momentum=0.9, narrow=narrow)
        layer(torch.randn(2, 256)).sum().backward()
        optimizer.step()
        held = [layer[0].weight, layer[0].weight.grad, layer[0].bit_logits]
        held += [state for state in optimizer.state[layer[0].weight].values() if isinstance(state, Tensor)]
        assert sum(tensor.nbytes for tensor in held) / 256**2 <= most


def test_narrow_training_reaches_what_wide_training_reaches() -> None:
    losses = []
    for narrow in (False, True):
        model, _, _ = trained("sgd", True, STEPS, FLOAT32, narrow=narrow)
        images, labels = batch(FLOAT32, STEPS - 1)
        losses.append(nn.functional.cross_entropy(model(images), labels).item())
    assert abs(losses[0] - losses[1]) < 0.2 * losses[0]


def test_misuse_is_named() -> None:
    with pytest.raises(ValueError, match="expected model with a CSQ layer that is not hard, got none"):
        csq.optim.SGD(nn.Sequential(nn.Linear(2, 2)))
    model = make_model()
    stock = make_optimizer(model, "sgd", False)
    with pytest.raises(ValueError, match=r"expected 0.bit_logits in no other optimizer, got it in a torch.optim.SGD"):
        csq.optim.SGD(model)
    del stock
    gc.collect()
    with pytest.raises(ValueError, match="Invalid momentum value: -1"):
        csq.optim.SGD(model, momentum=-1)
    assert not model[0].weight_is_leaf
    optimizer = csq.optim.SGD(model, 0.1, momentum=0.9)
    with pytest.raises(ValueError, match="expected 0 in one optimizer, got it in another SGD already"):
        csq.optim.AdamW(model)
    train(model, optimizer, None, 0, 1)
    with pytest.raises(TypeError, match="expected no copy of SGD"):
        copy.deepcopy(optimizer)
    model[4].fix_scheme_((3, 4), drop_planes=True)
    with pytest.raises(ValueError, match=r"expected momenta of shape \(2, 2, 16, 128\), got \(2, 6, 16, 128\)"):
        train(model, optimizer, None, 1, 2)
    with pytest.raises(TypeError, match=r"expected 0.bit_logits of float32, bfloat16 or float64, got torch.float16"):
        csq.optim.SGD(make_model(torch.float16))


def test_a_finished_optimizer_leaves_its_layers_free() -> None:
    model = make_model()
    optimizer = csq.optim.SGD(model)
    del optimizer
    gc.collect()
    assert isinstance(csq.optim.AdamW(model), SinglePassOptimizer)


def test_wrapped_models_are_not_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    class DistributedDataParallel(nn.Sequential):
        pass

    with pytest.raises(
        ValueError, match="expected a model to prepare before it is wrapped, got DistributedDataParallel"
    ):
        csq.prepare_(DistributedDataParallel(nn.Linear(2, 2)))
