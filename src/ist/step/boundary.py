"""Where an optimizer step ends, seen at the optimizer: the same for every kind of gradient accumulation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any

from torch import Tensor
from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from ..runtime.part import Part
from .scaling import is_heard, leave_scalers, listen, unlisten
from .unhooked import hear_steps, unhear_steps

__all__ = ["Boundary"]


class Boundary(Part):
    """Notices when an optimizer has updated some parameters, and when a GradScaler skips that.

    Of those that are not of PyTorch's kind, the `step` of their class is heard, after `hear`.

    Micro-batches without an update and steps that a GradScaler skips are no optimizer steps. It calls fused optimizers
    all the same, which skip by themselves: their flag is read then, which waits for the device.

    Args:
        parameters: an optimizer counts that holds one of them.
        on_update: a method that is called after each update, while the gradients are still there.
        on_step: a method that is called with the optimizer after that.
        before_step: a method that is called with an optimizer before it steps.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        on_update: Callable[[], None] | None = None,
        on_step: Callable[[Optimizer], None] | None = None,
        before_step: Callable[[Any], None] | None = None,
    ) -> None:
        self.updated = False
        """Whether an optimizer has updated the parameters since the step began."""
        self.num_outcomes = 0
        """Updates and skipped steps so far."""
        self._own = {id(parameter) for parameter in parameters}
        self._num_before = 0
        self._heard: set[type] = set()
        """Kinds of optimizers without hooks that were heard to step: others may step in ways that nothing shows."""
        self._skipped: dict[int, int] = {}
        """Of each optimizer's id, the steps that were skipped since the last update by any."""
        notice, announce = weakref.WeakMethod(self._notice), weakref.WeakMethod(self._announce)
        self._on_update = on_update and weakref.WeakMethod(on_update)
        self._on_step = on_step and weakref.WeakMethod(on_step)
        self._before_step = before_step and weakref.WeakMethod(before_step)
        handles = (
            register_optimizer_step_pre_hook(lambda optimizer, *_: (alive := announce()) and alive(optimizer)),
            register_optimizer_step_post_hook(lambda optimizer, *_: (alive := notice()) and alive(optimizer)),
        )
        self._remove = weakref.finalize(self, leave, handles)
        listen(self)

    @property
    def num_skipped(self) -> int:
        """Steps that were skipped since the last update. Of several optimizers in a step each is skipped once."""
        return max(self._skipped.values(), default=0)

    def count_anew(self) -> None:
        """Forget the steps that were skipped."""
        self._skipped.clear()

    def hear(self, optimizer: Any) -> None:
        """Get to know an optimizer that may be of a kind of its own."""
        if not isinstance(optimizer, Optimizer):
            hear_steps(optimizer, self)

    def knows(self, optimizer: Any) -> bool:
        """Whether `updated` says what has become of this step; otherwise nothing tells whether the optimizer stepped.

        Args:
            optimizer: the loop's; None where it was never given, and one that has stepped before tells of itself.
        """
        if isinstance(optimizer, Optimizer) or self.num_outcomes > self._num_before:
            return True
        if optimizer is None:
            return self.num_outcomes > 0
        return type(optimizer) in self._heard and hear_steps(optimizer, self)

    def begin(self, active: Collection[int], step: int) -> None:
        """Nothing has been updated in this step."""
        self.updated, self._num_before = False, self.num_outcomes
        listen(self)  # There may be new kinds of scalers.

    def close(self) -> None:
        """Watch optimizers no more."""
        unlisten(self)
        unhear_steps(self)
        self._remove()

    def not_updated(self, optimizer: Any) -> None:
        """A step of an optimizer was skipped."""
        if self._holds(optimizer):
            self._count(optimizer)

    def updated_unseen(self, optimizer: Any) -> None:
        """An optimizer that is not of PyTorch's kind was stepped."""
        if self._holds(optimizer):
            self._count_update()

    def was_called(self, optimizer: Any) -> None:
        """The `step` of an optimizer was called that is not of PyTorch's kind."""
        if self._holds(optimizer):
            self._heard.add(type(optimizer))
        self._announce(optimizer)

    def ask(self, optimizer: Any) -> None:
        """Count what Accelerate's optimizer says of its last step, where its scaler is of a kind that is not heard."""
        skipped = getattr(optimizer, "step_was_skipped", None)
        if skipped is None or is_heard(getattr(optimizer, "scaler", None)):
            return
        if skipped:
            self._count(optimizer)
        else:
            self._skipped.pop(id(optimizer), None)

    def _count(self, optimizer: Any) -> None:
        self._skipped[id(optimizer)] = self._skipped.get(id(optimizer), 0) + 1
        self.num_outcomes += 1

    def _announce(self, optimizer: Any) -> None:
        before_step = self._before_step and self._before_step()
        if before_step and self._holds(optimizer):
            before_step(optimizer)

    def _notice(self, optimizer: Any) -> None:
        if not self._holds(optimizer):
            return
        if has_skipped(optimizer):
            self.not_updated(optimizer)
            return
        self._count_update()
        on_step = self._on_step and self._on_step()
        if on_step:
            on_step(optimizer)

    def _count_update(self) -> None:
        self._skipped.clear()
        self.num_outcomes += 1
        self.updated = True
        on_update = self._on_update and self._on_update()
        if on_update:
            on_update()

    def _holds(self, optimizer: Any) -> bool:
        """Whether an optimizer holds one of the parameters. Groups may be changed in place; a scaler steps whatever has
        a `step`.
        """
        groups = getattr(optimizer, "param_groups", ())
        return any(id(parameter) in self._own for group in groups for parameter in group["params"])


def leave(handles: Iterable[Any]) -> None:
    """What watched optimizers is no more."""
    for handle in handles:
        handle.remove()
    leave_scalers()
    unhear_steps()


def has_skipped(optimizer: Any) -> bool:
    """Whether a fused optimizer skips, in the step that it is in, since its GradScaler found infinite gradients."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
