"""TRL's trainers of preferences and rewards: the loss that is measured is their own, and they log what they logged."""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, logsigmoid
from trl.trainer.utils import use_adapter

from ist import IST, read_history
from ist.adapters.layers import discover_layers
from ist.integrations.losses import trained_loss
from ist.probing.suppression import candidate_losses
from tests.helpers.preferences import make_trl_trainer
from tests.helpers.tiny import layer_of

BETA = 0.25
CANDIDATES = [(0, 2), (1, 3), (0, 1)]


@contextmanager
def weaker(model: Any, kept: tuple[int, ...]) -> Iterator[None]:
    """Within the context the matrices `B` of all layers but some are smaller: LoRA's response is proportional to it."""
    changed = [
        parameter
        for name, parameter in model.named_parameters()
        if "lora_B.default" in name and layer_of(name) not in kept
    ]
    for parameter in changed:
        parameter.data.mul_(BETA)
    yield
    for parameter in changed:
        parameter.data.div_(BETA)


def dpo_loss(model: Any, batch: Any) -> Tensor:
    """The mean of `−log σ(0.1 · ((π_w − ref_w) − (π_l − ref_l)))` over pairs, of log-probabilities of completions."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:, 1:]

    def log_probabilities() -> Tensor:
        logits = model(**inputs).logits[:, :-1].float()
        return -cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(1)

    policy = log_probabilities()
    with use_adapter(model, "ref" if "ref" in model.peft_config else None):
        reference = log_probabilities()
    chosen, rejected = (policy - reference).chunk(2)
    return -logsigmoid(0.1 * (chosen - rejected)).mean()


def reward_loss(model: Any, batch: Any) -> Tensor:
    """The mean of `−log σ(r_w − r_l)` over pairs."""
    chosen, rejected = model(**batch).logits.squeeze(-1).chunk(2)
    return -logsigmoid(chosen - rejected).mean()


def dft_loss(model: Any, batch: Any) -> Tensor:
    """The mean of `−p · log p` over tokens, with the gradient of the second `p` left out."""
    logits = model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    nats = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return (nats * nats.neg().exp()).sum() / labels.ne(-100).sum()


def test_another_loss_of_trls_sft_trainer_is_measured(tmp_path: Path, tiny_model_folder: Path) -> None:
    trainer = make_trl_trainer("SFT", tiny_model_folder, tmp_path, IST(), loss_type="dft")
    loss = trained_loss(trainer)
    assert loss
    batch = first_batch(trainer)
    found = candidate_losses(trainer.model, discover_layers(trainer.model), CANDIDATES, batch, 1.0, loss)
    with torch.no_grad():
        expected = dft_loss(trainer.model.eval(), batch).double()
    torch.testing.assert_close(found, expected.expand(3), rtol=1e-5, atol=1e-7)
    assert trained_loss(make_trl_trainer("SFT", tiny_model_folder, tmp_path, IST())) is None


def first_batch(trainer: Any) -> Any:
    return next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize(
    ("kind", "wrapped", "by_hand"),
    [("DPO", False, dpo_loss), ("DPO", True, dpo_loss), ("Reward", False, reward_loss), ("KTO", False, None),
     ("KTO", True, None)],
    ids=["DPO", "DPO, adapter as reference", "Reward", "KTO", "KTO, adapter as reference"],
)  # fmt: skip
def test_what_is_measured_is_the_trainers_loss_of_the_suppressed_model(
    kind: str, wrapped: bool, by_hand: Any, tmp_path: Path, tiny_model_folder: Path
) -> None:
    """The reference is never suppressed, whether it is the base model or the adapter `ref`."""
    trainer = make_trl_trainer(kind, tiny_model_folder, tmp_path, IST(), wrapped=wrapped)
    model, loss = trainer.model, trained_loss(trainer)
    assert loss
    with torch.no_grad():  # The adapter leaves its reference.
        for name, parameter in model.named_parameters():
            if "lora_B.default" in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    batch, before = first_batch(trainer), copy.deepcopy(trainer._metrics)
    counted = trainer._total_train_tokens
    found = candidate_losses(model, discover_layers(model), CANDIDATES, batch, BETA, loss)
    assert (trainer._metrics, trainer._total_train_tokens) == (before, counted)
    model.eval()
    expected = []
    with torch.no_grad():
        for kept in CANDIDATES:
            with weaker(model, kept):
                expected.append((by_hand or trainer.compute_loss)(model, dict(batch)).double())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-7)
    assert len(set(found.tolist())) == 3


@pytest.mark.parametrize("kind", ["DPO", "KTO", "Reward"])
def test_measuring_changes_nothing_that_trl_logs(kind: str, tmp_path: Path, tiny_model_folder: Path) -> None:
    logs = []
    for name, options in (("ist", {"mu": 0.0}), ("random", {"selector": "random"})):
        callback = IST(update_interval=1, num_active_layers=2, **options)  # type: ignore[arg-type]
        torch.manual_seed(0)
        trainer = make_trl_trainer(kind, tiny_model_folder, tmp_path / name, callback, max_steps=3, logging_steps=1)
        trainer.train()
        timed = ("runtime", "per_second", "step_time", "ist/")
        logs.append(
            [{k: v for k, v in entry.items() if not any(t in k for t in timed)} for entry in trainer.state.log_history]
        )
    assert logs[0] == logs[1]
    assert any("rewards/margins" in entry or "margin" in entry for entry in logs[0])
    updates = [event for event in read_history(tmp_path / "ist") if event["event"] == "importance"]
    assert len(updates) == 3
    assert all(len(set(event["losses"])) > 1 for event in updates[1:])


EXPERIMENTAL = {"CPO": "trl.experimental.cpo", "ORPO": "trl.experimental.orpo"}


@pytest.mark.parametrize("kind", EXPERIMENTAL)
def test_experimental_trainers_store_metrics_that_are_put_back(
    kind: str, tmp_path: Path, tiny_model_folder: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip(EXPERIMENTAL[kind])
        trainer = make_trl_trainer(
            kind, tiny_model_folder, tmp_path, IST(update_interval=1), module=importlib.import_module(module.__name__)
        )
        loss, batch = trained_loss(trainer), first_batch(trainer)
        assert loss
        trainer.model.eval()
        with torch.no_grad():
            found = loss(trainer.model, batch)
            assert not trainer._stored_metrics["train"]
            assert found.item() == trainer.compute_loss(trainer.model, batch).item()
        assert trainer._stored_metrics["train"]
