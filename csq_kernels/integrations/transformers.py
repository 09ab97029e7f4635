"""``CSQCallback`` for the ``Trainer`` of Hugging Face Transformers: a search for the precisions of its model."""

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from csq_kernels.budget import Budget
from csq_kernels.integrations.session import Session
from csq_kernels.nn.layer import Config, CSQLayer
from csq_kernels.nn.leaf import PARAMETERS
from csq_kernels.report import Report
from csq_kernels.search import Search


class CSQCallback(TrainerCallback, ExportableState):
    """Prepare the model, search its precisions within ``budget`` over the whole run, and make the integers.

    Give it to the constructor of the ``Trainer``, where it prepares the model before the optimizer is built. Rates for
    logits and gates come with ``optimizer_cls_and_kwargs``, as below; for an optimizer of torch pass a factory,
    ``(lambda: build, {})``, whose ``build(model)`` uses ``csq_kernels.param_groups``. The gradient of the penalty is
    added before each optimizer step, after clipping and once however many batches are accumulated. Checkpoints hold
    the state of the search: ``train(resume_from_checkpoint=...)`` ends as the uninterrupted run.

    Args:
        budget: ``"3.0 bits"`` (stored), ``"3.0 paper bits"`` or ``"1.2 MB"``.
        config: how to prepare a model that has no CSQ layer yet; default ``Config()``.
        finalize: make the integers at the end of training. Checkpoints are written before, with soft bits.
        **options: of ``Search``, such as ``search_share`` and ``strength``.

    Attributes:
        search: the ``Search``, once training has begun.
        report: the scheme, once training has ended and the integers are made.

    Metrics go to the trainer's log history and to the callbacks after this one: where TensorBoard or another reporter
    shall show them, set ``report_to="none"`` and list its callback behind this one.

    Raises:
        ValueError: at the start of training, if the optimizer does not step every CSQ layer or decays one, or if fp16
            is used without ``max_grad_norm``, so that gradients are still scaled when the penalty's are added.

    Example:
        >>> trainer = Trainer(  # doctest: +SKIP
        ...     model,
        ...     TrainingArguments("out", num_train_epochs=3),
        ...     train_dataset=data,
        ...     callbacks=[CSQCallback("3 bits")],
        ...     optimizer_cls_and_kwargs=(
        ...         csq_kernels.optim.AdamW,
        ...         {"model": model, "lr": 1e-4, "logit_lr": 1e-3, "gate_lr": 1e-2},
        ...     ),
        ... )
    """

    def __init__(self, budget: str | Budget, config: Config | None = None, *, finalize: bool = True, **options: Any):
        self._session = Session(budget, config, finalize, options)
        # What the trainer restores where it is told to restore callbacks.
        self.search_state: dict[str, Any] | None = None

    @property
    def search(self) -> Search | None:
        return self._session.search

    @property
    def report(self) -> Report | None:
        return self._session.report

    def state(self) -> dict[str, Any]:
        session = self._session
        arguments = {"budget": str(session.budget), "finalize": session.finalize, **session.options}
        state = None if session.search is None else session.state_dict()
        return {"args": arguments, "attributes": {"search_state": state}}

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs["model"]
        self._session.prepare(model)
        model.register_state_dict_post_hook(_drop_shared)
        model.register_load_state_dict_pre_hook(_fill_in_shared)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.fp16 and not args.max_grad_norm:
            raise ValueError(f"expected max_grad_norm above 0 with fp16, got {args.max_grad_norm}")
        # The trainer reads the state of callbacks from a checkpoint, and leaves it at that.
        saved = state.stateful_callbacks[type(self).__name__] if state.global_step else None
        optimizer = kwargs["optimizer"]
        self._session.begin(
            kwargs["model"],
            getattr(optimizer, "optimizer", optimizer),
            state.max_steps,
            None if saved is None else saved["attributes"]["search_state"],
        )

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._session.add_penalty_gradient()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._session.step()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **kwargs: Any
    ) -> None:
        if self.search is not None and "loss" in logs:
            metrics = self._session.metrics()
            logs.update(metrics)
            # It holds a copy, which was made before.
            state.log_history[-1].update(metrics)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._session.finish(kwargs["model"])


def _shared(model: nn.Module) -> dict[str, str]:
    """``{name: name that stands for it}`` of the tensors that CSQ layers share, as in a model with tied embeddings."""
    leaders: dict[int, tuple[str, CSQLayer]] = {}
    shared: dict[str, str] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, CSQLayer):
            continue
        leading, leader = leaders.setdefault(id(layer.bit_logits), (name, layer))
        if leader is not layer:
            tensors = (*PARAMETERS, "codes") if layer.codes is leader.codes is not None else PARAMETERS
            shared |= {f"{name}.{tensor}": f"{leading}.{tensor}" for tensor in tensors}
    return shared


def _drop_shared(model: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """Leave each shared tensor in the state once: the trainer's format knows no tensors with the same memory."""
    for name in _shared(model):
        state_dict.pop(prefix + name, None)


def _fill_in_shared(model: nn.Module, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
    for name, leading in _shared(model).items():
        if prefix + leading in state_dict:
            state_dict.setdefault(prefix + name, state_dict[prefix + leading])
