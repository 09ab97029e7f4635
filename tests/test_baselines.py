"""The baselines: uniform LSQ, rounding, float; and a start from given weights."""

import json

import pytest
import torch
from torch import nn

import csq_kernels as csq
from csq_kernels.nn import PackedLinear
from csq_kernels.train import baselines

pytest.importorskip("pydantic")
pytest.importorskip("sklearn")
from csq_kernels.train import loop, recipe, running

SHORT = ["epochs.float=1", "epochs.search=1", "epochs.finetune=1"]


def small(*overrides):
    return recipe.load("digits_mlp", [*SHORT, *overrides])


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5))


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_learnt_steps_end_as_the_same_integers(bits):
    model, images = network(), torch.randn(7, 2, 4, 4)
    baselines.learn_steps_(model, bits, csq.Config())
    optimizer = torch.optim.SGD(csq.param_groups(model, 0.05), lr=0.05)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        model(images).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    soft = model(images)
    baselines.pack_learnt_(model, bits)
    for layer in (model[0], model[3]):
        codes = layer.integer_codes()
        assert -(2 ** (bits - 1)) <= codes.min() and codes.max() < 2 ** (bits - 1)
        assert layer.stored_bits <= bits
    torch.testing.assert_close(model(images), soft, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_step_is_that_of_the_paper():
    """Esser et al. 2020, equation (3): -low or high outside, round(v) - v inside, times 1 / sqrt(count * high)."""
    weight = torch.tensor([[-5.0, -0.6, 0.3, 0.8, 9.0]])
    quantizer = baselines.LearntStepWeight(weight, 3, 0)
    with torch.no_grad():
        quantizer.step.fill_(1.0)
    quantizer(weight).sum().backward()
    expected = (-4 + (-1 + 0.6) + (0 - 0.3) + (1 - 0.8) + 3) / (5 * 3) ** 0.5
    assert quantizer.step.grad.item() == pytest.approx(expected, rel=1e-5)


def test_rounding_takes_the_best_step():
    model = network()
    weight = model[3].weight.detach().clone()
    naive = weight.abs().amax(1, keepdim=True) / 3
    error = ((weight / naive).round().clamp(-4, 3) * naive - weight).square().sum()
    baselines.round_(model, 3, csq.Config(rules={"0": None}))
    assert type(model[0]) is nn.Conv2d and type(model[3]) is PackedLinear
    assert 0 < (model[3].weight - weight).square().sum() < error


def test_tied_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match="expected layers that share no weight, got tied ones"):
        baselines.round_(model, 3, csq.Config())


@pytest.mark.parametrize("method", ["lsq", "round", "float"])
def test_runs_of_the_baselines(method, tmp_path):
    loop.train(small(f"method={method}", "bits=4"), tmp_path)
    result = json.loads((tmp_path / "report.json").read_text())
    assert result["method"] == method and result["seed"] == 0 and result["hard_accuracy"] > 0.3
    if method == "float":
        assert result["hard_accuracy"] == result["float_accuracy"] and not (tmp_path / running.PACKED).exists()
        return
    assert result["scheme"]["stored_bits"] <= 4.0
    assert result["file_bytes"] == (tmp_path / running.PACKED).stat().st_size


def test_lsq_resumes_to_the_same_bits(tmp_path):
    chosen = ["method=lsq", "checkpoint.steps=7"]
    whole = loop.train(small(*chosen), tmp_path / "whole")
    broken = tmp_path / "broken"
    with pytest.raises(running.TimeUpError):
        loop.train(small(*chosen), broken, pause_after=0.0)
    while True:
        try:
            resumed = loop.train(small(*chosen), broken, resume=True, pause_after=0.002)
            break
        except running.TimeUpError:
            pass
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    assert (broken / running.PACKED).read_bytes() == (tmp_path / "whole" / running.PACKED).read_bytes()


def test_start_from_the_float_weights_of_another_run(tmp_path):
    first = loop.train(small("method=float", "epochs.float=3"), tmp_path / "float")
    for name, init in (("folder", tmp_path / "float"), ("file", tmp_path / "float" / running.FLOAT)):
        chosen = small("epochs.float=0", f"init={init}", "distillation={weight: 0.7}", "precision=bfloat16")
        result = loop.train(chosen, tmp_path / name)
        assert result["float_accuracy"] == first["float_accuracy"]
        assert result["scheme"]["budget_met"] is True
    with pytest.raises(running.TrainingError, match="expected init with the weights of mlp, got "):
        loop.train(small("epochs.float=0", f"init={tmp_path / 'nothing'}"), tmp_path / "bad")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["method=csq", "epochs.search=0"], "epochs.search and epochs.finetune of at least 1"),
        (["method=lsq", "epochs.search=0", "epochs.finetune=0"], "epochs of search or finetune"),
        (["method=lsq", "quantization.act_bits=4"], "act_bits null"),
        (["method=magic"], "method"),
        (["epochs.float=0", "distillation={weight: 0.5}"], "a float model to distil from"),
    ],
)
def test_recipes_that_cannot_work(overrides, message):
    with pytest.raises(recipe.RecipeError, match=message):
        small(*overrides)
