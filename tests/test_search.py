"""Budget, controller, repair, stages and the exact end of a search."""

import copy
import itertools
import math
import random

import pytest
import torch
from torch import nn

import csq_kernels as csq
from csq_kernels.budget import Budget, Cost, active_sets, gate_scores, repair, stored_bits, weight_bytes
from csq_kernels.nn.prepare import csq_layers
from csq_kernels.report import health
from csq_kernels.search import COUNT_SHARPNESS


def build(**options):
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, 10),
    )  # fmt: skip
    csq.prepare_(model, csq.Config(**options))
    return model


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 10, (8,), generator=generator)


def train(model, search, optimizer, steps):
    for _ in range(steps):
        values, labels = batch(search.steps_done)
        loss = nn.functional.cross_entropy(model(values), labels) + search.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        search.step()


def start(model, budget="3 bits", total_steps=24, drop=True, **options):
    optimizer = torch.optim.Adam(csq.param_groups(model, 1e-3, logit_lr=0.02, gate_lr=0.05), lr=1e-3)
    return csq.Search(model, budget, total_steps, optimizer=optimizer if drop else None, **options), optimizer


def states_equal(left, right):
    left, right = left.state_dict(), right.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_stored_bits_are_what_the_levels_need():
    for bits in itertools.chain.from_iterable(itertools.combinations(range(6), k) for k in range(1, 7)):
        separate, current = [], [bits[0]]
        for bit in bits[1:]:
            if bit == current[-1] + 1:
                current.append(bit)
            else:
                separate.append(current)
                current = [bit]
        separate.append(current)
        # A run of r ternary digits spans +-(2^r - 1) of its unit, which two's complement holds in r + 1 bits.
        needed = sum(math.ceil(math.log2(2 * (2 ** len(run) - 1) + 1)) for run in separate)
        assert stored_bits(bits) == needed
    assert weight_bytes((0, 1), weights=9, scales=2) == 3 * 2 + 8


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("3 bits", 3.0, "stored bits"),
        ("2.5 paper bits", 2.5, "paper bits"),
        (" 1.2MB ", 1.2, "MB"),
        (".5 stored bits", 0.5, "stored bits"),
    ],
)
def test_budget_text(text, value, unit):
    assert Budget.parse(text) == Budget(value, unit)
    assert Budget.parse(str(Budget.parse(text))) == Budget.parse(text)


@pytest.mark.parametrize("text", ["", "3", "bits", "-1 bits", "0 bits", "3 kB", "nan bits", 3.0, None])
def test_bad_budget_text(text):
    with pytest.raises(ValueError, match="expected budget as '3.0 bits'"):
        Budget.parse(text)


@pytest.mark.parametrize("unit", ["stored bits", "paper bits", "MB"])
def test_soft_cost_equals_exact_cost_once_gates_are_decided(unit):
    model = build(gate_granularity="layer")
    cost = Cost(model, Budget(1.0, unit))
    for layer in cost.layers.values():
        with torch.no_grad():
            layer.gate_logits.copy_(torch.where(torch.rand(8) > 0.4, 50.0, -50.0))
    # The first layer's 36 weights leave half a byte of each of at most 9 planes empty.
    assert cost.soft().item() == pytest.approx(cost.of(active_sets(cost.layers)), rel=1e-6, abs=9 * 0.5e-6)


def test_penalty_prunes_above_the_target_and_grows_below_it():
    model = build()
    search, _ = start(model, "3 bits")
    for steps_done, sign in ((search.search_steps - 1, 1), (0, 0)):
        model.zero_grad()
        search.steps_done = steps_done
        search.penalty().backward()
        assert (torch.sign(model[7].gate_logits.grad) == sign).all()
    grown = build(initial_bits=1)
    search, _ = start(grown, "8.5 bits")
    search.steps_done = search.search_steps - 1
    search.penalty().backward()
    assert (grown[7].gate_logits.grad[:-1] < 0).all()


