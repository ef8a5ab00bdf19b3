"""The results before training: at once, or for a model that FSDP shards when training begins."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import SFTTrainer

from ...integrations.attachment import forget_evaluation
from ...runtime.sharding import check_saves

__all__ = ["Opening"]


class Opening(TrainerCallback):
    """Judges the model before its first step.

    FSDP shards a model together with its optimizer, which only a training makes: Accelerate refuses to evaluate before.
    There it is judged when training begins. A resumed training has none, as its weights are trained already.

    Args:
        trainer: what is to train.
        judge: returns the results by name.
    """

    results: dict[str, float]
    """By name; empty until the model is judged."""

    def __init__(self, trainer: SFTTrainer, judge: Callable[[], dict[str, float]]) -> None:
        self.results = {}
        self._judge = judge
        if trainer.is_fsdp_enabled:
            trainer.add_callback(self)
        else:
            self.results = checked(judge())
            forget_evaluation(trainer)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Judge a sharded model, unless its adapter could not be saved."""
        check_saves(kwargs["model"])
        if not state.global_step:
            self.results = checked(self._judge())


def checked(results: dict[str, float]) -> dict[str, float]:
    """The results.

    Raises:
        ValueError: the loss is NaN, which no training can lower.
    """
    if math.isnan(results.get("loss", 0.0)):
        raise ValueError(
            "The validation loss is NaN before the first step, so there is nothing to train: give --dtype float32, or "
            "see whether the model's weights and its config.json are undamaged."
        )
    return results
