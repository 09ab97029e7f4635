"""``CSQCallback`` for Lightning 2: a search for the precisions of a ``LightningModule`` while ``fit`` trains it."""

from typing import Any

from csq_kernels.budget import Budget
from csq_kernels.integrations.session import Session
from csq_kernels.nn.layer import Config
from csq_kernels.report import Report
from csq_kernels.search import Search

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:
    from pytorch_lightning import Callback, LightningModule, Trainer


class CSQCallback(Callback):
    """Prepare the module, search its precisions within ``budget`` over the whole run, and make the integers.

    ``configure_optimizers`` finds the module prepared: let it return one of ``csq_kernels.optim``, or an optimizer of
    torch built from ``csq_kernels.param_groups``. The gradient of the penalty (8) is added before each optimizer step,
    once however many batches are accumulated, and is clipped with the rest. Checkpoints hold the state of the search:
    a run resumed with ``ckpt_path`` ends as the uninterrupted one.

    Args:
        budget: ``"3.0 bits"`` (stored), ``"3.0 paper bits"`` or ``"1.2 MB"``.
        config: how to prepare a module that has no CSQ layer yet; default ``Config()``.
        finalize: make the integers at the end of training. Checkpoints are written before, with soft bits.
        total_steps: optimizer steps of the search; default all that the trainer will take.
        **options: of ``Search``, such as ``search_share`` and ``strength``.

    Attributes:
        search: the ``Search``, once training has begun.
        report: the scheme, once training has ended and the integers are made.

    Raises:
        ValueError: at the start of training, if there is not one optimizer that steps every CSQ layer without decaying
            it, or if the trainer's number of steps has no limit.

    Example:
        >>> from lightning.pytorch import Trainer  # doctest: +SKIP
        >>> trainer = Trainer(max_epochs=10, callbacks=[CSQCallback("3 bits")])  # doctest: +SKIP
        >>> trainer.fit(module, loader)  # doctest: +SKIP
    """

    def __init__(
        self,
        budget: str | Budget,
        config: Config | None = None,
        *,
        finalize: bool = True,
        total_steps: int | None = None,
        **options: Any,
    ):
        self._session = Session(budget, config, finalize, options)
        self._total_steps = total_steps
        self._state: dict[str, Any] | None = None
        self._stepped = False

    @property
    def search(self) -> Search | None:
        return self._session.search

    @property
    def report(self) -> Report | None:
        return self._session.report

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # Whatever is to be done with it: a checkpoint may be loaded next.
        self._session.prepare(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if len(trainer.optimizers) != 1:
            raise ValueError(f"expected one optimizer from configure_optimizers, got {len(trainer.optimizers)}")
        steps = self._total_steps or trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("expected total_steps, or a trainer with max_steps or max_epochs, got neither")
        self._session.begin(pl_module, trainer.optimizers[0], int(steps), self._state)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._session.add_penalty_gradient()
        self._stepped = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._stepped:
            return
        self._stepped = False
        self._session.step()
        if trainer.global_step % trainer.log_every_n_steps == 0:
            pl_module.log_dict(self._session.metrics())

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._session.finish(pl_module)

    def state_dict(self) -> dict[str, Any]:
        return {} if self._session.search is None else self._session.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._state = state_dict
