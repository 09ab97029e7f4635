"""The method as it was published, for comparison: ``preset: paper`` of a recipe.

It differs from ``Search`` where measurements showed the published rules to fall short, and keeps them all the same: the
digits themselves are the first logits and all gates start on the threshold, so the first weight is a fraction of what
was drawn; the penalty counts bits per layer whatever its size; nothing makes the gates meet the budget once they
saturate; the temperature ends at 200, where bits may be undecided. Only one thing is not kept: the bit weights stay
powers of two, without which there would be no integers to compare.
"""

import torch
from torch import Tensor, nn

from csq_kernels.budget import Budget, Budgets, active_sets
from csq_kernels.nn.layer import CSQLayer
from csq_kernels.search import Search

STRENGTH, FINAL_TEMPERATURE = 0.01, 200.0


@torch.no_grad()
def _publish_(layer: CSQLayer) -> None:
    """Restart a layer with the published logits: the digits of ``|W| / max|W|`` as 0 or 1, and every gate at 0."""
    weight = layer.weight.detach()
    largest = weight.abs().amax().clamp_min(torch.finfo(weight.dtype).tiny)
    codes = (weight.abs() / largest * (2**layer.n_bits - 1)).round().to(torch.int64)
    for plane, bit in enumerate(layer.bits):
        digit = (codes >> bit & 1).to(weight.dtype)
        layer.bit_logits[0, plane] = torch.where(weight > 0, digit, 0.0)
        layer.bit_logits[1, plane] = torch.where(weight < 0, digit, 0.0)
    layer.gate_logits.zero_()
    layer.scale.fill_(largest)


class PaperSearch(Search):
    """``Search`` with the published rules; ``total_steps``, ``search_share`` and ``budget`` in the same sense.

    The temperature rises over the search to 200 and goes on rising; at the end of the search the gates are what their
    sign says. The target is ``budget`` in bits a weight, counted as paper bits a layer.

    Raises:
        ValueError: there is more than one budget, or it is not in bits.
    """

    def __init__(self, model: nn.Module, budget: Budgets, total_steps: int, **options):
        asked = Budget.parse_all(budget)
        if len(asked) > 1 or "bits" not in asked[0].unit:
            text = ", ".join(map(str, asked))
            raise ValueError(f"expected budget in bits, and one, with the published rules, got {text}")
        super().__init__(model, budget, total_steps, strength=STRENGTH, final_temperature=FINAL_TEMPERATURE, **options)
        self._planes = sum(len(layer.bits) for layer in self.layers.values())
        self._target = asked[0].value / max(layer.n_bits for layer in self.layers.values())

    def restart_(self) -> None:
        """Give every layer the published first logits."""
        for layer in self.layers.values():
            _publish_(layer)

    @property
    def temperature(self) -> float:
        return self.final_temperature ** (self.steps_done / self.search_steps)

    def penalty(self) -> Tensor:
        """``lambda * (active share - target share) * sum of all gates``; the share counts gates of at least 0.5."""
        if self.stage != "search":
            return torch.zeros((), device=self._device())
        active = sum(len(bits) for bits in active_sets(self.layers).values())
        gates = [torch.sigmoid(layer.temperature * layer.gate_logits).sum() for layer in self.layers.values()]
        return self.strength * (active / self._planes - self._target) * torch.stack(gates).sum()

    @torch.no_grad()
    def _advance(self) -> None:
        self.steps_done += 1
        for name, layer in self.layers.items():
            if self.steps_done == self.search_steps:
                # Hard gates of the present sign; the bits go on as they are.
                layer.stage = "finetune"
                layer.gate_logits.requires_grad_(False)
                layer.gate_logits.grad = None
            for member in (layer, *self._followers[name]):
                member.stage = layer.stage
                member.temperature.fill_(self.temperature)
