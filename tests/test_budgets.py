"""Several budgets at once, how much of them the repair uses, and searches of random small networks in every unit."""

import itertools
import random

import pytest
import torch
from torch import nn

import csq_kernels as csq
from csq_kernels.budget import Budget, Cost, _fill, _reduce, active_sets, costs, gate_scores, repair
from csq_kernels.nn.prepare import csq_layers
from csq_kernels.report import health
from csq_kernels.train import models


def build(*sizes, **options):
    torch.manual_seed(4)
    model = nn.Sequential(*(nn.Linear(size, 1) for size in sizes))
    csq.prepare_(model, csq.Config(**options))
    return model


def set_gates(model, draw):
    with torch.no_grad():
        for name, layer in csq_layers(model).items():
            layer.gate_logits.copy_(draw(name, layer))


def test_several_budgets_are_parsed_and_one_bad_one_is_named():
    assert Budget.parse_all("2 ms") == (Budget(2.0, "ms"),)
    assert Budget.parse_all(["3 bits", Budget(1.0, "MB")]) == (Budget(3.0, "stored bits"), Budget(1.0, "MB"))
    with pytest.raises(ValueError, match="expected budget as '3.0 bits'.* got '3 apples'"):
        Budget.parse_all(["3 bits", "3 apples"])
    with pytest.raises(ValueError, match="expected budget as at least one, got none"):
        Budget.parse_all([])


@pytest.mark.parametrize("text", ["1.5 GBOPs", "300 MBOPs", "2.5 ms", "1e-3ms"])
def test_units_of_work_are_read_and_written(text):
    assert Budget.parse(str(Budget.parse(text))) == Budget.parse(text) and Budget.parse(text).needs_workload
    assert Budget.parse(text).needs_latency is ("ms" in text)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "budgets", [["3 bits", "2 paper bits"], ["2.2 bits", "1 MB"], ["9 bits", "0.9 paper bits"], ["0.0015 MB", "3 bits"]]
)
def test_repair_meets_all_budgets_and_spends_what_fits_all(budgets, seed):
    model = build(300, 200, 40, 7, min_bits=0)
    torch.manual_seed(seed)
    set_gates(model, lambda _, layer: torch.randn(8))
    both = costs(model, budgets)
    scheme = repair(active_sets(both[0].layers), gate_scores(both[0].layers), both)
    assert all(cost.is_met(scheme) for cost in both)
    for name, bits in scheme.items():
        for bit in set(range(8)) - bits:
            assert not all(cost.is_met({**scheme, name: bits | {bit}}) for cost in both), "a bit would still fit"
    assert max(cost.total(scheme) / cost.limit for cost in both) >= 0.97


def test_the_search_steers_to_the_tightest_budget():
    model = build(300, 200, 40)
    search = csq.Search(model, ["8.9 bits", "2.5 paper bits"], 120, strength=1.0)
    optimizer = torch.optim.SGD(csq.param_groups(model, 0.1, gate_lr=0.1), lr=0.1)
    for _ in range(59):
        optimizer.zero_grad()
        search.penalty().backward()
        optimizer.step()
        search.step()
    loose, tight = (cost.soft(sharpness=8.0).item() for cost in search.costs)
    assert tight == pytest.approx(2.5, abs=0.15) and loose < 6.0
    assert search.progress()["budget"] == "2.5 paper bits"
    search.step()
    report = csq.finalize_(model, budget=["8.9 bits", "2.5 paper bits"])
    assert [use.met for use in report.budgets] == [True, True] and report.budget_met
    lines = str(report).splitlines()[-2:]
    assert lines[0].startswith("budget 8.9 stored bits: used ") and lines[1].startswith(
        "budget 2.5 paper bits: used 2."
    )
    content = report.to_dict()
    assert content["budget"] == "8.9 stored bits" and content["cost"] == report.stored_bits
    assert [use["budget"] for use in content["budgets"]] == ["8.9 stored bits", "2.5 paper bits"]


def test_one_missed_budget_of_two_is_a_missed_budget():
    report = csq.report(build(30), ["9 bits", "7 paper bits"])
    assert [use.met for use in report.budgets] == [True, False] and report.budget_met is False
    assert str(report).endswith("budget 7 paper bits: used 8 (114.3%), NOT met")
    with pytest.raises(ValueError, match="expected budget of at least 1 paper bits for this model, got 0.5 paper bits"):
        csq.Search(build(30), ["9 bits", "0.5 paper bits"], 10)


def test_state_of_a_search_with_several_budgets():
    search = csq.Search(build(30), ["3 bits", "2 paper bits"], 10)
    other = csq.Search(build(30), ["3 bits", "2 paper bits"], 10)
    other.first_costs = [0.0, 0.0]
    other.load_state_dict(search.state_dict())
    assert other.first_costs == search.first_costs and len(search.first_costs) == 2
    with pytest.raises(ValueError, match="expected search state with 1 budgets, got one with 2"):
        csq.Search(build(30), "3 bits", 10).load_state_dict(search.state_dict())


def greedy(cost):
    """The scheme without exchanges."""
    layers = cost.layers
    active, scores = active_sets(layers), gate_scores(layers)
    minimum = {name: layer.min_bits for name, layer in layers.items()}
    active = {name: bits or frozenset({max(scores[name], key=scores[name].get)}) for name, bits in active.items()}
    return _fill(_reduce(active, scores, [cost], minimum), scores, [cost])


