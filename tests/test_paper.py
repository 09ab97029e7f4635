"""The published rules, which a recipe can ask for to be compared with."""

import pytest
import torch
from torch import nn

import csq_kernels as csq

pytest.importorskip("pydantic")
pytest.importorskip("sklearn")
from csq_kernels.train import loop, recipe, running
from csq_kernels.train.paper import PaperSearch

OVERRIDES = ["preset=paper", "epochs.float=0", "epochs.search=6", "epochs.finetune=2", "budget=1.0 paper bits"]


def prepared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    csq.prepare_(model, csq.Config(n_bits=4, scale_granularity="layer"))
    return model


def test_first_logits_are_the_digits():
    model = prepared()
    weight = model[0].weight.detach().clone()
    PaperSearch(model, "2 paper bits", 10).restart_()
    layer = model[0]
    assert set(layer.bit_logits.unique().tolist()) == {0.0, 1.0} and not layer.gate_logits.any()
    sign = layer.bit_logits[0].amax(0) - layer.bit_logits[1].amax(0)
    big = weight.abs() > weight.abs().max() / 15
    assert torch.equal(sign[big], weight[big].sign())
    # What the sigmoids leave of the weight at temperature 1: half a gate times sig(1) - sig(0).
    share = (layer.weight.abs().max() / weight.abs().max()).item()
    assert share == pytest.approx(0.5 * (torch.sigmoid(torch.tensor(1.0)).item() - 0.5), rel=1e-4)


def test_penalty_counts_layers_alike_and_temperature_goes_on():
    model = prepared()
    search = PaperSearch(model, "1 paper bits", 10, search_share=0.8)
    # All 8 gates open: 0.01 * (1 - 1/4) * sum of sig(1).
    expected = 0.01 * 0.75 * 8 * torch.sigmoid(torch.tensor(1.0)).item()
    assert search.penalty().item() == pytest.approx(expected, rel=1e-5)
    temperatures = []
    for _ in range(10):
        search.step()
        temperatures.append(model[0].temperature.item())
    assert temperatures[7] == pytest.approx(200, rel=1e-4) and temperatures[9] > temperatures[7]
    assert model[0].stage == "finetune" and search.penalty().item() == 0
    with pytest.raises(ValueError, match="expected budget in bits"):
        PaperSearch(prepared(), "1 MB", 10)


def test_a_missed_budget_is_reported_and_the_run_resumes(tmp_path):
    chosen = recipe.load("digits_mlp", OVERRIDES)
    whole = loop.train(chosen, tmp_path / "whole")
    assert whole["scheme"]["budget_met"] is False and whole["scheme"]["cost"] > 1.0
    stopped = recipe.load("digits_mlp", [*OVERRIDES, "checkpoint.steps=9"])
    with pytest.raises(running.TimeUpError):
        loop.train(stopped, tmp_path / "broken", pause_after=0.0)
    resumed = loop.train(stopped, tmp_path / "broken", resume=True)
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
