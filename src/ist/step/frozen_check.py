"""Make sure that an optimizer leaves frozen layers alone.

A frozen layer has no gradient, and optimizers pass such parameters by. Those that treat all parameters as one vector do
not: LBFGS moves each along the directions of earlier steps. Nothing else says so.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..adapters.layers import Layer
from ..adapters.view import ModelView
from ..runtime.part import Part

__all__ = ["FrozenCheck"]


class FrozenCheck(Part):
    """Compares frozen parameters before and after each step of an optimizer of PyTorch's kind.

    Their version counters tell whether they were written to. Hooks and optimizers may write the numbers that were
    there: in the first step, and after one that has written, the numbers themselves are kept and compared. Writes
    through `.data` are not seen.

    Args:
        view: the model in training. Sharded weights are not compared: they may be views into one tensor.
    """

    def __init__(self, view: ModelView) -> None:
        self._layers = () if view.sharded else view.layers
        self._frozen: list[Layer] = []
        self._before: list[int] = []
        self._depth = 0  # An optimizer's step may call that of its base class, whose hooks run within.
        self._suspected = True
        self._numbers: list[list[Tensor]] = []
        note, compare = weakref.WeakMethod(self._note), weakref.WeakMethod(self._compare)
        handles = (
            register_optimizer_step_pre_hook(lambda *_: (alive := note()) and alive()),
            register_optimizer_step_post_hook(lambda optimizer, *_: (alive := compare()) and alive(optimizer)),
        )
        self._remove = weakref.finalize(self, remove_both, handles)

    def begin(self, active: Collection[int], step: int) -> None:
        """All other layers must not move."""
        self._frozen, self._depth = [layer for layer in self._layers if layer.index not in active], 0

    def end(self) -> None:
        """Every layer may move."""
        self._frozen, self._before, self._numbers = [], [], []

    def close(self) -> None:
        """Watch optimizers no more."""
        self._remove()
        self.end()

    def _note(self) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self._before = [version_of(layer) for layer in self._frozen]
        if self._suspected:
            self._numbers = [[p.detach().clone() for p in layer.parameters] for layer in self._frozen]

    def _compare(self, optimizer: Optimizer) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth or len(self._before) != len(self._frozen):  # Or the step began within the optimizer's.
            return
        suspected = self._suspected
        self._suspected = [version_of(layer) for layer in self._frozen] != self._before
        if not (suspected and self._suspected):
            return
        for layer, numbers in zip(self._frozen, self._numbers, strict=True):
            if not all(map(torch.equal, layer.parameters, numbers)):
                raise ValueError(
                    f"{type(optimizer).__name__} has moved the adapters in {layer.name}, which is frozen in this step: "
                    "give an optimizer that leaves parameters without a gradient alone, as AdamW and SGD do, or "
                    "selector='all', which freezes no layer."
                )


def version_of(layer: Layer) -> int:
    """How often the parameters of a layer were written to in place."""
    return sum(parameter._version for parameter in layer.parameters)


def remove_both(handles: tuple[Any, Any]) -> None:
    """Take the hooks off."""
    for handle in handles:
        handle.remove()
