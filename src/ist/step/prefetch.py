"""FSDP2's backward gathers no layer below the lowest one that trains.

While the backward of one FSDP2 unit runs, the unit before it is gathered. The backward ends at the lowest active layer,
so the layer below that one would be gathered for nothing, which costs a collective and is not safe on GPUs: PyTorch
(read in 2.11 and 2.13) gives the buffer back at the end of the backward and does not wait for the collective that
writes to it, since a `torch.Stream` passes over an event of class `torch.cuda.Event`. The reduction of the gradients
hides that. Where gradients accumulate there is none, the next forward takes the buffer at once, and a late collective
overwrites the weights which that forward gathers. `tests/gpu/test_stream_events.py` shows the call alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..adapters.view import ModelView
from ..runtime.part import Part
from ..runtime.sharding import sharded_units

__all__ = ["BackwardPrefetch", "ending_at"]


class BackwardPrefetch(Part):
    """Takes what the backward does not get to out of what FSDP2 gathers ahead.

    A unit with an empty list gathers the one before it, so the units of the lowest active layer get a list with
    themselves, for which there is nothing to do. Lists that a user gave lose the units before that layer. Where
    something trains there all the same, it is gathered when the backward gets to it.

    Args:
        view: the model in training.
    """

    def __init__(self, view: ModelView) -> None:
        self._states = states_in(view.model) if view.sharded else []
        self._in_layers = {layer.index: states_in(layer.module) for layer in view.layers} if view.sharded else {}
        self._given: list[tuple[Any, list[Any]]] = []
        """Units whose lists were changed, and what these were."""
        self._restore = weakref.finalize(self, restore_all, self._given)

    def begin(self, active: Collection[int], step: int) -> None:
        """Until the end of the step gather nothing before the lowest of the layers `active`."""
        restore_all(self._given)
        last = self._in_layers.get(min(active)) if active else None
        self._given += end_at(self._states, last)

    def end(self) -> None:
        """Gather ahead as without IST."""
        restore_all(self._given)

    def close(self) -> None:
        """Leave the model as it was."""
        self._restore()


@contextmanager
def ending_at(model: nn.Module, block: nn.Module) -> Iterator[None]:
    """Within the context FSDP2 gathers nothing ahead that comes before a block of the model."""
    given = end_at(states_in(model), states_in(block))
    try:
        yield
    finally:
        restore_all(given)


def end_at(states: list[Any], last: list[Any] | None) -> list[tuple[Any, list[Any]]]:
    """Have the units `last` be the last ones of `states` that are gathered ahead.

    Returns:
        Units whose lists were changed, and what these were.
    """
    if not last:
        return []
    before = set(map(id, states[: states.index(last[0])]))
    changed = []
    for state in states:
        given = state._states_to_backward_prefetch
        kept = [other for other in given if id(other) not in before]
        if len(kept) < len(given) or (not given and state in last):
            changed.append((state, given))
            state._states_to_backward_prefetch = kept or [state]
    return changed


def states_in(module: nn.Module) -> list[Any]:
    """What FSDP2 keeps of each unit in a module, each once: modules may share one."""
    units: list[Any] = sharded_units(module)
    states = [unit._get_fsdp_state() for unit in units]
    return list({id(state): state for state in states}.values())


def restore_all(given: list[tuple[Any, list[Any]]]) -> None:
    """Give units their lists back."""
    for state, states in given:
        state._states_to_backward_prefetch = states
    given.clear()
