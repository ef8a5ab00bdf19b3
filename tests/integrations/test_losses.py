"""The loss that is measured is the loss that is trained; where it cannot be, that is said."""

from __future__ import annotations

import logging
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from ist import IST, read_history
from ist.integrations.losses import differ_by_orders, trained_loss
from tests.helpers.tiny import tiny_batches, tiny_lora, tiny_rows


def make(folder: Path, callback: IST | None = None, kind: type[Trainer] = Trainer, **options: Any) -> Any:
    own = {name: options.pop(name) for name in ("compute_loss_func",) if name in options}
    settings: dict[str, Any] = {"max_steps": 4, "logging_steps": 2, "save_strategy": "no", "report_to": [], **options}
    args = TrainingArguments(str(folder), learning_rate=0.0, use_cpu=True, disable_tqdm=True, **settings)
    return kind(
        model=tiny_lora(init_lora_weights=False), args=args, train_dataset=tiny_rows(32),  # type: ignore[arg-type]
        callbacks=[] if callback is None else [callback], **own,
    )  # fmt: skip


def squares(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A loss that asks for the number of labels."""
    return outputs.logits.pow(2).sum(-1).mean() * (labels[..., 1:] != -100).sum() / num_items_in_batch


class Overridden(Trainer):
    """transformers' own example: labels are taken out of the batch."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        logits = model(**inputs).logits[:, :-1]
        loss = 3 * cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        return (loss, None) if return_outputs else loss


class CallsSuper(Trainer):
    """The parent's loss and a penalty."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(*args, **kwargs)
        return loss + 2


OWN: dict[str, tuple[type[Trainer], dict[str, Any]]] = {
    "compute_loss_func": (Trainer, {"compute_loss_func": squares}),
    "label smoothing": (Trainer, {"label_smoothing_factor": 0.3}),
    "compute_loss": (Overridden, {}),
    "super().compute_loss": (CallsSuper, {}),
}


@pytest.mark.parametrize("name", OWN)
def test_what_is_measured_is_what_is_trained(name: str, tmp_path: Path) -> None:
    """At β = 1, a learning rate of 0 and batches of all rows the measured losses are those that the Trainer logs."""
    kind, options = OWN[name]
    callback = IST(update_interval=2, beta=1.0, probe_batch_size=32)
    trainer = make(tmp_path, callback, kind, per_device_train_batch_size=32, **options)
    trainer.train()
    expected = trainer.state.log_history[0]["loss"]
    found = [event["losses"] for event in read_history(tmp_path) if event["event"] == "importance"]
    assert len(found) == 2
    for losses in found:
        assert losses == pytest.approx([expected] * 3, rel=1e-5)
    model_loss = trainer.model(
        **{k: torch.stack([row[k] for row in tiny_rows(32)]) for k in tiny_rows(1)[0]}
    ).loss.item()
    assert abs(model_loss - expected) > 1e-3, "another loss than the model's"


def test_a_trainer_of_the_model_s_own_loss_has_none(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    assert trained_loss(make(tmp_path)) is None
    for kind in (trl.SFTTrainer, trl.GRPOTrainer, trl.RLOOTrainer):
        assert trained_loss(kind.__new__(kind)) is None, kind.__name__


def test_a_loss_given_to_the_callback_wins(tmp_path: Path) -> None:
    def one(model: Any, batch: Any) -> Tensor:
        return torch.ones(())

    make(tmp_path, IST(update_interval=2, loss_function=one), Overridden).train()
    updates = [event for event in read_history(tmp_path) if event["event"] == "importance"]
    assert [event["losses"] for event in updates] == [[1.0] * 3] * 2


def test_what_a_trainer_counts_for_its_logs_is_put_back(tmp_path: Path) -> None:
    class Counts(Trainer):
        _metrics: Any

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._metrics["eval"]["entropy"].append(1.0)
            return super().compute_loss(model, inputs, *args, **kwargs)

    trainer = make(tmp_path, kind=Counts)
    trainer._metrics = {"eval": defaultdict(list, {"entropy": [0.5]})}
    loss = trained_loss(trainer)
    assert loss
    with torch.no_grad():
        assert loss(trainer.model, tiny_batches(1)[0]).ndim == 0
    assert trainer._metrics == {"eval": {"entropy": [0.5]}}


def test_processes_that_average_over_all_tokens_are_allowed_for(tmp_path: Path) -> None:
    """The Trainer multiplies by their number after it has divided by the tokens of all."""
    trainer = make(tmp_path, compute_loss_func=squares)
    alone = trained_loss(trainer)
    assert alone
    batch = tiny_batches(1)[0]
    with torch.no_grad():
        expected = alone(trainer.model, dict(batch))
        trainer.accelerator = SimpleNamespace(num_processes=4)
        assert alone(trainer.model, dict(batch)) == pytest.approx(expected.item())


# ---- Losses that teach nothing, and losses of another kind


def said(caplog: pytest.LogCaptureFixture, text: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


def test_losses_of_thousands_are_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ist"):
        make(tmp_path, IST(update_interval=1), compute_loss_func=lambda *a, **k: squares(*a, **k) * 1e4).train()
    (line,) = said(caplog, "exp(-loss)")
    assert "loss_function" in line
    assert "selector='random'" in line
    assert not said(caplog, "nearly uniform"), "the same thing is not said twice"
    assert not said(caplog, "another loss")


def test_a_choice_that_stayed_nearly_uniform_is_said_at_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for mu, times in ((10.0, 1), (1e4, 0), (0.0, 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ist"):
            make(tmp_path, IST(update_interval=2, mu=mu)).train()
        assert len(said(caplog, "After 2 importance updates no score has moved")) == times


def test_another_loss_than_the_trained_one_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class ScalesInItsStep(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            return super().training_step(*args, **kwargs) * 1000

    for loss_function, times in ((None, 1), (lambda model, batch: model(**batch).loss, 0)):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ist"):
            make(tmp_path, IST(update_interval=2, loss_function=loss_function), ScalesInItsStep).train()
        assert len(said(caplog, "another loss than the trained one")) == times


@pytest.mark.parametrize(
    ("measured", "trained", "expected"),
    [(4.0, 4.0, False), (4.0, 1.0, False), (0.5, 4.0, False), (4.0, 0.013, True), (4.0, 4000.0, True),
     (4.0, -1.0, True), (0.0, 0.0, False), (1.0, 0.0, True)],
)  # fmt: skip
def test_losses_of_one_kind(measured: float, trained: float, expected: bool) -> None:
    assert differ_by_orders(measured, trained) == expected