def test_penalty_weighs_layers_by_their_weights():
    model = build()
    search, _ = start(model, "3 paper bits")
    search.steps_done = search.search_steps - 1
    search.penalty().backward()
    ratio = model[7].gate_logits.grad[0] / model[0].gate_logits.grad[0]
    assert ratio.item() == pytest.approx(1280 / 36, rel=1e-5)


def test_temperature_follows_equation_9():
    model = build()
    options = {"search_temperature": 16.0, "final_temperature": 1000.0, "decision_share": 0.0, "lateness": 1.0}
    search, _ = start(model, total_steps=20, search_share=0.5, **options)
    seen = []
    for _ in range(20):
        seen.append((search.stage, search.temperature))
        search.step()
    assert [stage for stage, _ in seen] == ["search"] * 10 + ["finetune"] * 10
    assert seen[0][1] == seen[10][1] == 1.0
    assert seen[5][1] == pytest.approx(16.0**0.5) and seen[15][1] == pytest.approx(1000.0**0.5)
    assert search.temperature == pytest.approx(1000.0) and model[0].temperature.item() == pytest.approx(1000.0)
    search.step()
    assert search.temperature == pytest.approx(1000.0)


def test_bits_learn_before_they_decide():
    options = {"search_temperature": 16.0, "final_temperature": 1000.0, "decision_share": 0.2, "lateness": 2.0}
    search, _ = start(build(), total_steps=20, search_share=0.5, **options)
    values = []
    for _ in range(20):
        values.append(search.temperature)
        search.step()
    assert values[5] == pytest.approx(4.0), "the search keeps to (9)"
    assert values[10] == 1.0 and values[14] == pytest.approx(2.0) and values[18] == pytest.approx(16.0)
    assert values[19] == pytest.approx((16 * 1000) ** 0.5) and search.temperature == pytest.approx(1000.0)


def test_gradients_keep_a_lower_temperature_once_the_scheme_is_fixed():
    model = build()
    search, _ = start(model, total_steps=20, search_share=0.5, gradient_temperature=3.0)
    layer = model[0]
    for _ in range(9):
        search.step()
    assert layer.stage == "search" and layer.gradient_temperature == layer.temperature > 3
    search.step()
    assert layer.stage == "finetune" and layer.gradient_temperature == layer.temperature == 1
    for _ in range(10):
        search.step()
    assert layer.gradient_temperature == 3 and layer.temperature == search.final_temperature
    csq.Search(model, "3 bits", 10, search_share=0.0)
    assert layer.gradient_temperature == layer.temperature, "a search brings its own"


@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_upper_planes_decide_and_keep_the_weight(granularity):
    layer = build(gate_granularity=granularity)[7]
    layer.fix_scheme_((4, 6, 7))
    with torch.no_grad():
        layer.temperature.fill_(3.0)
        layer.bit_logits += 0.3 * torch.randn(layer.bit_logits.shape, generator=torch.Generator().manual_seed(0))
        before = layer.weight.clone()
        layer.decide_upper_planes_(3.0)
        after, step = layer.weight, layer.scale[:, None] / (2**layer.n_bits - 1)
    rows = [layer.bits.index(bit) for bit in (6, 7)]
    assert ((3 * layer.bit_logits[:, rows]).abs() > 16).all()
    # Where the lowest plane, 2^4, cannot hold the remainder, it is at its end.
    lowest = layer.bit_logits[:, layer.bits.index(4)]
    free = (3 * lowest).amax(0) < 6 - 1e-4
    assert free.float().mean() > 0.5
    assert ((after - before).abs() / step)[free].max() < 16 * 1e-4
    assert ((after - before).abs() / step).max() < 2**5


