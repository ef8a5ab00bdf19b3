"""Trainings that ended with an exception, of which nobody told: the next one must not inherit their frozen layers.

Blocks (`with tuner.step(…)`, `with SparseTuner(…)`) and the Trainer see the exception themselves. Between `begin_step`
and `end_step`, and between two blocks of a step, nothing does.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from ..adapters.layers import Layer
from ..runtime.hooks import WeakHook
from ..runtime.part import Part

__all__ = ["GAVE_UP", "MANY_STEPS", "NOT_BEGUN", "NOT_ENDED", "Interruption", "close_earlier", "open_steps"]

GAVE_UP = (
    "A step of a SparseTuner that was begun and not ended has been given up, and every layer trains again: where its "
    "training has ended, call tuner.close(), or use `with SparseTuner(…) as tuner:` or `with tuner.step(optimizer):`, "
    "which see an exception; where it continues, call begin_step() before and end_step(optimizer) after each step."
)
MANY_STEPS = 10
"""So many steps begun and none ended are no longer steps that a loop skips."""
NOT_ENDED = (
    f"begin_step was called {MANY_STEPS} times and end_step never in between, so the same layers train at every step "
    "and nothing is learned of the others: call end_step(optimizer) after optimizer.step()."
)
NOT_BEGUN = (
    "end_step was called and no step had begun since the last one ended, so it counts none and every layer trains in "
    "between: call begin_step() before the forward of each optimizer step."
)
open_steps: weakref.WeakSet[Any] = weakref.WeakSet()
"""The `SparseSteps` that were not closed, perhaps since their training ended with an exception."""


class Interruption(Part):
    """Notices that the training which began a step is over.

    That is so at a training forward where a notebook or an interactive interpreter has shown an exception since the
    step began, or where the step waits between two blocks, outside of which nothing is computed; and where an optimizer
    updates the layers, after another forward, for the second time in one step.

    Args:
        model: its forward is watched.
        give_up: a method that ends the step without an update.
    """

    def __init__(self, model: nn.Module, give_up: Callable[[], None]) -> None:
        self.inside = True
        """Whether forwards are expected: not while the step waits for its next block."""
        self._give_up = weakref.WeakMethod(give_up)
        self._open = False
        self._shown = 0
        self._updated: set[int] = set()
        self._since_forward: set[int] = set()
        handle = model.register_forward_pre_hook(WeakHook(self._before_forward))
        self._stop = weakref.finalize(self, handle.remove)

    def begin(self, active: Collection[int], step: int) -> None:
        """A step begins, or is begun again."""
        self._open = self.inside = True
        self._shown = shown_exception()
        self._updated.clear()
        self._since_forward.clear()

    def updated(self, optimizer: Optimizer) -> None:
        """An optimizer has updated the layers."""
        key = id(optimizer)
        if key in self._since_forward:  # Its `step` calls that of its base class, or it updates several times.
            return
        again = self._open and key in self._updated
        self._since_forward.add(key)
        self._updated.add(key)
        if again:
            self._end()

    def was_shown(self) -> bool:
        """Whether an exception has got to the top of an interactive interpreter since the step began."""
        return self._open and shown_exception() != self._shown

    def end(self) -> None:
        """The step is over."""
        self._open = False

    def close(self) -> None:
        """Watch no more."""
        self._open = False
        self._stop()

    def _before_forward(self, model: nn.Module, args: Any) -> None:
        if not self._open or not model.training or not torch.is_grad_enabled():
            return
        self._since_forward.clear()
        if not self.inside or self.was_shown():
            self._end()

    def _end(self) -> None:
        if (give_up := self._give_up()) is not None:
            give_up()


def shown_exception() -> int:
    """Tells the exceptions apart that IPython or the interpreter's prompt has shown last."""
    return id(getattr(sys, "last_value", None))


def close_earlier(layers: Sequence[Layer]) -> None:
    """Close the tuners of the same layers, which would freeze them at their own steps."""
    blocks = {id(layer.module) for layer in layers}
    for steps in list(open_steps):
        if blocks & {id(layer.module) for layer in steps.layers}:
            steps.close()
