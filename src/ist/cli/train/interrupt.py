"""Ctrl-C and other signals to stop: the step that runs is finished, a checkpoint is written, and the training stops."""

from __future__ import annotations

import signal
import threading
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...runtime.distributed import current_ranks

__all__ = ["Interrupt", "Stopped"]

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Windows has no SIGHUP, which comes when a terminal is closed."""


class Stopped(Exception):  # noqa: N818  (nothing went wrong)
    """A training was stopped by a signal, and what was trained is saved.

    Args:
        said: after which step, and how to resume.
        number: of the signal.
    """

    def __init__(self, said: str, number: int) -> None:
        super().__init__(said)
        self.status = 128 + number
        """The exit status that shells expect: 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP."""


class Interrupt(TrainerCallback):
    """Stops a training at the end of a step or an evaluation when one of `SIGNALS` came, on all ranks at the same one.

    A context manager: outside of it signals do what they did before, and one that is ignored, as nohup has it, stays
    so. A second Ctrl-C does not wait.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        """The signal that came, here or in another process."""
        self._former: dict[signal.Signals, Any] = {}
        self._trains = False

    def __enter__(self) -> Interrupt:
        self._trains = True
        if threading.current_thread() is threading.main_thread():
            heard = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._former = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._trains = False

    def _note(self, number: int, frame: Any) -> None:
        if self.number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number

    def agreed(self) -> int | None:
        """The signal, where one came to one process at least; of every process, at the same place."""
        if current_ranks().any(self.number is not None):
            self.number = self.number or signal.SIGTERM
        return self.number

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, where a signal came."""
        if self.agreed():
            control.should_save = True
            control.should_training_stop = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Likewise in the training, which saves after it has evaluated."""
        if self._trains:
            self.on_step_end(args, state, control)