@pytest.mark.parametrize("drop", [True, False], ids=["drop", "keep"])
@pytest.mark.parametrize("single_pass", [True, False])
def test_the_lowest_plane_learns_after_the_others_have_decided(drop, single_pass):
    model = build()
    if single_pass:
        optimizer = csq.optim.SGD(model, lr=0.05, momentum=0.9, logit_lr=100.0)
    else:
        optimizer = torch.optim.SGD(csq.param_groups(model, 0.05, logit_lr=100.0), lr=0.05, momentum=0.9)
    options = {"search_share": 0.25, "gradient_temperature": 3.0}
    search = csq.Search(model, "4 bits", 40, optimizer=optimizer if drop else None, **options)
    seen = []
    while search.steps_done < 40:
        train(model, search, optimizer, 1)
        if search.stage == "finetune" and search.temperature > 3:
            layer = model[7]
            stored = [layer.bits.index(bit) for bit in layer.active_bits()]
            seen.append([(layer.bit_logits[0, row] > 0).int() - (layer.bit_logits[1, row] > 0).int() for row in stored])
    assert len(seen) > 10 and len(seen[0]) > 1
    for first, last in zip(seen[0][1:], seen[-1][1:], strict=True):
        assert torch.equal(first, last)
    assert not torch.equal(seen[0][0], seen[-1][0])
    assert csq.finalize_(model, budget="4 bits").budget_met


@pytest.mark.parametrize("searched", [0, 7])
def test_the_scheme_can_be_fixed_early_and_resumed(searched):
    model = build()
    search, optimizer = start(model, budget="2.5 bits", total_steps=40, search_share=0.5 if searched else 0.0)
    for _ in range(searched):
        search.step()
    search.fix_scheme()
    assert search.stage == "finetune" and search.temperature == 1.0
    assert csq.report(model, "2.5 bits").budget_met
    with pytest.raises(RuntimeError, match="expected a search that still runs"):
        search.fix_scheme()
    search.step()
    state = copy.deepcopy(search.state_dict())
    other, _ = start(build(), budget="2.5 bits", total_steps=40)
    other.load_state_dict(state)
    assert other.stage == "finetune" and other.temperature == search.temperature
    for _ in range(40 - searched - 1):
        search.step()
    assert search.temperature == pytest.approx(search.final_temperature)


@pytest.mark.parametrize("schedule", ["exponential", "linear", "cosine"])
def test_schedules_rise_from_one_to_the_last_value(schedule):
    search, _ = start(build(), total_steps=20, schedule=schedule)
    values = []
    for _ in range(20):
        values.append(search.temperature)
        search.step()
    assert values[0] == 1.0 and values[:10] == sorted(values[:10]) and values[10:] == sorted(values[10:])
    assert search.temperature == pytest.approx(10000.0)


def test_raising_the_temperature_keeps_an_untrained_weight():
    model = nn.Sequential(nn.Linear(32, 16))
    csq.prepare_(model)
    search, _ = start(model, "9 bits", total_steps=40)
    for _ in range(20):
        search.step()
    weight = model[0].weight.detach().clone()
    assert search.stage == "finetune"
    for _ in range(20):
        search.step()
    # Only the soft digit of the lowest plane moves: at most one step for a weight, of which the largest has 255.
    assert (model[0].weight - weight).abs().max() <= weight.abs().max() / 255


@pytest.mark.parametrize("budget", ["3 bits", "2.1 bits", "2 paper bits", "8.9 bits"])
def test_soft_cost_follows_its_target(budget):
    model = build()
    search, optimizer = start(model, budget, total_steps=120)
    for _ in range(59):
        train(model, search, optimizer, 1)
        cost = search.cost.soft(sharpness=COUNT_SHARPNESS).item()
        # Gates start at 1 and move by 0.1 in a step; after that, the target moves by 1/40 of the distance in a step.
        assert search.steps_done < 10 or abs(cost - search.target()) <= 0.05 * search.first_cost
    # What the repair has left to do.
    assert abs(search.progress()["gap"]) <= 1.0
    train(model, search, optimizer, 1)
    assert search.stage == "finetune"


