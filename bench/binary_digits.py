"""Binary digits beside the ternary ones of CSQ, at as many stored bits: ``python bench/binary_digits.py``.

A ternary digit of equation (3) is the difference of two relaxed bits, -1, 0 or 1, and its sign costs a stored bit. A
binary digit is one relaxed bit, ``d = 2 sig(beta p) - 1``, -1 or 1: half the logits, and all ``2^k`` codes of ``k``
stored bits, odd multiples of half a step. Both start from the same float weights and are trained alike, in plain
PyTorch, with the precision fixed: what differs are the digits. LSQ, which has all codes as well, stands beside them.

A line a run goes to ``results/binary_digits.jsonl``; ``--table`` prints means and seeds of what is there.
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import announce, append_lines, circumstances, integers, names
from torch import Tensor, nn
from torch.nn.utils import parametrize

import csq_kernels as csq
from csq_kernels.nn.encode import best_scale, digit_amplitude, encode
from csq_kernels.reference import along_channel
from csq_kernels.train import baselines, data, models
from csq_kernels.train.phase import lr_factor

RESULTS = Path(__file__).parent / "results" / "binary_digits.jsonl"
FLOAT_EPOCHS, EPOCHS, BATCH = 4, 4, 128
# Where bits learn, and where they are decided: the same for all, lower rates and an earlier rise than docs/recipe.md.
LEARNING, SEARCH_TEMPERATURE, FINAL_TEMPERATURE = 0.8, 30.0, 10000.0
LOGIT_LR, SCALE_LR, LR, WEIGHT_DECAY = 0.05, 2e-4, 2e-3, 0.02
STATISTICS_BATCHES = 100


class Digits(nn.Module):
    """A weight of relaxed digits as a parametrization: what is trained is ``bits`` and the ``scale`` of each channel.

    ``temperature`` is set by the loop; a decided digit is worth 1 at any.
    """

    temperature = 1.0

    def __init__(self, planes: int, scale: Tensor, bits: Tensor):
        super().__init__()
        self.planes = planes
        self.scale, self.bits = nn.Parameter(scale), nn.Parameter(bits)

    def digits(self) -> Tensor:
        raise NotImplementedError

    def forward(self, weight: Tensor) -> Tensor:
        powers = 2.0 ** torch.arange(self.planes).view(-1, *[1] * weight.ndim)
        codes = (powers * self.digits()).sum(0) / digit_amplitude(self.temperature)
        return along_channel(self.scale / (2**self.planes - 1), weight.ndim, 0) * codes


class Ternary(Digits):
    """``k - 1`` planes of two logits, equation (3) with open gates."""

    def __init__(self, weight: Tensor, stored_bits: int):
        exponents, gates = range(stored_bits - 1), torch.ones(stored_bits - 1)
        scale = best_scale(weight, exponents, gates, stored_bits - 1, 0, True)
        bits = encode(weight, scale, exponents, gates, torch.tensor(1.0), stored_bits - 1, 0)
        super().__init__(stored_bits - 1, scale * digit_amplitude(1.0), bits)

    def digits(self) -> Tensor:
        positive, negative = (self.temperature * self.bits).sigmoid()
        return positive - negative


class Binary(Digits):
    """``k`` planes of one logit."""

    def __init__(self, weight: Tensor, stored_bits: int):
        scale = self._best_scale(weight, stored_bits)
        remainder = weight / along_channel(scale / (2**stored_bits - 1), weight.ndim, 0)
        bits = torch.empty(stored_bits, *weight.shape)
        for plane in reversed(range(stored_bits)):
            # The lowest plane takes the remainder as a soft digit, so that the given weight is reproduced.
            digit = remainder.sign() if plane else remainder.clamp(-1, 1)
            digit = torch.where(digit == 0, torch.full_like(digit, 1e-3), digit)
            remainder = remainder - 2.0**plane * digit
            bits[plane] = 2 * torch.atanh(digit * digit_amplitude(1.0))
        super().__init__(stored_bits, scale, bits)

    @staticmethod
    def _best_scale(weight: Tensor, stored_bits: int) -> Tensor:
        """The scale with the least squared rounding error, among shares of the largest magnitude of each channel."""
        top, axes = 2**stored_bits - 1, list(range(1, weight.ndim))
        full = weight.abs().amax(axes)
        best, least = full, torch.full_like(full, math.inf)
        for share in torch.linspace(0.05, 1.0, 96):
            wide = along_channel(share * full, weight.ndim, 0)
            codes = (2 * ((weight / wide * top - 1) / 2).round() + 1).clamp(-top, top)
            error = (codes * wide / top - weight).square().sum(axes)
            better = error < least
            best, least = torch.where(better, share * full, best), torch.where(better, error, least)
        return best

    def digits(self) -> Tensor:
        return (self.temperature * self.bits / 2).tanh()


def ternary_(model: nn.Module, stored_bits: int) -> None:
    _digits_(model, lambda weight: Ternary(weight, stored_bits))


def binary_(model: nn.Module, stored_bits: int) -> None:
    _digits_(model, lambda weight: Binary(weight, stored_bits))


def _digits_(model: nn.Module, digits: Callable[[Tensor], Digits]) -> None:
    for layer in list(model.modules()):
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            parametrize.register_parametrization(layer, "weight", digits(layer.weight.detach()), unsafe=True)
            layer.parametrizations["weight"].original.requires_grad_(False)


def lsq_(model: nn.Module, stored_bits: int) -> None:
    baselines.learn_steps_(model, stored_bits, csq.Config())


METHODS = {"ternary": ternary_, "binary": binary_, "lsq": lsq_}


def temperature_at(share: float) -> float:
    """The temperature after so much of the training."""
    if share < LEARNING:
        return SEARCH_TEMPERATURE ** (share / LEARNING)
    return SEARCH_TEMPERATURE * (FINAL_TEMPERATURE / SEARCH_TEMPERATURE) ** ((share - LEARNING) / (1 - LEARNING))


def set_temperature(model: nn.Module, temperature: float) -> None:
    for module in model.modules():
        if isinstance(module, Digits):
            module.temperature = temperature


def batches(dataset: data.Dataset, seed: int, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
    """So many epochs of augmented batches."""
    generator = torch.Generator().manual_seed(seed)

    def requests() -> Iterator[data.Request]:
        for _ in range(epochs):
            order = torch.randperm(dataset.train_size, generator=generator)
            for index in order[: dataset.train_size // BATCH * BATCH].split(BATCH):
                yield index, generator

    return dataset.train_batches(requests())


def train(model: nn.Module, dataset: data.Dataset, optimizer: torch.optim.Optimizer, seed: int, epochs: int) -> None:
    model.train()
    total = epochs * (dataset.train_size // BATCH)
    initial = [group["lr"] for group in optimizer.param_groups]
    for step, (images, labels) in enumerate(batches(dataset, seed, epochs)):
        set_temperature(model, temperature_at(step / total))
        for group, lr in zip(optimizer.param_groups, initial, strict=True):
            group["lr"] = lr * lr_factor("cosine", step, total, 0.0)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()


def accuracy(model: nn.Module, dataset: data.Dataset) -> float:
    """On the test set, with the statistics of batch norm estimated again."""
    order = torch.randperm(dataset.train_size, generator=torch.Generator().manual_seed(0))
    some = order[: STATISTICS_BATCHES * BATCH].split(BATCH)
    torch.optim.swa_utils.update_bn((x for x, _ in dataset.train_batches((index, None) for index in some)), model)
    model.eval()
    with torch.inference_mode():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in dataset.test_batches(1000))
    return right / 10_000


def quantized(model: nn.Module, method: str, bits: int, dataset: data.Dataset, seed: int) -> dict[str, float]:
    """Train a copy of the float model with so many stored bits in each layer."""
    model = copy.deepcopy(model)
    METHODS[method](model, bits)
    logits = [p for name, p in model.named_parameters() if name.endswith("weight.0.bits")]
    scales = [p for name, p in model.named_parameters() if name.endswith(("weight.0.scale", "weight.0.step"))]
    special = {id(p) for p in (*logits, *scales)}
    rest = [p for p in model.parameters() if id(p) not in special and p.requires_grad]
    groups = [{"params": rest, "weight_decay": WEIGHT_DECAY}, {"params": scales, "lr": SCALE_LR}]
    groups += [{"params": logits, "lr": LOGIT_LR}] if logits else []
    started = time.monotonic()
    train(model, dataset, torch.optim.AdamW(groups, LR, weight_decay=0.0), seed + 1000, EPOCHS)
    seconds = time.monotonic() - started
    set_temperature(model, FINAL_TEMPERATURE)
    soft = accuracy(model, dataset)
    for module in model.modules():
        if isinstance(module, Digits):
            # Equation (7): each bit is 0 or 1, by the sign of its logit.
            module.bits.data = torch.where(module.bits > 0, 1.0, -1.0)
    set_temperature(model, math.inf)
    return {"soft_accuracy": soft, "hard_accuracy": accuracy(model, dataset), "seconds": round(seconds, 1)}


def table() -> None:
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    found: dict[tuple[int, str], dict[int, float]] = {}
    for row in rows:
        found.setdefault((row["stored_bits"], row["method"]), {})[row["seed"]] = 100 * row["hard_accuracy"]
    print("| stored bits | digits | accuracy | seeds |\n| --- | --- | --- | --- |")
    for (bits, method), seeds in sorted(found.items()):
        every = " ".join(f"{seeds[seed]:.2f}" for seed in sorted(seeds))
        print(f"| {bits} | {method} | {statistics.mean(seeds.values()):.2f} | {every} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=integers, default="2,3", help="stored, in every layer")
    parser.add_argument("--methods", type=names, default=",".join(METHODS))
    parser.add_argument("--seeds", type=integers, default="0,1,2")
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    options = parser.parse_args()
    if options.table:
        table()
        return
    context = circumstances("cpu")
    announce(context)
    dataset = data.load("fashion-mnist", flip=True, crop=2)
    for seed in options.seeds:
        torch.manual_seed(seed)
        model = models.build("cnn", *dataset.sizes)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        train(model, dataset, optimizer, seed, FLOAT_EPOCHS)
        float_accuracy = accuracy(model, dataset)
        for bits in options.bits:
            for method in options.methods:
                result = quantized(model, method, bits, dataset, seed)
                print(f"seed {seed}, {bits} bits, {method}: {result}, float {float_accuracy:.4f}", flush=True)
                row = {"op": "binary_digits", "method": method, "stored_bits": bits, "seed": seed}
                append_lines(RESULTS, [row | result | {"float_accuracy": float_accuracy} | context])


if __name__ == "__main__":
    main()
