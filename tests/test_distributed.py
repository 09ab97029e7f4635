"""The single-pass step between processes: DDP and FSDP2 give what one process gives, and only dL/dW travels."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import distributed_worker
import pytest
import torch
from torch import Tensor

WORKER = Path(distributed_worker.__file__)
WEIGHTS = {"0": 30 * 19, "2": 27 * 30, "4": 5 * 27}
OTHERS = 30 + 27 + 5 + 2 * 27  # biases and LayerNorm
GATES = 4 + 4 * 27 + 4
SCALES = 30 + 1 + 5


def launch(mode: str, processes: int, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Run the worker; return the whole state at the end and what rank 0 counted."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*command, WORKER, mode, folder], capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / f"{mode}.pt"), json.loads((folder / f"{mode}.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return launch("alone", 1, tmp_path_factory.mktemp("alone"))[0]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Processes add up gradients in another order, and a step in 24 amplifies it a little."""
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("processes", [2, 4])
def test_ddp_exchanges_the_gradient_of_the_weight_alone(alone, tmp_path: Path, processes: int) -> None:
    state, counts = launch("ddp", processes, tmp_path)
    assert_same(state, alone)
    # Of 8 bit gradients a weight (4 bits, two signs) nothing is seen; nor of gates and scales.
    assert counts["bucket"] == distributed_worker.STEPS * 4 * (sum(WEIGHTS.values()) + OTHERS)
    assert set(counts) == {"bucket", "all_reduce", "logits"}
    assert counts["all_reduce"] == counts["bucket"]


@pytest.mark.parametrize("processes", [2, 4])
def test_fsdp_keeps_the_logits_where_the_rows_are(alone, tmp_path: Path, processes: int) -> None:
    state, counts = launch("fsdp", processes, tmp_path)
    assert_same(state, alone)
    stored = sum(tensor.numel() for name, tensor in state.items() if name.endswith("bit_logits"))
    assert counts["logits"] < stored * (1.25 if processes == 2 else 1.5) / processes
    # Gates and scales: one all_reduce a step. A scatter moves one number a weight, padded to equal shares.
    searching = distributed_worker.STEPS // 2
    assert counts["all_reduce"] <= distributed_worker.STEPS * 4 * (GATES + SCALES)
    assert counts["all_reduce"] > searching * 4 * (GATES + SCALES) * 0.99
    numbers = sum(WEIGHTS.values()) + OTHERS
    scattered = sum(count for name, count in counts.items() if name.startswith("reduce_scatter"))
    gathered = sum(count for name, count in counts.items() if name.startswith("all_gather"))
    assert numbers <= scattered / (distributed_worker.STEPS * 4) <= numbers * 1.1
    # Forward and backward each ask for the shards of the weight, and the end of the search asks once more.
    assert gathered / (distributed_worker.STEPS * 4) <= 2 * numbers * 1.1 / processes


def test_a_checkpoint_is_loaded_onto_another_number_of_processes(alone, tmp_path: Path) -> None:
    launch("save", 2, tmp_path)
    state, _ = launch("load", 4, tmp_path)
    assert_same(state, alone)
    state, _ = launch("load", 1, tmp_path)
    assert_same(state, alone)
