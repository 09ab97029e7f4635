"""What a forward pass costs: multiplications, bit operations, the table of times, and budgets in these units."""

import copy
import sys

import pytest
import torch
from torch import nn

import csq_kernels as csq
from csq_kernels.budget import Cost, active_sets
from csq_kernels.workload import Workload, workload


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def brute_force_macs(layer, inputs):
    """Multiplications of a float layer: with ones everywhere and wide zero padding outside, each adds 1 to the sum."""
    probe = copy.deepcopy(layer)
    nn.init.ones_(probe.weight)
    return round(probe(torch.ones_like(inputs)).sum().item())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 3, bias=False), (2, 4, 5)),
        (nn.Linear(5, 3, bias=False), (5,)),
        (nn.Conv1d(4, 6, 3, stride=2, groups=2, bias=False), (2, 4, 11)),
        (nn.Conv2d(4, 8, (3, 2), dilation=2, bias=False), (1, 4, 9, 9)),
        (nn.Conv2d(6, 6, 3, groups=6, bias=False), (2, 6, 7, 7)),
        (nn.Conv2d(3, 5, 3, bias=False), (3, 7, 7)),
        (nn.Conv3d(2, 4, 2, groups=2, bias=False), (1, 2, 4, 4, 4)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), (2, 4, 5, 5)),
    ],
    ids=lambda value: str(value),
)
def test_macs_are_those_that_a_sum_of_ones_counts(layer, shape):
    expected = brute_force_macs(layer, torch.empty(shape))
    model = nn.Sequential(layer)
    csq.prepare_(model)
    assert workload(model, torch.zeros(shape)).macs == {"0": expected}


