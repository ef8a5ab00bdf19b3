"""Where an optimizer step ends, seen at the optimizer: the same for every kind of gradient accumulation."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ..adapters.layers import Layer
from ..runtime.part import Part

__all__ = ["Boundary", "has_skipped"]


class Boundary(Part):
    """Notices when an optimizer of PyTorch's kind has updated the layers since the step began.

    Micro-batches without an update and steps that a GradScaler skips are no optimizer steps. It calls fused optimizers
    all the same, which skip by themselves: their flag is read then, which waits for the device.

    Args:
        layers: an optimizer counts that holds a parameter of one of them.
        on_update: called after each update, while the gradients are still there.
        on_step: called with the optimizer after that.
    """

    def __init__(
        self, layers: Sequence[Layer], on_update: Callable[[], None], on_step: Callable[[Optimizer], None]
    ) -> None:
        self.updated = False
        """Whether an optimizer has updated the layers since the step began."""
        self.skipped = False
        """Whether a fused optimizer has skipped its last update."""
        self._own = {id(parameter) for layer in layers for parameter in layer.parameters}
        self._known: weakref.WeakKeyDictionary[Optimizer, bool] = weakref.WeakKeyDictionary()
        notice = weakref.WeakMethod(self._notice)
        self._on_update = weakref.WeakMethod(on_update)  # type: ignore[arg-type]
        self._on_step = weakref.WeakMethod(on_step)
        handle = register_optimizer_step_post_hook(lambda optimizer, *_: (alive := notice()) and alive(optimizer))
        self._remove = weakref.finalize(self, handle.remove)

    def begin(self, active: Collection[int], step: int) -> None:
        """Nothing has been updated in this step."""
        self.updated = False

    def close(self) -> None:
        """Watch optimizers no more."""
        self._remove()

    def _notice(self, optimizer: Any) -> None:
        if optimizer not in self._known:
            held = (id(parameter) for group in optimizer.param_groups for parameter in group["params"])
            self._known[optimizer] = any(map(self._own.__contains__, held))
        if self._known[optimizer]:
            self.skipped = has_skipped(optimizer)
            if self.skipped:
                return
            self.updated = True
            on_update = self._on_update()
            if on_update is not None:
                on_update()
            on_step = self._on_step()
            if on_step is not None:
                on_step(optimizer)


def has_skipped(optimizer: Any) -> bool:
    """Whether a fused optimizer skips, in the step that it is in, since its GradScaler found infinite gradients."""
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)