def random_scheme(model):
    for layer in csq_layers(model).values():
        with torch.no_grad():
            layer.gate_logits.normal_()


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    "budget", ["2.0 bits", "2.1 bits", "3.0 bits", "4.4 bits", "1.3 paper bits", "0.0032 MB", "9 bits"]
)
def test_repair_always_meets_the_budget(seed, budget):
    model = build(min_bits=seed % 2, gate_granularity="channel" if seed % 3 == 0 else "layer")
    torch.manual_seed(seed)
    random_scheme(model)
    cost = Cost(model, Budget.parse(budget))
    scheme = repair(active_sets(cost.layers), gate_scores(cost.layers), cost)
    assert cost.total(scheme) <= cost.limit and cost.of(scheme) <= cost.budget.value * (1 + 1e-12)
    assert all(len(bits) >= seed % 2 for bits in scheme.values())
    for name, bits in scheme.items():
        for bit in set(range(8)) - bits:
            assert cost.total({**scheme, name: bits | {bit}}) > cost.limit, "a bit would still fit"


def test_repair_closes_gaps_where_no_bit_can_be_spared():
    model = build(min_bits=2)
    for layer in csq_layers(model).values():
        with torch.no_grad():
            layer.gate_logits.copy_(torch.tensor([1.0, -1, -1, 2, -1, -1, -1, -1]))
    report = csq.finalize_(model, budget="3 bits")
    assert report.budget_met and all(row.paper_bits == 2 and row.stored_bits == 3 for row in report.layers)


def test_repair_closes_what_is_wanted_least():
    model = build()
    layers = csq_layers(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.gate_logits.copy_(torch.arange(1.0, 9.0))
    cost = Cost(model, Budget(4.0, "stored bits"))
    scheme = repair(active_sets(layers), gate_scores(layers), cost)
    assert all(max(bits) == 7 and max(bits) - min(bits) == len(bits) - 1 for bits in scheme.values())


@pytest.mark.parametrize("budget", ["1.9 bits", "0.9 paper bits", "0.0001 MB"])
def test_budget_out_of_reach_says_what_can_be_reached(budget):
    with pytest.raises(
        ValueError, match=r"expected budget of at least [0-9.e-]+ (stored bits|paper bits|MB) for this model"
    ):
        start(build(), budget)
    with pytest.raises(ValueError, match="expected budget of at least"):
        csq.finalize_(build(), budget=budget)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 1}, "expected total_steps of at least 2, got 1"),
        ({"search_share": 1.0}, "expected search_share of at least 0 and below 1, got 1.0"),
        ({"final_temperature": math.nan}, "expected final_temperature of at least 1 and finite, got nan"),
        ({"search_temperature": 0.5}, "expected search_temperature of at least 1 and finite, got 0.5"),
        ({"strength": -1.0}, "expected strength of at least 0 and finite, got -1.0"),
        ({"gradient_temperature": 0.5}, "expected gradient_temperature of at least 1 and finite, got 0.5"),
        ({"lateness": 0.0}, "expected lateness above 0 and finite, got 0.0"),
        ({"schedule": "step"}, "expected schedule as one of exponential, linear, cosine, got 'step'"),
    ],
)
def test_bad_search_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        start(build(), **options)
    with pytest.raises(ValueError, match="expected model with CSQ layers, got none; call prepare_ first"):
        csq.Search(nn.Linear(2, 2), "3 bits", 10)


@pytest.mark.parametrize("drop", [True, False], ids=["drop", "keep"])
@pytest.mark.parametrize(
    "options", [{}, {"initial_bits": 1}, {"gate_granularity": "channel"}, {"scale_granularity": "layer"}], ids=str
)
@pytest.mark.parametrize("budget", ["3 bits", "2 paper bits", "0.0037 MB"])
def test_a_search_ends_as_exact_integers_within_budget(options, drop, budget):
    model = build(**options)
    search, optimizer = start(model, budget, drop=drop, final_temperature=1e5)
    train(model, search, optimizer, 24)
    assert search.stage == "finetune" and search.progress()["gap"] <= 0
    values = batch(99)[0]
    statistics = copy.deepcopy(model).eval()
    report = csq.finalize_(model, budget=budget)
    assert report.budget_met and str(report).endswith("met") and "NOT" not in str(report)
    assert all(layer.stage == "hard" for layer in csq_layers(model).values())
    for layer in csq_layers(model).values():
        assert layer.codes.abs().max() < 2**8
        assert torch.equal(layer.weight, layer.hard_weight())
    model.eval()
    hard, soft = model(values), statistics(values)
    assert (hard - soft).abs().max() <= 0.02 * hard.abs().max()
    assert torch.equal(hard, model(values))


