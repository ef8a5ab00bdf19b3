"""A tuner freezes the adapters that were active when it was made. Others that are set active later would train in every
layer, and be measured in their place.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from ..adapters.responses import active_names
from ..adapters.view import ModelView
from ..runtime.part import Part

__all__ = ["SameAdapters"]


class SameAdapters(Part):
    """Makes sure, where a step begins or continues, that some of the adapters that the tuner was made for are active,
    and no others. Within a micro-batch any other adapter may be, as a reference is.

    Args:
        view: the model in training.
    """

    def __init__(self, view: ModelView) -> None:
        self._layers = () if view.sharded else view.layers  # FSDP replaces parameters by itself.
        self._modules: list[nn.Module] = [adapter for layer in view.layers for adapter in layer.adapters.values()]
        self._known = [active_names(module) or [] for module in self._modules]
        self._allowed: list[Any] = []
        """What was active at the last check, by module: the same again needs no look at the names."""

    def begin(self, active: Collection[int], step: int) -> None:
        """A step begins."""
        self.check()

    def check(self) -> None:
        """Raise ValueError where others are active, or none any more."""
        found = [vars(module).get("_active_adapter") or active_names(module) for module in self._modules]
        if found == self._allowed:
            return
        for module, known in zip(self._modules, self._known, strict=True):
            if others := [name for name in active_names(module) or [] if name not in known]:
                raise ValueError(
                    f"The active adapter is {listed(others)} and was {listed(known)} when this tuner was made, so that "
                    f"every layer of {listed(others)} would train: call {set_adapter(known)} before the step, or close "
                    "this tuner, and make an optimizer and a SparseTuner for the new adapter."
                )
        if any(self._known) and not any(active_names(module) for module in self._modules):
            known = next(filter(None, self._known))
            raise ValueError(
                f"No adapter is active, and {listed(known)} was when this tuner was made: call {set_adapter(known)}, "
                "or, if it was deleted, close this tuner, and make an optimizer and a SparseTuner for another adapter."
            )
        # Copies: PEFT keeps the list that it was given, which its owner may change.
        self._allowed = [list(names) if isinstance(names, list) else names for names in found]

    def check_parameters(self) -> None:
        """Raise ValueError where a layer has other parameters than those which the tuner freezes."""
        for layer in self._layers:
            present = {id(parameter) for parameter in layer.module.parameters()}
            if any(id(parameter) not in present for parameter in layer.parameters):
                raise ValueError(
                    f"The parameters of {layer.name} were replaced after this tuner was made (an adapter was deleted "
                    "and added again, or loaded with assign=True or low_cpu_mem_usage=True): close this tuner, and "
                    "make another SparseTuner and optimizer for the new ones."
                )

    def close(self) -> None:
        """Let the modules go."""
        self._layers, self._modules, self._known, self._allowed = (), [], [], []


def listed(names: list[str]) -> str:
    """Names as they are given: one alone, several as a list."""
    return repr(names[0] if len(names) == 1 else names)


def set_adapter(names: list[str]) -> str:
    """The call that sets adapters active; a PeftModel's own takes one name alone."""
    return f"model.{'' if len(names) == 1 else 'base_model.'}set_adapter({listed(names)})"
