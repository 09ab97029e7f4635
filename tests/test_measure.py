"""What an epoch of CSQ is measured by: true to the hard model, and no trace in the model or the random streams."""

import copy
import doctest

import pytest
import torch
from torch import nn

import csq_kernels as csq
from csq_kernels.train import loop, measure


class Tied(nn.Module):
    """Layers that share a weight, batch norm, and dropout, which draws random numbers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6, bias=False)
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.second(self.drop(self.norm(self.first(x)).relu())))


BATCHES = [torch.randn(16, 6, generator=torch.Generator().manual_seed(n)) for n in range(4)]


def trained(kind: str, stage: str, config: csq.Config | None = None) -> nn.Module:
    """A model some steps into a stage, stepped by one optimizer or the other."""
    torch.manual_seed(0)
    model = Tied()
    csq.prepare_(model, config or csq.Config(n_bits=4))
    if kind == "separate":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(csq.param_groups(model, 0.05), lr=0.05)
    else:
        optimizer = csq.optim.SGD(model, lr=0.05, narrow=kind == "narrow")
    search = csq.Search(model, "2.5 bits", 20, optimizer=optimizer)
    for step in range(5 if stage == "search" else 14):
        loss = model(BATCHES[step % 4]).square().mean() + search.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        search.step()
    return model


def accuracy(model: nn.Module) -> float:
    """Not an accuracy, but a number that tells any two models apart."""
    training = model.training
    model.eval()
    with torch.no_grad():
        value = float(model(BATCHES[0]).sum())
    model.train(training)
    return value


@pytest.mark.parametrize("stage", ["search", "finetune"])
@pytest.mark.parametrize("kind", ["single-pass", "narrow", "separate"])
def test_the_model_and_the_random_streams_are_left_alone(kind, stage):
    model = trained(kind, stage)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    logits = model.first.bit_logits
    pointers = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    names = [name for name, _ in model.named_parameters()]
    measured = measure.measure(model, BATCHES, accuracy)
    assert torch.equal(rng, torch.get_rng_state())
    assert model.training and model.drop.training and model.first.stage == stage
    assert model.first.bit_logits is logits and model.second.bit_logits is logits
    assert [name for name, _ in model.named_parameters()] == names
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())] == pointers
    assert measure.measure(model, BATCHES, accuracy) == measured


@pytest.mark.parametrize("stage", ["search", "finetune"])
def test_measured_is_the_hard_model(stage):
    model = trained("single-pass", stage)
    scheme = csq.report(model)
    measured = measure.measure(model, BATCHES, accuracy)
    assert measured["weight_gap"] == {row.name: round(row.gap, 5) for row in scheme.layers}
    assert measured["undecided"] == {row.name: round(row.undecided, 5) for row in scheme.layers}
    assert max(measured["weight_gap"].values()) > 0 and measured["weight_gap"].keys() == {"first", "head"}
    for name, gates in measured["gates"].items():
        layer = getattr(model, name)
        expected = [0.0] * 4
        for bit, logit in zip(layer.bits, layer.gate_logits.tolist(), strict=True):
            soft = torch.sigmoid(layer.temperature * logit).item()
            expected[bit] = soft if stage == "search" else float(logit > 0)
        assert gates == pytest.approx(expected, abs=1e-5)
    hard = copy.deepcopy(model)
    csq.finalize_(hard, data=BATCHES)
    assert measured["hard_accuracy"] == accuracy(hard) != accuracy(model)


def test_gates_of_channels_are_averaged():
    model = trained("separate", "search", csq.Config(n_bits=3, gate_granularity="channel"))
    gates = measure.measure(model, BATCHES, accuracy)["gates"]
    soft = torch.sigmoid(model.head.temperature * model.head.gate_logits.detach())
    assert soft.shape == (3, 3) and gates["head"] == pytest.approx(soft.mean(1).tolist(), abs=1e-5)


@pytest.mark.parametrize("module", [measure, loop], ids=lambda module: module.__name__)
def test_examples_in_the_docstrings_run(module):
    results = doctest.testmod(module)
    assert results.attempted > 0 and results.failed == 0