@pytest.mark.parametrize("seed", range(20))
def test_a_random_configuration_meets_its_budget(seed):
    choose = random.Random(seed)
    torch.manual_seed(seed)
    width, bias, smallest = choose.randint(1, 9), choose.random() < 0.5, choose.choice([1, 1, 2])
    network = nn.Sequential(
        nn.Conv2d(1, width, choose.choice([1, 3]), padding=choose.randint(0, 1), bias=bias),
        choose.choice([nn.BatchNorm2d(width), nn.Identity()]),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(choose.randint(1, 4)),
        nn.Flatten(),
        nn.LazyLinear(choose.randint(1, 12), bias=bias),
        nn.ReLU(),
        nn.LazyLinear(10),
    )
    network(batch(0)[0])
    n_bits = choose.randint(max(smallest, 2), 8)
    config = csq.Config(
        n_bits=n_bits,
        initial_bits=choose.choice([None, choose.randint(smallest, n_bits)]),
        gate_granularity=choose.choice(["layer", "channel"]),
        scale_granularity=choose.choice(["layer", "channel"]),
        act_bits=choose.choice([None, None, 4]),
        min_bits=smallest,
    )
    csq.prepare_(network, config)
    paper = choose.uniform(smallest, n_bits)
    budget = choose.choice([f"{paper + 1:.2f} bits", f"{paper:.2f} paper bits"])
    steps, share = choose.randint(2, 40), choose.uniform(0.1, 0.9)
    single_pass = choose.choice([csq.optim.SGD, csq.optim.AdamW, None])
    options = {"search_share": share, "gradient_temperature": choose.choice([None, 1.0, 3.0, 1e5])}
    if single_pass is None:
        search, optimizer = start(network, budget, steps, **options)
    else:
        rates = {"lr": 1e-2, "logit_lr": choose.choice([0.05, 1.0]), "gate_lr": choose.choice([0.02, 0.5])}
        optimizer = single_pass(network, **rates)
        search = csq.Search(network, budget, steps, optimizer=optimizer, **options)
    train(network, search, optimizer, steps)
    report = csq.finalize_(network, budget=budget)
    assert report.budget_met and search.progress()["gap"] <= 0
    assert all(row.paper_bits >= smallest for row in report.layers)
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())
    assert network.eval()(batch(99)[0]).isfinite().all()


def test_dropping_planes_does_not_change_the_weights():
    dropped, kept = build(), build()
    for model, drop in ((dropped, True), (kept, False)):
        search, optimizer = start(model, drop=drop)
        train(model, search, optimizer, 12)
    assert any(layer.bit_logits.shape[1] < 8 for layer in csq_layers(dropped).values())
    for a, b in zip(csq_layers(dropped).values(), csq_layers(kept).values(), strict=True):
        assert a.active_bits() == b.active_bits() == a.bits and b.bit_logits.shape[1] == 8
        assert torch.equal(a.weight, b.weight)


def test_two_runs_are_bitwise_equal():
    models = []
    for _ in range(2):
        model = build()
        search, optimizer = start(model)
        train(model, search, optimizer, 24)
        models.append(model)
    assert states_equal(*models)


