"""The callback for Lightning under the real trainer: equal to a plain loop, resumed as if not interrupted."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import BATCH, BUDGET, CONFIG, OPTIMIZERS, X, Y, small_classifier, train_plainly
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import csq_kernels as csq

L = pytest.importorskip("lightning.pytorch", reason="lightning is not installed")

from csq_kernels.integrations.lightning import CSQCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")
STEPS = 12


class Module(L.LightningModule):
    """The classifier with an optimizer by name; it notes the batches that it is given."""

    def __init__(self, optimizer: str):
        super().__init__()
        self.network, self.optimizer = small_classifier(), optimizer
        self.seen: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        self.seen.append((x, y))
        return nn.functional.cross_entropy(self.network(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return OPTIMIZERS[self.optimizer](self)


def fit(module: Module, folder: Path, *callbacks: Any, shuffle: bool = False, ckpt_path: Path | None = None, **options):
    options = {"max_epochs": 2, "logger": False} | options
    if not any(isinstance(each, L.callbacks.ModelCheckpoint) for each in callbacks):
        options["enable_checkpointing"] = False
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(default_root_dir=folder, callbacks=list(callbacks), **quiet, **options)
    trainer.fit(module, DataLoader(TensorDataset(X, Y), BATCH, shuffle=shuffle), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_a_plain_loop(optimizer: str, accumulated: int, tmp_path: Path) -> None:
    module, callback = Module(optimizer), CSQCallback(BUDGET, CONFIG)
    options = {"max_epochs": 2 * accumulated, "accumulate_grad_batches": accumulated, "shuffle": True}
    trainer = fit(module, tmp_path, callback, **options)
    plain, report = train_plainly(optimizer, module.seen, accumulated)
    assert trainer.global_step == callback.search.steps_done == callback.search.total_steps == STEPS
    assert callback.report.budget_met and callback.report.cost == report.cost
    assert torch.equal(module.network(X), plain(X))


@pytest.mark.parametrize("at", [3, 9], ids=["search", "finetune"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_resumed_run_ends_as_the_uninterrupted_one(optimizer: str, at: int, tmp_path: Path) -> None:
    whole, resumed, callback = Module(optimizer), Module(optimizer), CSQCallback(BUDGET, CONFIG)
    # At the end of an epoch: a DataLoader cannot be resumed within one.
    saver = L.callbacks.ModelCheckpoint(tmp_path, "{step}", save_top_k=-1)
    options = {"max_epochs": 4, "limit_train_batches": 3}
    fit(whole, tmp_path, CSQCallback(BUDGET, CONFIG), saver, **options)
    fit(resumed, tmp_path, callback, ckpt_path=next(tmp_path.glob(f"step={at}.ckpt")), **options)
    assert len(resumed.seen) == STEPS - at
    assert callback.search.steps_done == STEPS
    assert torch.equal(resumed.network(X), whole.network(X))


def test_metrics_reach_the_logger(tmp_path: Path) -> None:
    logger = L.loggers.CSVLogger(tmp_path)
    rows: list[dict[str, Any]] = []
    logger.log_metrics = lambda metrics, step: rows.append({"step": step, **metrics})
    fit(Module("single-pass"), tmp_path, CSQCallback(BUDGET, CONFIG), logger=logger, log_every_n_steps=3)
    rows = [row for row in rows if "csq/stored_bits" in row]
    assert [row["step"] for row in rows] == [2, 5, 8, 11]
    assert rows[0]["csq/stored_bits"] > 3 >= rows[-1]["csq/stored_bits"]
    assert rows[-1]["csq/gap"] <= 0 and rows[-1]["csq/temperature"] == 10000


def test_a_run_that_stops_early_keeps_soft_bits_and_says_so(tmp_path: Path) -> None:
    module = Module("single-pass")
    with pytest.warns(UserWarning, match="training stopped after 5 of 12 steps"):
        fit(module, tmp_path, CSQCallback(BUDGET, CONFIG, total_steps=STEPS), max_steps=5)
    assert module.network[0].stage == "search"


def test_integers_are_optional_and_a_fixed_scheme_is_not_searched_again(tmp_path: Path) -> None:
    module, callback = Module("torch"), CSQCallback(BUDGET, CONFIG, finalize=False)
    fit(module, tmp_path, callback)
    assert callback.report is None and module.network[0].stage == "finetune"
    assert csq.report(module, BUDGET).budget_met
    with pytest.raises(ValueError, match=r"expected network\.0 in the search stage, got it in the finetune stage"):
        fit(copy.deepcopy(module), tmp_path, CSQCallback(BUDGET))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda m: torch.optim.AdamW(m.parameters(), weight_decay=0.1), r"no weight decay on bit_logits of network\.0"),
        (lambda m: torch.optim.SGD([m.network[0].bit_logits], lr=0.1), r"optimizer with gate_logits of network\.0"),
        (lambda m: [torch.optim.SGD([p], lr=0.1) for p in m.parameters()], "one optimizer from configure_optimizers"),
    ],
    ids=["decays logits", "misses gates", "many"],
)
def test_optimizers_that_cannot_work(make: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module("torch")
    module.automatic_optimization = False
    monkeypatch.setattr(module, "configure_optimizers", lambda: make(module))
    with pytest.raises(ValueError, match=message):
        fit(module, tmp_path, CSQCallback(BUDGET, CONFIG))


def test_weights_may_decay_where_logits_may_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, callback = Module("single-pass"), CSQCallback(BUDGET, CONFIG)
    monkeypatch.setattr(module, "configure_optimizers", lambda: csq.optim.SGD(module, lr=0.01, weight_decay=0.1))
    fit(module, tmp_path, callback)
    assert callback.report.budget_met


def test_an_endless_run_needs_total_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected total_steps, or a trainer with max_steps or max_epochs"):
        fit(Module("torch"), tmp_path, CSQCallback(BUDGET, CONFIG), max_epochs=-1)
