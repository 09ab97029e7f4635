"""The README's training loop on a small classifier: what a framework with our callback must equal, bit for bit."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import csq_kernels as csq
from csq_kernels.report import Report

BUDGET = "3 bits"
CONFIG = csq.Config(n_bits=4)
X = torch.randn(24, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 3
BATCH = 4
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "torch": lambda model: torch.optim.AdamW(csq.param_groups(model, 1e-2, 1e-2, gate_lr=0.1), lr=1e-2),
    "single-pass": lambda model: csq.optim.AdamW(model, lr=1e-2, weight_decay=1e-2, gate_lr=0.1),
}


def small_classifier() -> nn.Sequential:
    """Always the same float weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))


def train_plainly(optimizer: str, batches: list[tuple[Tensor, Tensor]], accumulated: int) -> tuple[nn.Module, Report]:
    """Prepare the classifier, train it on ``batches``, ``accumulated`` of them a step, and make the integers."""
    model = small_classifier()
    csq.prepare_(model, CONFIG)
    stepper = OPTIMIZERS[optimizer](model)
    search = csq.Search(model, BUDGET, len(batches) // accumulated, optimizer=stepper)
    for index, (x, y) in enumerate(batches):
        loss = nn.functional.cross_entropy(model(x), y) / accumulated
        (loss + search.penalty() if accumulated == 1 else loss).backward()
        if (index + 1) % accumulated == 0:
            # By itself, since sums of floats depend on their order: (a + b) + penalty.
            if accumulated > 1 and search.stage == "search":
                search.penalty().backward()
            stepper.step()
            stepper.zero_grad()
            search.step()
    return model, csq.finalize_(model, budget=BUDGET)