@pytest.mark.parametrize("drop", [True, False], ids=["drop", "keep"])
@pytest.mark.parametrize("stop", [5, 12, 13, 20])
def test_resume_is_bitwise_equal(stop, drop):
    straight = build()
    search, optimizer = start(straight, drop=drop)
    train(straight, search, optimizer, stop)
    saved = copy.deepcopy((straight.state_dict(), optimizer.state_dict(), search.state_dict()))
    train(straight, search, optimizer, 24 - stop)

    resumed = build()
    resumed.load_state_dict(saved[0], strict=True)
    search, optimizer = start(resumed, drop=drop)
    optimizer.load_state_dict(saved[1])
    search.load_state_dict(saved[2])
    train(resumed, search, optimizer, 24 - stop)
    assert states_equal(straight, resumed)
    with pytest.raises(ValueError, match="expected search state with"):
        search.load_state_dict({"steps_done": 3})


def test_megabytes_are_the_same_with_the_single_pass_step():
    model = build()
    before = csq.report(model).bytes
    csq.optim.SGD(model, lr=0.1)
    assert csq.report(model).bytes == before


def test_finalize_in_the_middle_of_the_search_repairs():
    model = build()
    search, optimizer = start(model)
    train(model, search, optimizer, 3)
    report = csq.finalize_(model, budget="3 bits")
    assert report.budget_met and report.stored_bits <= 3
    with pytest.raises(ValueError, match="is hard"):
        csq.finalize_(model, budget="2 bits")


def test_finalize_estimates_batch_norm_again():
    model = build()
    data = [batch(step)[0] for step in range(4)]
    with torch.no_grad():
        model[1].running_mean.fill_(100.0)
    csq.finalize_(model, data=data)
    expected = torch.stack([model[0](values).mean((0, 2, 3)) for values in data]).mean(0)
    assert torch.allclose(model[1].running_mean, expected, atol=1e-5)


def test_a_layer_may_be_removed_only_if_allowed_and_is_reported():
    model = build(min_bits=0)
    with torch.no_grad():
        model[3].gate_logits.fill_(-1.0)
    report = csq.finalize_(model)
    row = report.layers[1]
    assert row.paper_bits == row.stored_bits == 0 and "removed" in str(report)
    assert torch.equal(model[3].weight, torch.zeros_like(model[3].weight))


def test_report_counts_bytes(tmp_path):
    model = build()
    report = csq.report(model, "9 bits")
    assert report.paper_bits == 8 and report.stored_bits == 9 and report.budget_met
    assert report.layers[2].bytes == 9 * 160 + 4 * 10 and report.layers[2].float_bytes == 4 * 1280
    rest = sum(t.numel() * t.element_size() for i in (1, 4) for t in model[i].state_dict().values())
    rest += sum(4 * model[i].bias.numel() for i in (0, 3, 7))
    assert report.bytes == report.rest_bytes + sum(row.bytes for row in report.layers)
    assert report.to_dict()["layers"][0]["active"] == tuple(range(8))
    assert csq.report(model, "8.9 bits").budget_met is False
    csq.finalize_(model)
    csq.pack_(model)
    file = csq.save_packed(model, tmp_path / "model.safetensors")
    assert file.rest_bytes == rest and 0 <= report.rest_bytes - rest - file.header_bytes <= 24


def test_health_names_the_layer():
    model = build()
    assert health(model) == []
    with torch.no_grad():
        model[0].bit_logits[0, 0, 0] = torch.nan
        model[3].gate_logits.fill_(-100.0)
        model[7].bit_logits.fill_(50.0)
    messages = health(model)
    assert "0: bit_logits is not finite" in messages
    assert "3: every gate is below the threshold, as hard its weight would be 0" in messages
    assert "3: every gate is saturated, its precision no longer moves" in messages
    assert any(message.startswith("7: 100.0% of the bit logits are frozen") for message in messages)


def test_a_gate_that_is_not_finite_makes_the_penalty_so_and_is_warned_of():
    model = nn.Sequential(nn.Linear(4, 3))
    csq.prepare_(model)
    search = csq.Search(model, "3 bits", total_steps=4)
    with torch.no_grad():
        model[0].gate_logits[2] = torch.nan
    assert search.penalty().isnan() and "0: gate_logits is not finite" in search.health()