class Tied(nn.Module):
    """An embedding whose table is the head as well, a layer that is called twice, and one that never is."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.dropout = nn.Dropout()
        self.idle = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.dropout(self.body(self.body(input=self.embedding(tokens)))))


def tied(**options):
    torch.manual_seed(1)
    model = Tied()
    csq.prepare_(model, csq.Config(**options))
    return model


def test_tied_layers_and_repeated_calls_add_up():
    counted = workload(tied(act_bits=4), torch.zeros(2, 5, dtype=torch.int64))
    assert counted.macs == {"embedding": 10 * 6 * 11, "body": 2 * 10 * 36, "idle": 0}
    assert counted.operations == {name: 4 * macs for name, macs in counted.macs.items()}
    assert counted.nanoseconds is None


def test_the_model_is_left_as_it_was():
    model = tied(act_bits=4)
    model.body.eval()
    before, modes = states(model), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    workload(model, torch.zeros(1, 3, dtype=torch.int64), latency=True)
    after = states(model)
    assert all(torch.equal(before[name], after[name]) for name in before) and before.keys() == after.keys()
    assert [module.training for module in model.modules()] == modes and torch.equal(random, torch.get_rng_state())
    assert not model.body.input_quantizer.calibrated
    assert not any(module._forward_hooks for module in model.modules())


def test_times_rise_with_the_bits_and_every_width_is_measured():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 3, 3), nn.Flatten(), nn.Linear(75, 5))
    csq.prepare_(model, csq.Config(n_bits=5, rules={"4": {"n_bits": 3}}))
    timed = workload(model, torch.zeros(1, 2, 5, 5), latency=True)
    assert {name: len(row) for name, row in timed.nanoseconds.items()} == {"0": 7, "2": 7, "4": 5}
    for row in timed.nanoseconds.values():
        assert row[0] > 0 and all(a < b for a, b in zip(row, row[1:], strict=False))
    promised = timed.milliseconds({"0": 3, "2": 2, "4": 4})
    parts = [timed.nanoseconds["0"][3], timed.nanoseconds["2"][2], timed.nanoseconds["4"][4], timed.rest_nanoseconds]
    assert promised == pytest.approx(sum(parts) / 1e6)
    assert Workload.from_dict(timed.to_dict()) == timed


def test_each_width_is_timed_with_that_many_planes(monkeypatch):
    planes = []

    def note(module, args, kwargs, device):
        if not isinstance(module, nn.Sequential):
            planes.append(module.stored_bits)
        return 1000

    monkeypatch.setattr(sys.modules[workload.__module__], "nanoseconds", note)
    model = nn.Sequential(nn.Linear(3, 1))
    csq.prepare_(model, csq.Config(n_bits=8))
    timed = workload(model, torch.zeros(1, 3), latency=True)
    assert planes[:20] == 2 * list(range(10))
    # A clock that stands still: a nanosecond a bit is what closing one saves at least.
    assert timed.nanoseconds == {"0": tuple(range(1000, 1010))} and timed.rest_nanoseconds == 0


def test_a_hard_model_can_be_counted():
    model = tied()
    csq.finalize_(model, budget="3 bits")
    tokens = torch.zeros(1, 3, dtype=torch.int64)
    assert workload(model, tokens, latency=True).macs == workload(tied(), tokens).macs


def test_bad_arguments():
    with pytest.raises(ValueError, match="expected model with CSQ layers, got none"):
        workload(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="expected precision as one of"):
        workload(tied(), torch.zeros(1, 2, dtype=torch.int64), precision="half")
    with pytest.raises(ValueError, match="measured with latency=True"):
        workload(tied(), torch.zeros(1, 2, dtype=torch.int64)).milliseconds({})


def mixed():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 10))
    csq.prepare_(model, csq.Config(act_bits=4, rules={"0": {"act_bits": None}}))
    return model, torch.zeros(1, 1, 6, 6)


# Steps in the times, as kernels have that work on pairs of planes.
TIMES = Workload(
    {}, {"0": 0, "3": 0}, {"0": (9, 10, 40, 41, 80, 81, 99, 100, 130, 131), "3": tuple(range(50, 150, 10))}, 7
)


@pytest.mark.parametrize("unit", ["GBOPs", "MBOPs", "ms"])
def test_costs_are_the_tables(unit):
    model, inputs = mixed()
    counted = TIMES if unit == "ms" else workload(model, inputs)
    cost = Cost(model, csq.Budget(1.0, unit), counted)
    sets = {"0": frozenset({0, 1, 4}), "3": frozenset({7})}
    operations = 5 * 16 * 36 * 32 + 2 * 640 * 4
    expected = {"GBOPs": operations / 1e9, "MBOPs": operations / 1e6, "ms": (7 + 81 + 70) / 1e6}
    assert cost.of(sets) == pytest.approx(expected[unit])
    for seed in range(5):
        torch.manual_seed(seed)
        for layer in cost.layers.values():
            with torch.no_grad():
                layer.gate_logits.copy_(torch.where(torch.rand(8) > 0.4, 50.0, -50.0))
        assert cost.soft().item() == pytest.approx(cost.of(active_sets(cost.layers)), rel=1e-5)


def test_soft_cost_lies_on_the_line_between_two_entries():
    model, _ = mixed()
    cost = Cost(model, csq.Budget(1.0, "ms"), TIMES)
    with torch.no_grad():
        model[0].gate_logits.fill_(-50.0)
        model[0].gate_logits[-1] = 0.0  # a gate of 1/2 at the top counts 1/2 + 1/2: one plane
        model[3].gate_logits.fill_(-50.0)
        model[3].gate_logits[-1] = torch.logit(torch.tensor(0.75))  # 1.5 planes
    soft = cost.soft()
    assert soft.item() == pytest.approx((7 + 10 + 65) / 1e6, rel=1e-5)
    soft.backward()
    # Two planes a gate, times the derivative 1/4 of the gate, and the slope 30 above one plane.
    assert model[0].gate_logits.grad[-1].item() == pytest.approx(30 * 2 / 4 / 1e6, rel=1e-4)


@pytest.mark.parametrize("budget", ["1 GBOPs", "3 MBOPs", "2 ms", ["3 bits", "2 ms"]])
def test_such_a_budget_needs_a_workload(budget):
    model, _ = mixed()
    for use in (lambda: csq.Search(model, budget, 10), lambda: csq.report(model, budget)):
        with pytest.raises(ValueError, match="expected workload with a budget of .* got None"):
            use()


def test_a_workload_of_another_model_or_without_times_is_refused():
    model, inputs = mixed()
    with pytest.raises(ValueError, match="expected workload of this model, with the layers 0, 3, got one of embedding"):
        csq.report(model, "1 GBOPs", workload(tied(), torch.zeros(1, 2, dtype=torch.int64)))
    with pytest.raises(ValueError, match="expected workload with latency=True with a budget of 2 ms"):
        csq.report(model, "2 ms", workload(model, inputs))
    narrow = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 10))
    csq.prepare_(narrow, csq.Config(rules={"3": {"n_bits": 4}}))
    with pytest.raises(ValueError, match="expected workload with 0 to 5 stored bits of 3"):
        csq.report(narrow, "2 ms", TIMES)


def test_a_search_ends_within_a_budget_of_bit_operations():
    model, inputs = mixed()
    counted = workload(model, inputs)
    search = csq.Search(model, "70 MBOPs", 20, workload=counted)
    assert search.progress()["budget"] == "70 MBOPs"
    with pytest.raises(ValueError, match="expected budget of at least 0.04198 MBOPs for this model, got 0.01 MBOPs"):
        csq.Search(model, "0.01 MBOPs", 20, workload=counted)
    search = csq.Search(model, "0.06 MBOPs", 20, workload=counted)
    optimizer = torch.optim.SGD(csq.param_groups(model, 0.1, gate_lr=1.0), lr=0.1)
    for _ in range(20):
        loss = model(torch.randn(4, 1, 6, 6)).square().mean() + search.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        search.step()
    report = csq.finalize_(model, budget="0.06 MBOPs", workload=counted)
    assert report.budget_met and "budget 0.06 MBOPs: used 0.0" in str(report)
    used = sum(counted.operations[row.name] * row.stored_bits for row in report.layers)
    assert report.cost == pytest.approx(used / 1e6) and used <= 60_000
