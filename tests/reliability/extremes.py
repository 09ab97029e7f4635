"""Values at the edge of what numbers can be: ``python tests/reliability/extremes.py --draws 2000 [--seed N]``.

Temperatures to a million, logits, gates and scales of 1e30, denormals, -0.0 and infinities, on every instruction set.
Forward and backward pass must be as near to float64 as a few roundings, wherever that has a finite answer; NaN must
stay in its own weight; a single-pass step, a search, a packed network must be finite, or the watchdog must say so.
"""

import argparse
import copy
import math
import random
import sys
from collections import Counter

import record
import torch
from torch import Tensor, nn

import csq_kernels as csq
from csq_kernels import _native, functional, reference
from csq_kernels._ops import PRECISIONS
from csq_kernels.report import health

DENORMAL = 1e-45
LOGITS = (0.0, -0.0, DENORMAL, -DENORMAL, 1e-38, -1e-38, 1e-8, -1e-8, 3e-6, -3e-6, 0.01, -0.01, 1.0, -1.0)
LOGITS += (1e4, -1e4, 1e30, -1e30)
INFINITE = (math.inf, -math.inf)
SCALES = (0.0, -0.0, DENORMAL, 1e-38, 1e-3, 1.0, -1.0, 1e30)
GRADIENTS = (0.0, -0.0, DENORMAL, 1e-38, 1e-3, 1.0, -1.0, 1e3)
TEMPERATURES = (1e-6, 1.0, 30.0, 1e4, 1e6)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Of a product of a handful of rounded factors.
ROUNDINGS = 64


class Draw:
    """Random arguments of a layer, all from the lists above."""

    def __init__(self, seed: int):
        chance = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = chance.choice(DTYPES)
        self.n_bits = chance.randint(1, 8)
        self.shape = (chance.choice((1, 3, 8)), chance.choice((1, 5, 8, 17, 32)))
        channels = [self.shape[0]] * (chance.random() < 0.5)
        self.hard_gates = chance.random() < 0.2
        logits = LOGITS + INFINITE * (chance.random() < 0.3)
        self.logits = self._pick(logits, 2, self.n_bits, *self.shape).to(self.dtype)
        self.gates = self._pick(logits, self.n_bits, *channels)
        self.scale = self._pick(SCALES, *channels)
        self.temperature = torch.tensor(chance.choice(TEMPERATURES))
        self.grad = self._pick(GRADIENTS, *self.shape).to(self.dtype)

    def _pick(self, values: tuple[float, ...], *shape: int) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), shape, generator=self.generator)]

    def weight(self, bit_logits: Tensor, gate_logits: Tensor, scale: Tensor) -> Tensor:
        """By the op, with the gradients that it has."""
        return functional.reconstruct(
            bit_logits, gate_logits, scale, self.temperature, n_bits=self.n_bits, hard_gates=self.hard_gates
        )

    def arguments(self, dtype: torch.dtype) -> tuple:
        """Of ``reference.reconstruct``, in one dtype."""
        tensors = (self.logits, self.gates, self.scale, self.temperature)
        return *(tensor.to(dtype) for tensor in tensors), list(range(self.n_bits)), self.n_bits, 0, self.hard_gates


def assert_near(name: str, actual: Tensor, exact: Tensor, size: Tensor, steep: float = 1.0) -> None:
    """Fail unless the error is some roundings of ``size``, wherever the exact value fits into the dtype.

    A denormal factor has lost its digits before another one, ``steep``, makes it large."""
    info = torch.finfo(actual.dtype)
    fits = exact.isfinite() & (exact.abs() < info.max) & (size < info.max)
    error = (actual.double() - exact).abs()
    allowed = ROUNDINGS * info.eps * size + steep * info.smallest_normal
    wrong = fits & ~(error <= allowed)
    assert not wrong.any(), f"{name}: {actual[wrong][:3].tolist()} instead of {exact[wrong][:3].tolist()}"


def check_reconstruct(draw: Draw) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in (draw.logits, draw.gates, draw.scale)]
    weight = draw.weight(*leaves)
    weight.backward(draw.grad)
    wide = draw.arguments(torch.float64)
    exact = reference.reconstruct(*wide)
    column = draw.scale.double().abs().reshape(-1, 1)
    assert_near("weight", weight.detach(), exact, column.expand(draw.shape))
    grads = reference.reconstruct_backward(draw.grad.double(), *wide)
    steep = max(1.0, float(draw.temperature))
    each = (draw.grad.double() * column).abs() * steep
    # Of the sums, what is rounded are the terms.
    own = draw.gates.ndim == 2
    of_gates = (each.sum(1) if own else each.sum()).expand(draw.gates.shape)
    of_scale = draw.grad.double().abs().sum(1) if draw.scale.ndim else draw.grad.double().abs().sum()
    for name, leaf, grad, size in zip(
        ("bit_logits", "gate_logits", "scale"),
        leaves,
        grads,
        (each.expand(leaves[0].shape), of_gates, of_scale),
        strict=True,
    ):
        assert leaf.grad is not None
        assert_near(f"gradient of {name}", leaf.grad, grad, size, steep)


def check_nan(draw: Draw) -> None:
    """NaN in one logit is NaN in one weight; a gate of 0 would leave its plane out."""
    draw.hard_gates = False
    draw.gates[0] = 1.0
    clean = draw.weight(draw.logits, draw.gates, draw.scale)
    row, column = (int(torch.randint(size, (), generator=draw.generator)) for size in draw.shape)
    draw.logits[0, 0, row, column] = math.nan
    weight = draw.weight(draw.logits, draw.gates, draw.scale)
    assert weight[row, column].isnan(), f"a weight of a logit that is NaN: {weight[row, column]}"
    weight[row, column] = clean[row, column]
    assert torch.equal(weight.nan_to_num(7), clean.nan_to_num(7)), "NaN spread to other weights"


