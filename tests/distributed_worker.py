"""One process of a distributed training: ``torchrun distributed_worker.py MODE FOLDER``; see test_distributed.py.

Modes: ``ddp`` and ``fsdp`` train from start to end and write the whole state; ``save`` trains half of the steps and
leaves a distributed checkpoint, ``load`` goes on from it. With one process and mode ``alone`` nothing is wrapped.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import csq_kernels as csq

STEPS, BATCH, BUDGET = 24, 24, "2.5 bits"


def make_model(seed: int) -> nn.Sequential:
    """Sizes that no number of processes divides."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(19, 30), nn.ReLU(), nn.Linear(30, 27), nn.LayerNorm(27), nn.Linear(27, 5))
    csq.prepare_(
        model, csq.Config(n_bits=4, rules={"2": {"gate_granularity": "channel", "scale_granularity": "layer"}})
    )
    return model


def wrap(model: nn.Module, mode: str) -> nn.Module:
    if mode == "alone":
        return model
    csq.optim.single_pass_(model)
    if mode == "ddp":
        return DistributedDataParallel(model)
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(model)


def count_bytes(counts: dict[str, int], name: str, position: int) -> None:
    """Add up the bytes that this process gives to a collective, whose argument at ``position`` they are."""
    collective = getattr(dist, name)

    def counted(*args, **kwargs):
        tensor = args[position] if position < len(args) else kwargs.get("input", kwargs.get("input_tensor"))
        counts[name] = counts.get(name, 0) + tensor.nbytes
        return collective(*args, **kwargs)

    setattr(dist, name, counted)


def train(model: nn.Module, optimizer, search: csq.Search, first: int, last: int) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(first, last):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(BATCH, 19, generator=generator)
        labels = torch.randint(0, 5, (BATCH,), generator=generator)
        outputs = model(inputs[rank::world])
        loss = nn.functional.cross_entropy(outputs, labels[rank::world]) + search.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        search.step()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(mode: str, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    # Under DDP only rank 0 starts from the weights that count.
    model = make_model(rank if mode == "ddp" else 0)
    wrapped = wrap(model, "fsdp" if mode in ("save", "load") else mode)
    optimizer = csq.optim.SGD(wrapped, 0.1, momentum=0.9, weight_decay=1.0)
    search = csq.Search(wrapped, budget=BUDGET, total_steps=STEPS, optimizer=optimizer, gradient_temperature=3.0)
    counts: dict[str, int] = {}
    if mode == "ddp":

        def hook(_, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            counts["bucket"] = counts.get("bucket", 0) + bucket.buffer().nbytes
            return default_hooks.allreduce_hook(None, bucket)

        wrapped.register_comm_hook(None, hook)
    # The names of older versions of PyTorch, and of newer ones.
    for name in ("reduce_scatter_tensor", "reduce_scatter_single", "all_gather_into_tensor", "all_gather_single"):
        if hasattr(dist, name):
            count_bytes(counts, name, 1)
    count_bytes(counts, "all_reduce", 0)
    first, last = 0, STEPS
    if mode == "save":
        last = STEPS // 3
    if mode == "load":
        first = STEPS // 3
        optimizer.init_state_()
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "search": search.state_dict()}
        dcp.load(state, checkpoint_id=folder / "checkpoint")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        search.load_state_dict(state["search"])
    train(wrapped, optimizer, search, first, last)
    if mode == "save":
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "search": search.state_dict()}
        dcp.save(state, checkpoint_id=folder / "checkpoint")
    state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    held = sum(layer.own_bit_logits().numel() for layer in model if hasattr(layer, "own_bit_logits"))
    if rank == 0:
        torch.save(state, folder / f"{mode}.pt")
        (folder / f"{mode}.json").write_text(json.dumps(counts | {"logits": held}))
    dist.barrier()
    # Everything is written; the threads of gloo now and then abort a process that takes them down in order.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
