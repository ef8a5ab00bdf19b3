"""How long the optimizer steps of a training took, across resumes, and a stop when the time is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ...runtime.distributed import current_ranks

__all__ = ["TrainingClock"]


class TrainingClock(TrainerCallback, ExportableState):
    """Counts the seconds of training alone: data, steps and what a method measures between them, but no evaluation and
    no writing of checkpoints. The count travels with the checkpoints, and each entry of the Trainer's log has it as
    `step_seconds`.

    Args:
        budget: stop at the end of the step in which this many seconds are over; None never stops.
        now: the time in seconds.
    """

    def __init__(self, budget: float | None = None, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = 0.0
        """Seconds of training until now."""
        self.budget = budget
        self._now = now
        self._mark = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start, or continue from the checkpoint's count."""
        saved: Any = state.stateful_callbacks
        if state.global_step:
            own = saved.get(type(self).__name__) or {}
            self.seconds = own.get("attributes", {}).get("seconds", 0.0)
        saved.setdefault(type(self).__name__, self.state())
        self._mark = self._now()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the step when the device has done it, and stop where the time is over on some rank."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += self._now() - self._mark
        self._mark = self._now()
        if self.budget is not None and current_ranks().any(self.seconds >= self.budget):
            control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Add the count to the Trainer's own log."""
        if state.log_history:
            state.log_history[-1]["step_seconds"] = self.seconds

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave out what the evaluation took."""
        self._mark = self._now()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave out what the checkpoint took."""
        self._mark = self._now()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"args": {"budget": self.budget}, "attributes": {"seconds": self.seconds}}
