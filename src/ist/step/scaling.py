"""Steps that a GradScaler skips, seen where it decides: its `step` returns, and no update has come of it.

Gradients say nothing of it, since loops clear them after the optimizer's step, before the next forward, or between that
and its backward. The flag of fused optimizers and that of Accelerate's come of the same call.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType
from typing import Any, Protocol

from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import Optimizer

__all__ = ["ScalerListener", "is_heard", "leave_scalers", "listen", "unlisten"]

WATCHED = "_ist_tells"
"""Marks a `step` that tells listeners, by (their set, that function)."""


class ScalerListener(Protocol):
    """What is told of the steps of scalers."""

    num_outcomes: int
    """Updates and skipped steps that it has seen."""

    def not_updated(self, optimizer: Any) -> None:
        """A GradScaler was to step an optimizer, and has skipped it."""

    def updated_unseen(self, optimizer: Any) -> None:
        """A GradScaler has stepped an optimizer that does not say so by itself."""


listeners: weakref.WeakSet[Any] = weakref.WeakSet()


def listen(listener: ScalerListener) -> None:
    """Tell a listener, while it lives, of steps that any GradScaler skips. `GradScaler.step` is wrapped as long as
    there are listeners, and so is that of subclasses which have their own.
    """
    heard = shared_listeners()
    heard.add(listener)
    for kind in scaler_kinds():
        step = vars(kind).get("step")
        if isinstance(step, FunctionType) and marked(step) is None:
            kind.step = telling(step, heard)  # type: ignore[method-assign]


def unlisten(listener: ScalerListener) -> None:
    """Tell it no more."""
    listeners.discard(listener)
    shared_listeners().discard(listener)
    leave_scalers()


def leave_scalers() -> None:
    """Take the wrappers off where nobody listens any more, but not those which somebody else has wrapped in turn."""
    if list(shared_listeners()):
        return
    for kind in scaler_kinds():
        step = vars(kind).get("step")
        mark = marked(step)
        if mark and mark[1] is step:
            kind.step = step.__wrapped__  # type: ignore[union-attr, method-assign]


def is_heard(scaler: Any) -> bool:
    """Whether the listeners are told of what a scaler skips."""
    return marked(getattr(scaler, "step", None)) is not None


def shared_listeners() -> weakref.WeakSet[Any]:
    """Those that the wrapped `step` tells. Another import of this package may have wrapped it, with its own set."""
    mark = marked(GradScaler.step)
    return listeners if mark is None else mark[0]


def marked(step: Any) -> tuple[weakref.WeakSet[Any], Any] | None:
    """The mark of a `step` that tells listeners."""
    mark = getattr(step, WATCHED, None)
    return mark if isinstance(mark, tuple) else None


def scaler_kinds(kind: type[GradScaler] = GradScaler) -> Iterator[type[GradScaler]]:
    """The class of scalers and all that are made from it."""
    yield kind
    for derived in kind.__subclasses__():
        yield from scaler_kinds(derived)


def telling(step: Callable[..., Any], heard: weakref.WeakSet[Any]) -> Callable[..., Any]:
    """`GradScaler.step`, which tells the listeners what has become of a step of which they have seen nothing."""

    @functools.wraps(step)
    def step_and_tell(self: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        before = [(listener, listener.num_outcomes) for listener in heard]
        result = step(self, optimizer, *args, **kwargs)
        unaware = [listener for listener, num_outcomes in before if listener.num_outcomes == num_outcomes]
        if unaware:
            skipped = has_skipped_step(self, optimizer)
            for listener in unaware:
                (listener.not_updated if skipped else listener.updated_unseen)(optimizer)
        return result

    setattr(step_and_tell, WATCHED, (heard, step_and_tell))
    return step_and_tell


def has_skipped_step(scaler: Any, optimizer: Any) -> bool:
    """Whether a scaler has skipped a step of which nothing was seen, by what it found. A scaler that keeps that
    elsewhere has skipped PyTorch's optimizers, which would have said that they step; others count as having stepped.
    """
    state = getattr(scaler, "_per_optimizer_states", {}).get(id(optimizer)) or {}
    found = state.get("found_inf_per_device")
    if found:
        return any(bool(value) for value in found.values())
    return isinstance(optimizer, Optimizer) and scaler.is_enabled()
