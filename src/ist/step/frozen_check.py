"""Make sure that an optimizer leaves frozen layers alone.

A frozen layer has no gradient, and optimizers pass such parameters by. Those that treat all parameters as one vector do
not: LBFGS moves each along the directions of earlier steps. Nothing else says so.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..adapters.layers import Layer
from ..adapters.view import ModelView
from ..runtime.part import Part

__all__ = ["FrozenCheck"]


VERSION = attrgetter("_version")
SAMPLE_INTERVAL = 10
"""Steps from one sample to the next; before this one, all."""
SAMPLE_SIZE = 64
"""Numbers of a tensor, about."""


class FrozenCheck(Part):
    """Compares frozen parameters before and after each step of an optimizer of PyTorch's kind.

    Their version counters tell whether they were written to. Hooks and optimizers may write the numbers that were
    there: in the first step, and after one that has written, the numbers themselves are kept and compared.

    Writes through `.data`, as of optimizers in 8 bit, count nowhere. So some numbers of one tensor of every frozen
    layer are compared as well, of another tensor each time, in the first steps and then in every tenth. An optimizer
    that moves frozen layers moves all of them, or those that have trained before, and soon one that is looked at.

    On a CPU with 10,000 small tensors in 100 layers the counters take about 1 ms a step, and a step with samples
    another 1 ms; on a GPU each frozen layer's sample is waited for.

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
        self._step = 0
        self._samples: list[Tensor] = []
        note, compare = weakref.WeakMethod(self._note), weakref.WeakMethod(self._compare)
        handles = (
            register_optimizer_step_pre_hook(lambda *_: (alive := note()) and alive()),
            register_optimizer_step_post_hook(lambda optimizer, *_: (alive := compare()) and alive(optimizer)),
        )
        self._remove = weakref.finalize(self, remove_both, handles)

    def begin(self, active: Collection[int], step: int) -> None:
        """All other layers must not move."""
        self._frozen, self._depth = [layer for layer in self._layers if layer.index not in active], 0
        self._step = step

    def end(self) -> None:
        """Every layer may move."""
        self._frozen, self._before, self._numbers, self._samples = [], [], [], []

    def close(self) -> None:
        """Watch optimizers no more."""
        self._remove()
        self.end()

    def _note(self) -> None:
        self._depth += 1
        if self._depth > 1:
            return
        self._before = [version_of(layer) for layer in self._frozen]
        sampled = self._step < SAMPLE_INTERVAL or self._step % SAMPLE_INTERVAL == 0
        self._samples = [sample_of(layer, self._step).clone() for layer in self._frozen] if sampled else []
        if self._suspected:
            self._numbers = [[p.detach().clone() for p in layer.parameters] for layer in self._frozen]

    def _compare(self, optimizer: Optimizer) -> None:
        self._depth = max(0, self._depth - 1)
        if self._depth or len(self._before) != len(self._frozen):  # Or the step began within the optimizer's.
            return
        suspected = self._suspected
        self._suspected = [version_of(layer) for layer in self._frozen] != self._before
        moved = [
            layer
            for layer, before in zip(self._frozen, self._samples, strict=False)
            if not same(sample_of(layer, self._step), before)
        ]
        if suspected and self._suspected:
            both = zip(self._frozen, self._numbers, strict=True)
            moved += [layer for layer, numbers in both if not all(map(same, layer.parameters, numbers))]
        if moved:
            raise ValueError(
                f"{type(optimizer).__name__} has moved the adapters in {moved[0].name}, which is frozen in this step: "
                "give an optimizer that leaves parameters without a gradient alone, as AdamW and SGD do, or "
                "selector='all', which freezes no layer."
            )


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers; NaN is the same as NaN, since what is NaN has not moved."""
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


def version_of(layer: Layer) -> int:
    """How often the parameters of a layer were written to in place."""
    return sum(map(VERSION, layer.parameters))


def sample_of(layer: Layer, step: int) -> Tensor:
    """Some numbers of one of a layer's tensors, of the next one where samples are taken next."""
    turn = step if step < SAMPLE_INTERVAL else step // SAMPLE_INTERVAL
    flat = layer.parameters[turn % len(layer.parameters)].detach().flatten()
    return flat[:: max(1, flat.numel() // SAMPLE_SIZE)]


def remove_both(handles: tuple[Any, Any]) -> None:
    """Take the hooks off."""
    for handle in handles:
        handle.remove()
