"""Training steps of a language model with the shape of SmolLM2-135M, and the memory they take: no accuracy is meant.

``python bench/language_model.py`` takes the first steps of a search with narrow state on the bytes of the licence, and
appends a line to ``results/language_model.jsonl``. Linux: the peak is that of the resident set.
"""

import argparse
import resource
import time
from pathlib import Path

import torch
from harness import ROOT, announce, append_lines, circumstances
from torch import Tensor, nn
from torch.nn import functional as F

import csq_kernels as csq

LAYERS, WIDTH, HEADS, KV_HEADS, HIDDEN, VOCABULARY = 30, 576, 9, 3, 1536, 49152
HEAD = WIDTH // HEADS
ROPE_BASE = 100_000.0
OPTIMIZERS = {"sgd": (csq.optim.SGD, {"momentum": 0.9}), "adamw": (csq.optim.AdamW, {})}


def rotate(x: Tensor) -> Tensor:
    """Rotary position embedding of ``(batch, heads, tokens, HEAD)``."""
    frequencies = ROPE_BASE ** -(torch.arange(0, HEAD, 2) / HEAD)
    angles = torch.arange(x.shape[2])[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Block(nn.Module):
    """Grouped-query attention and a gated MLP, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.query, self.output = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.key, self.value = (nn.Linear(WIDTH, KV_HEADS * HEAD, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(WIDTH, HIDDEN, bias=False) for _ in range(2))
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.attention_norm(x)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, HEAD)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(rotate(query), rotate(key), value, is_causal=True, enable_gqa=True)
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class LanguageModel(nn.Module):
    """Token numbers ``(batch, tokens)`` to logits; the embedding is also the last layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.04)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(tokens))))


def peak_resident_bytes() -> int:
    """Of this process since it began."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """What PyTorch holds of parameters, gradients, state of layers and of the optimizer, each storage once."""
    tensors = [*model.parameters(), *model.buffers(), *(parameter.grad for parameter in model.parameters())]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rule", choices=OPTIMIZERS, default="adamw", help="of the optimizer")
    parser.add_argument("--full", action="store_true", help="float32 state instead of narrow")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--total-steps", type=int, default=1000, help="of the search whose first steps are taken")
    parser.add_argument("--tokens", type=int, default=128, help="of the one sequence of a step")
    parser.add_argument("--budget", default="4 bits")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "language_model.jsonl")
    options = parser.parse_args()
    context = circumstances("cpu")
    announce(context)
    torch.manual_seed(0)
    text = torch.tensor(list((ROOT / "LICENSE").read_bytes()))
    model = LanguageModel()
    resident = {"float": peak_resident_bytes()}
    plan = csq.prepare_(model)
    print(str(plan).splitlines()[-1])
    resident["prepared"] = peak_resident_bytes()
    kind, arguments = OPTIMIZERS[options.rule]
    optimizer = kind(model, lr=1e-3, logit_lr=1e-2, gate_lr=2e-2, narrow=not options.full, **arguments)
    search = csq.Search(model, options.budget, options.total_steps, optimizer=optimizer)
    resident["optimizer"] = peak_resident_bytes()
    weights = sum(plan.swapped.values())
    steps: list[dict[str, float]] = []
    for step in range(options.steps):
        started = time.perf_counter()
        window = text[step * options.tokens :][: options.tokens + 1]
        loss = F.cross_entropy(model(window[None, :-1])[0], window[1:])
        (loss + search.penalty()).backward()
        optimizer.step()
        held = state_bytes(model, optimizer)
        search.step()
        optimizer.zero_grad()
        seconds = time.perf_counter() - started
        steps.append({"loss": loss.item(), "seconds": seconds, "state_bytes_per_weight": held / weights})
        print(f"step {step}: loss {loss.item():.3f}, {seconds:.1f} s, {held / weights:.1f} bytes a weight held")
        resident.setdefault("first step", peak_resident_bytes())
    resident["last step"] = peak_resident_bytes()
    described = ", ".join(f"{name} {size / 2**30:.2f}" for name, size in resident.items())
    print(f"{weights:,} weights; peak resident GiB until {described}")
    row = {"op": "language_model", "rule": options.rule, "narrow": not options.full, "weights": weights}
    row |= {
        "tokens": options.tokens,
        "budget": options.budget,
        "total_steps": options.total_steps,
        "steps": steps,
        "peak_resident_bytes": resident,
    }
    row |= {"peak_resident_bytes_per_weight": resident["last step"] / weights}
    append_lines(options.out, [row | context])


if __name__ == "__main__":
    main()
