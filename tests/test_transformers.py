"""The callback for Hugging Face's Trainer, under the real one: equal to a plain loop, resumed as if not interrupted."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from plain_loop import BATCH, BUDGET, CONFIG, OPTIMIZERS, X, Y, small_classifier, train_plainly
from torch import Tensor, nn

import csq_kernels as csq

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed, which the Trainer needs")

from csq_kernels.integrations.transformers import CSQCallback  # noqa: E402

STEPS = 12
DATA = [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)]


class Classifier(nn.Module):
    """The classifier as the Trainer calls it; it notes the batches that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.network = small_classifier()
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        self.seen.append((x, labels))
        logits = self.network(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def arguments(folder: Path, **options: Any) -> Any:
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no"}
    fixed = {"per_device_train_batch_size": BATCH, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    return transformers.TrainingArguments(
        str(folder), **{"max_steps": STEPS, "save_strategy": "no", **quiet, **fixed, **options}
    )


def trainer(model: nn.Module, optimizer: str, folder: Path, *callbacks: Any, **options: Any) -> Any:
    return transformers.Trainer(
        model,
        arguments(folder, **options),
        train_dataset=DATA,
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=(lambda: OPTIMIZERS[optimizer], {}),
    )


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equals_a_plain_loop(optimizer: str, accumulated: int, tmp_path: Path) -> None:
    model, callback = Classifier(), CSQCallback(BUDGET, CONFIG)
    trainer(model, optimizer, tmp_path, callback, gradient_accumulation_steps=accumulated).train()
    plain, report = train_plainly(optimizer, model.seen, accumulated)
    assert len(model.seen) == STEPS * accumulated
    assert callback.search.steps_done == callback.search.total_steps == STEPS
    assert callback.report.budget_met and callback.report.cost == report.cost
    assert torch.equal(model.network(X), plain(X))


@pytest.mark.parametrize(
    "optimizer, at, restore",
    [("torch", 4, False), ("torch", 8, False), ("single-pass", 4, False), ("single-pass", 8, True)],
    ids=["torch, search", "torch, finetune", "single-pass, search", "single-pass, finetune, callback restored too"],
)
def test_a_resumed_run_ends_as_the_uninterrupted_one(optimizer: str, at: int, restore: bool, tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 4, "restore_callback_states_from_checkpoint": restore}
    whole, resumed = Classifier(), Classifier()
    search = {"search_share": 0.5, "strength": 0.2}
    trainer(whole, optimizer, tmp_path, CSQCallback(BUDGET, CONFIG, **search), **options).train()
    again = trainer(resumed, optimizer, tmp_path, CSQCallback(BUDGET, CONFIG, **search), **options)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert len(resumed.seen) == STEPS - at
    assert resumed.network[0].stage == "hard"
    assert torch.equal(resumed.network(X), whole.network(X))


def masked_language_model() -> Any:
    """A tiny BERT whose last layer shares the weight of its embedding."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 24, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=16, max_position_embeddings=8, tie_word_embeddings=True)
    return transformers.BertForMaskedLM(config)


def test_a_pretrained_model_with_tied_weights_is_resumed(tmp_path: Path) -> None:
    tokens = torch.arange(24 * 6).view(24, 6) % 24
    data = [{"input_ids": row, "labels": row} for row in tokens]

    def run(model: nn.Module, resume: str | None) -> Any:
        chosen = {"model": model, "lr": 1e-2, "gate_lr": 0.1}
        callback = CSQCallback("4 bits", CONFIG)
        options = {"save_strategy": "steps", "save_steps": 4, "max_grad_norm": 1.0, "warmup_steps": 2}
        trainer = transformers.Trainer(
            model,
            arguments(tmp_path, **options),
            train_dataset=data,
            callbacks=[callback],
            optimizer_cls_and_kwargs=(csq.optim.AdamW, chosen),
        )
        trainer.train(resume_from_checkpoint=resume)
        return callback.report

    whole = masked_language_model()
    report = run(whole, None)
    assert report.budget_met and len(report.layers) == 10  # the decoder is one with the embedding
    for at in (4, 8):
        folder = tmp_path / f"checkpoint-{at}"
        saved = safetensors.torch.load_file(folder / "model.safetensors")
        assert [name for name in saved if name.startswith("cls.predictions.decoder.bit")] == []
        resumed = masked_language_model()
        run(resumed, str(folder))
        assert torch.equal(resumed.eval()(tokens).logits, whole.eval()(tokens).logits)
    whole.save_pretrained(tmp_path / "final")
    codes = "cls.predictions.decoder.codes", "bert.embeddings.word_embeddings.codes"
    saved = safetensors.torch.load_file(tmp_path / "final" / "model.safetensors")
    assert codes[0] not in saved and codes[1] in saved
    resumed.get_output_embeddings().codes.zero_()
    resumed.load_state_dict(saved, strict=False)  # BERT ties a bias too, and leaves that out as well
    assert torch.equal(resumed(tokens).logits, whole(tokens).logits)


def test_metrics_are_logged_and_reach_the_callbacks_behind(tmp_path: Path) -> None:
    told: list[dict[str, float]] = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            told.append(dict(logs))

    options = {"logging_strategy": "steps", "logging_steps": 3}
    running = trainer(Classifier(), "single-pass", tmp_path, CSQCallback(BUDGET, CONFIG), Reporter(), **options)
    running.train()
    rows = [row for row in running.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [3, 6, 9, 12]
    assert rows[0]["csq/stored_bits"] > 3 >= rows[-1]["csq/stored_bits"]
    assert rows[-1]["csq/gap"] <= 0 and rows[-1]["csq/temperature"] == pytest.approx(10000)
    assert [row["csq/temperature"] for row in told if "loss" in row] == [row["csq/temperature"] for row in rows]


def test_a_run_that_stops_early_keeps_soft_bits_and_says_so(tmp_path: Path) -> None:
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 5

    model = Classifier()
    with pytest.warns(UserWarning, match="training stopped after 5 of 12 steps"):
        trainer(model, "single-pass", tmp_path, CSQCallback(BUDGET, CONFIG), Stop()).train()
    assert model.network[0].stage == "search"


def test_an_optimizer_that_decays_logits_is_refused(tmp_path: Path) -> None:
    stock = transformers.Trainer(
        Classifier(), arguments(tmp_path, weight_decay=0.1), train_dataset=DATA, callbacks=[CSQCallback(BUDGET, CONFIG)]
    )
    with pytest.raises(ValueError, match=r"no weight decay on bit_logits of network\.0, got 0\.1"):
        stock.train()


def test_an_optimizer_of_the_float_weights_is_refused(tmp_path: Path) -> None:
    model = Classifier()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    callbacks = [CSQCallback(BUDGET, CONFIG)]
    stock = transformers.Trainer(
        model, arguments(tmp_path), train_dataset=DATA, callbacks=callbacks, optimizers=(early, None)
    )
    with pytest.raises(ValueError, match=r"optimizer with bit_logits of network\.0, got one made before prepare_"):
        stock.train()


def test_gradients_that_are_still_scaled_are_refused() -> None:
    with pytest.raises(ValueError, match="expected max_grad_norm above 0 with fp16, got 0"):
        CSQCallback(BUDGET).on_train_begin(SimpleNamespace(fp16=True, max_grad_norm=0), None, None)
