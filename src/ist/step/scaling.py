"""Steps that a GradScaler skips, seen where it decides: its `step` returns, and no update has come of it.

Gradients say nothing of it, since loops clear them after the optimizer's step, before the next forward, or between that
and its backward. The flag of fused optimizers and that of Accelerate's come of the same call.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import Optimizer

__all__ = ["ScalerListener", "listen", "unlisten"]

WATCHED = "_ist_tells"
"""Marks a `step` that tells the listeners."""


class ScalerListener(Protocol):
    """What is told of skipped steps."""

    num_outcomes: int
    """Updates and skipped steps that it has seen."""

    def not_updated(self, optimizer: Optimizer) -> None:
        """A GradScaler was to step an optimizer, and it has not."""


listeners: weakref.WeakSet[Any] = weakref.WeakSet()


def listen(listener: ScalerListener) -> None:
    """Tell a listener, while it lives, of steps that any GradScaler skips; the first call wraps `GradScaler.step`."""
    if not hasattr(GradScaler.step, WATCHED):
        GradScaler.step = telling(GradScaler.step)  # type: ignore[method-assign]
    listeners.add(listener)


def unlisten(listener: ScalerListener) -> None:
    """Tell it no more."""
    listeners.discard(listener)


def telling(step: Callable[..., Any]) -> Callable[..., Any]:
    """`GradScaler.step`, which tells the listeners where it has not stepped."""

    @functools.wraps(step)
    def step_and_tell(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        before = [(listener, listener.num_outcomes) for listener in listeners]
        result = step(self, optimizer, *args, **kwargs)
        for listener, num_outcomes in before:
            if listener.num_outcomes == num_outcomes:
                listener.not_updated(optimizer)
        return result

    setattr(step_and_tell, WATCHED, True)
    return step_and_tell