def test_bits_are_exchanged_where_greedy_choice_wastes_the_budget():
    model = build(100, 60, n_bits=1, min_bits=0)
    set_gates(model, lambda name, _: torch.tensor([-1.0 if name == "0" else 1.0]))
    cost = Cost(model, Budget(100 / 160, "paper bits"))
    scheme = repair(active_sets(cost.layers), gate_scores(cost.layers), cost)
    assert scheme == {"0": frozenset({0}), "1": frozenset()} and cost.total(scheme) == cost.limit


def test_no_wanted_bit_goes_for_the_last_hundredth():
    model = build(1000, 995, n_bits=1, min_bits=0)
    set_gates(model, lambda name, _: torch.tensor([-1.0 if name == "0" else 1.0]))
    cost = Cost(model, Budget(1000 / 1995, "paper bits"))
    assert repair(active_sets(cost.layers), gate_scores(cost.layers), cost)["0"] == frozenset()


@pytest.mark.parametrize("bits", [2.5, 3.0, 3.5])
def test_a_resnet20_uses_its_budget(bits):
    model = models.build("resnet20", 3, 32, 10)
    csq.prepare_(model)
    cost = Cost(model, Budget(bits, "stored bits"))
    for seed, favourites in itertools.product(range(8), (False, True)):
        torch.manual_seed(seed)
        # Favourites: small layers keep all their bits, so that nothing small is left to fill the budget with.
        bonus = {name: 6.0 * (favourites and cost.weights[name] < 30000) for name in cost.layers}
        set_gates(model, lambda name, _, bonus=bonus: torch.randn(8) + bonus[name])
        before, scheme = greedy(cost), repair(active_sets(cost.layers), gate_scores(cost.layers), cost)
        assert 0.97 * cost.limit <= cost.total(scheme) <= cost.limit
        assert cost.total(before) <= cost.total(scheme) and all(scheme.values())


class Tokens(nn.Module):
    """An embedding before a convolution and a head."""

    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(16, 2 * width)
        self.convolution = nn.Conv2d(1, width, 3, stride=2)
        self.head = nn.LazyLinear(3)

    def forward(self, tokens):
        hidden = torch.relu(self.convolution(self.embedding(tokens)[:, None]))
        return self.head(hidden.flatten(1))


def random_network(draw):
    kind, width = draw.choice(["linear", "conv", "tokens"]), draw.randint(3, 9)
    if kind == "tokens":
        inputs = torch.randint(0, 16, (8, 5))
        model = Tokens(width)
        model(inputs)
        return model, inputs
    if kind == "conv":
        body = [nn.Conv2d(2, 2 * width, 3), nn.ReLU(), nn.Conv2d(2 * width, 4, 3, groups=2), nn.Flatten()]
        return nn.Sequential(*body, nn.Linear(16, 3)), torch.randn(8, 2, 6, 6)
    layers = [nn.Linear(7, 4 * width), nn.BatchNorm1d(4 * width), nn.ReLU(), nn.Linear(4 * width, width)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(width, 3)), torch.randn(8, 7)


def random_optimizer(draw, model):
    lr, rates = draw.choice([1e-3, 1e-2]), {"gate_lr": 0.05, "logit_lr": 0.02}
    single_pass, adam = draw.random() < 0.5, draw.random() < 0.5
    if single_pass:
        return (csq.optim.AdamW if adam else csq.optim.SGD)(model, lr=lr, **rates)
    return (torch.optim.AdamW if adam else torch.optim.SGD)(csq.param_groups(model, lr, **rates), lr=lr)


def random_budgets(draw, model, counted):
    """One or two budgets between what the model needs at least and what it starts with."""
    units = draw.sample(["stored bits", "paper bits", "MB", "MBOPs", "GBOPs", "ms"], draw.choice([1, 1, 2]))
    budgets = []
    for unit in units:
        cost = Cost(model, Budget(1.0, unit), counted)
        least = cost.of({name: range(layer.min_bits) for name, layer in cost.layers.items()})
        most = cost.of({name: range(layer.n_bits) for name, layer in cost.layers.items()})
        budgets.append(Budget(least + draw.uniform(0.02, 1.05) * (most - least), unit))
    return budgets


@pytest.mark.parametrize("seed", range(20))
def test_random_searches_end_finite_and_within_their_budgets(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    model, inputs = random_network(draw)
    n_bits = draw.randint(2, 8)
    min_bits = draw.choice([0, 1])
    config = csq.Config(
        n_bits=n_bits,
        initial_bits=draw.choice([None, draw.randint(1, n_bits)]),
        gate_granularity=draw.choice(["layer", "channel"]),
        scale_granularity=draw.choice(["layer", "channel"]),
        act_bits=draw.choice([None, 4]),
        min_bits=min_bits,
    )
    csq.prepare_(model, config)
    counted = csq.workload(model, inputs[:2], latency=True)
    budgets = random_budgets(draw, model, counted)
    optimizer = random_optimizer(draw, model)
    search = csq.Search(model, budgets, 12, optimizer=optimizer, workload=counted)
    labels = torch.randint(0, 3, (8,))
    for _ in range(12):
        loss = nn.functional.cross_entropy(model(inputs), labels) + search.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        search.step()
        assert bool(torch.isfinite(loss))
    sets = active_sets(search.layers)
    assert search.stage == "finetune" and all(cost.is_met(sets) for cost in search.costs)
    assert all(len(bits) >= min_bits for bits in sets.values())
    assert not [warning for warning in health(model) if "finite" in warning]
    report = csq.finalize_(model, data=[inputs], budget=budgets, workload=counted)
    assert report.budget_met and len(report.budgets) == len(budgets)
    assert bool(torch.isfinite(model.eval()(inputs)).all())