def _layer(draw: Draw) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(draw.shape[1], draw.shape[0]))
    granularity = ["layer", "channel"]
    csq.prepare_(
        model,
        csq.Config(
            n_bits=draw.n_bits,
            gate_granularity=granularity[draw.gates.ndim - 1],
            scale_granularity=granularity[draw.scale.ndim],
        ),
    )
    return model


def _fill(model: nn.Sequential, draw: Draw) -> None:
    with torch.no_grad():
        for name, values in (("bit_logits", draw.logits), ("gate_logits", draw.gates), ("scale", draw.scale)):
            getattr(model[0], name).copy_(values)
        model[0].temperature.copy_(draw.temperature)


def check_step(draw: Draw) -> str:
    """A single-pass step of what is finite is finite, or the watchdog names the layer."""
    model = _layer(draw)
    _fill(model, draw)
    kind = csq.optim.AdamW if draw.n_bits % 2 else csq.optim.SGD
    optimizer = kind(model, lr=1e-3, narrow=draw.hard_gates)
    for _ in range(2):
        model[0].weight.grad = draw.grad.float()
        optimizer.step()
    values = (model[0].bit_logits, model[0].gate_logits, model[0].scale)
    finite = all(bool(value.isfinite().all()) for value in values)
    given = all(bool(value.isfinite().all()) for value in (draw.logits, draw.gates, draw.scale))
    if not finite:
        assert any("not finite" in warning for warning in health(model)), "the watchdog is silent"
        assert not given or not bool(model[0].weight.isfinite().all()) or float(draw.scale.abs().max()) > 1e20, (
            "finite values of a usual size became others"
        )
    else:
        assert model[0].weight.isfinite().all(), "finite logits, and a weight that is not"
    return "finite" if finite else "warned of"


def check_search(draw: Draw) -> str:
    """A search that meets extremes ends in integers within its budget, or in a message."""
    model = _layer(draw)
    optimizer = csq.optim.SGD(model, lr=0.1)
    search = csq.Search(model, "2 bits" if draw.n_bits > 1 else "3 bits", 6, optimizer=optimizer, final_temperature=1e6)
    _fill(model, draw)
    inputs = torch.ones(2, draw.shape[1])
    for _ in range(6):
        loss = model(inputs).square().mean() + search.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        search.step()
    warned = any("not finite" in warning for warning in search.health())
    try:
        report = csq.finalize_(model, budget="3 bits")
        csq.pack_(model.eval())
    except ValueError as error:
        assert "finite" in str(error), f"a message that says nothing: {error}"
        return "refused"
    assert report.budget_met, "a budget that was missed"
    output = model(inputs)
    assert warned or output.isfinite().all() or float(model[0].scale.abs().max()) > 1e20, "a warning was due"
    return "warned of" if warned else "finite"


def check_packed(draw: Draw) -> None:
    """Packed, the weight is the hard one; an input that is not finite stays in its row, in every precision."""
    draw.scale = torch.where(draw.scale.abs() > 1e20, 1.0, draw.scale)
    model = _layer(draw)
    _fill(model, draw)
    csq.finalize_(model)
    hard = model[0].hard_weight().clone()
    csq.pack_(model.eval())
    unpacked = copy.deepcopy(model)
    csq.unpack_(unpacked)
    assert torch.equal(unpacked[0].weight, hard), "the packed weight is another"
    inputs = torch.tensor((1e30, -1e30, DENORMAL, -0.0, 1.0))[
        torch.randint(5, (4, draw.shape[1]), generator=draw.generator)
    ]
    inputs[1, 0], inputs[2, -1] = math.inf, math.nan
    for precision in PRECISIONS:
        csq.set_precision_(model, precision)
        output = model(inputs)
        assert output[::3].isfinite().all(), f"{precision}: finite rows are not finite"
        # A layer without planes reads no input.
        assert output[2].isnan().all() or not model[0].coefficients, f"{precision}: a row with NaN has numbers"


CHECKS = {
    "reconstruct": check_reconstruct,
    "NaN": check_nan,
    "step": check_step,
    "search": check_search,
    "packed": check_packed,
}


def run(draws: int, seed: int) -> tuple[Counter[str], list[str]]:
    """So many draws through each check, on each instruction set; what they came to, and what went wrong."""
    torch.set_num_threads(1)
    counts, failures = Counter[str](), []
    module = _native.module
    assert module is not None
    before = module.isa()
    for isa in module.supported_isas():
        module.set_isa(isa)
        for number in range(seed, seed + draws):
            for name, check in CHECKS.items():
                torch.manual_seed(number)
                try:
                    counts[f"{name}: {check(Draw(number)) or 'right'}"] += 1
                except (AssertionError, RuntimeError, ValueError, IndexError) as error:
                    failures.append(f"{isa}, draw {number}, {name}: {type(error).__name__}: {error}")
    module.set_isa(before)
    return counts, failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    counts, failures = run(options.draws, options.seed)
    print("\n".join(failures[:50]))
    print(dict(counts))
    isas = ", ".join(_native.module.supported_isas())
    tried = f"{sum(counts.values()):,} layers through forward, backward, step, search, packing; {isas}"
    record.record("extremes", tried, len(failures))
    return len(failures)


if __name__ == "__main__":
    sys.exit(main())
