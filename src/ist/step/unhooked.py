"""Optimizers that are not of PyTorch's kind have no hooks: the `step` of their class tells that it was called."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any, Protocol

__all__ = ["hear_steps", "unhear_steps"]

TELLS = "_ist_tells_steps"
"""Marks a `step` that tells listeners, by (their set, that function)."""


class StepListener(Protocol):
    """What is told of steps."""

    num_outcomes: int
    """Updates and skipped steps that it has seen."""

    def was_called(self, optimizer: Any) -> None:
        """The `step` of an optimizer was called."""

    def updated_unseen(self, optimizer: Any) -> None:
        """An optimizer has stepped that does not say so by itself."""


kinds: weakref.WeakSet[type] = weakref.WeakSet()
"""Classes whose `step` was wrapped."""


def hear_steps(optimizer: Any, listener: StepListener) -> bool:
    """Tell a listener, while it lives, of the steps of all optimizers of this one's class.

    Returns:
        Whether it is told: not where the `step` is no plain method, or one of this object's own.
    """
    kind = next((kind for kind in type(optimizer).__mro__ if "step" in vars(kind)), None)
    if kind is None or "step" in getattr(optimizer, "__dict__", ()):
        return False
    step = vars(kind)["step"]
    if not isinstance(step, FunctionType):
        return False
    mark = getattr(step, TELLS, None)
    heard: weakref.WeakSet[Any] = weakref.WeakSet() if mark is None else mark[0]
    heard.add(listener)
    if mark is None:
        try:
            kind.step = telling(step, heard)  # type: ignore[attr-defined]
        except (TypeError, AttributeError):  # a class that cannot be changed
            return False
    kinds.add(kind)
    return True


def unhear_steps(listener: StepListener | None = None) -> None:
    """Tell it no more, and take the wrappers off of which nobody is told, but not those that are wrapped in turn."""
    for kind in list(kinds):
        step: Any = vars(kind).get("step")
        heard, own = getattr(step, TELLS, (weakref.WeakSet(), None))
        if listener is not None:
            heard.discard(listener)
        if own is step and not list(heard):
            kind.step = step.__wrapped__  # type: ignore[attr-defined]
            kinds.discard(kind)


def telling(step: Callable[..., Any], heard: weakref.WeakSet[Any]) -> Callable[..., Any]:
    """A `step` that tells of itself, unless another optimizer's has told within it."""

    @functools.wraps(step)
    def step_and_tell(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = [(listener, listener.num_outcomes) for listener in heard]
        for listener, _ in before:
            listener.was_called(self)
        result = step(self, *args, **kwargs)
        for listener, num_outcomes in before:
            if listener.num_outcomes == num_outcomes:
                listener.updated_unseen(self)
        return result

    setattr(step_and_tell, TELLS, (heard, step_and_tell))
    return step_and_tell
