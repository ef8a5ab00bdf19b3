"""The loss that a Trainer trains, for the importance loop."""

from __future__ import annotations

import copy
import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from logging import getLogger
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from ..method.registry import ImportanceUpdate
from ..probing.suppression import LossFunction

__all__ = ["trained_loss", "warn_of_other_loss"]

logger = getLogger(__name__)

ORDERS = 10.0
"""How many times larger one of two losses is that are not the same one. What is measured is suppressed, so it may well
be larger than the trained one."""
LIKELIHOOD = "nll"
"""The `loss_type` of TRL's SFTTrainer that is the model's own loss."""
COUNTED = ("_metrics", "_stored_metrics", "_total_train_tokens")
"""What TRL's trainers count in their losses, for their logs."""


def trained_loss(trainer: Any) -> LossFunction | None:
    """The loss that a Trainer computes by itself; None where it is the model's.

    It is the Trainer's own where it has a `compute_loss_func` or smooths labels, and where another class than
    transformers' Trainer and TRL's SFTTrainer defines `compute_loss`, as TRL's trainers of preferences and rewards do;
    that of SFTTrainer where its `loss_type` is another than the likelihood.
    Those of TRL that sample completions first (GRPO, RLOO) have no loss of a batch of the training set.

    Args:
        trainer: kept by a weak reference.
    """
    changes = getattr(trainer, "compute_loss_func", None) or getattr(trainer, "label_smoother", None)
    if not changes and not has_own_loss(trainer):
        return None
    reference = weakref.ref(trainer)

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        alive: Any = reference()
        with as_counted(alive):
            return alive.compute_loss(model, batch, **normalization(alive, batch))

    return loss


def has_own_loss(trainer: Any) -> bool:
    """Whether a Trainer's `compute_loss` computes another loss of a batch than the model's."""
    if "compute_loss" in vars(trainer):
        return True
    owner = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    library = owner.__module__.split(".")[0]
    if library != "trl":
        return library != "transformers"
    if owner.__name__ == "SFTTrainer":
        return getattr(getattr(trainer, "args", None), "loss_type", LIKELIHOOD) != LIKELIHOOD
    return type(trainer)._prepare_inputs is Trainer._prepare_inputs  # Others sample.


@contextmanager
def as_counted(trainer: Any) -> Iterator[None]:
    """Within the context a Trainer may count for its logs; afterwards it has counted nothing."""
    before = {name: copy.deepcopy(vars(trainer)[name]) for name in COUNTED if name in vars(trainer)}
    try:
        yield
    finally:
        vars(trainer).update(before)


def normalization(trainer: Any, batch: Any) -> dict[str, Any]:
    """The number of labels in a batch, as `compute_loss` is given it in training, where it is given one.

    Where the Trainer averages over the tokens of all processes, a loss is multiplied by their number afterwards.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    counts = trainer.model_accepts_loss_kwargs or getattr(trainer, "compute_loss_func", None) is not None
    takes = "num_items_in_batch" in inspect.signature(trainer.compute_loss).parameters
    if not (takes and counts and isinstance(labels, Tensor) and labels.ndim):
        return {}
    if "shift_labels" in batch:
        labels = batch["shift_labels"]
    elif getattr(trainer, "_loss_shifts_labels", labels.ndim > 1):
        labels = labels[..., 1:]
    copies = trainer.accelerator.num_processes if trainer.args.average_tokens_across_devices else 1
    return {"num_items_in_batch": labels.ne(-100).sum() * copies}


def warn_of_other_loss(update: ImportanceUpdate, trained: float) -> None:
    """Say where the measured losses cannot be the trained one.

    Args:
        update: a turn of the importance loop.
        trained: the training's loss around that time.
    """
    if update.skipped or not update.losses:
        return
    measured = sum(update.losses) / len(update.losses)
    if differ_by_orders(measured, trained):
        logger.warning(
            "IST measures a loss of %.3g and the training's is %.3g, so importance may be learned from another loss "
            "than the trained one: pass loss_function=lambda model, batch: … which returns the trained loss, in nats.",
            measured,
            trained,
        )


def differ_by_orders(measured: float, trained: float) -> bool:
    """Whether two losses cannot be of one kind: one is many times the other, or of another sign."""
    if measured == trained:
        return False
    return measured * trained <= 0 or not 1 / ORDERS < measured / trained < ORDERS
