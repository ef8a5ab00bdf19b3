"""LoRA-FA's optimizer under sparse tuning.

LoRA-FA (Zhang et al., 2023) leaves A as it was drawn and corrects the gradient of B by it, so its optimizer takes the
two as a pair. PEFT's passes parameters without a gradient by, but not pairs: a frozen layer would end the step with a
TypeError.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from ..runtime.part import Part

__all__ = ["FrozenPairs"]

Hidden = tuple[dict[str, Any], dict[str, Any]]
"""A group of an optimizer, and lists of it as they were."""


class FrozenPairs(Part):
    """Hides the pairs of frozen layers from LoRA-FA's optimizer while it steps; their moments stay where they are.

    Args:
        optimizer: PEFT's `LoraFAOptimizer`; it is as before after `close`, and without this object.
        frozen: gives the ids of the parameters of frozen layers.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, frozen: Callable[[], Collection[int]]) -> None:
        self._idle = frozen
        self._hidden: list[Hidden] = []
        hide, show = weakref.WeakMethod(self._hide), weakref.WeakMethod(self._show)
        handles = (
            optimizer.register_step_pre_hook(lambda stepped, *_: (alive := hide()) and alive(stepped)),
            optimizer.register_step_post_hook(lambda *_: (alive := show()) and alive()),
        )
        self._remove = weakref.finalize(self, leave, handles, self._hidden)

    def close(self) -> None:
        """Leave the optimizer as PEFT made it."""
        self._remove()

    def _hide(self, optimizer: torch.optim.Optimizer) -> None:
        """Before a step: take out of each group the pairs with a parameter of a frozen layer."""
        self._show()
        frozen = self._idle()
        for group in optimizer.param_groups:
            names = group["names"]
            hidden = {pair_name(n) for n, p in zip(names, group["params"], strict=True) if id(p) in frozen}
            keep = [position for position, name in enumerate(names) if pair_name(name) not in hidden]
            lists = [key for key, value in group.items() if isinstance(value, list) and len(value) == len(names)]
            self._hidden.append((group, {key: group[key] for key in lists}))
            for key in lists:
                group[key] = [group[key][position] for position in keep]

    def _show(self) -> None:
        """After a step, or before the next where one raised: the very same lists come back."""
        show_all(self._hidden)


def show_all(hidden: list[Hidden]) -> None:
    """Give groups their lists back."""
    for group, lists in hidden:
        group.update(lists)
    hidden.clear()


def leave(handles: Sequence[Any], hidden: list[Hidden]) -> None:
    """Take the hooks off an optimizer, and give it back what a step that raised has left hidden."""
    show_all(hidden)
    for handle in handles:
        handle.remove()


def pair_name(name: str) -> str:
    """What the names of a pair's two parameters have in common, as the optimizer itself finds it."""
    return name.partition("lora")[0] if "lora" in name else name


def is_lora_fa(optimizer: Any) -> bool:
    """Whether an optimizer is PEFT's for LoRA-FA."""
    from peft.optimizers.lorafa import LoraFAOptimizer

    return isinstance(optimizer, LoraFAOptimizer)
