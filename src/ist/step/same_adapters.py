"""A tuner freezes the adapters that were active when it was made. Others that are set active later would train in every
layer, and be measured in their place.
"""

from __future__ import annotations

from collections.abc import Collection

from ..adapters.responses import active_names
from ..adapters.view import ModelView
from ..runtime.part import Part

__all__ = ["SameAdapters"]


class SameAdapters(Part):
    """Makes sure, where a step begins, that the active adapters are still those that the tuner was made for.

    Within a step another adapter may be active for a while, as a reference is.

    Args:
        view: the model in training.
    """

    def __init__(self, view: ModelView) -> None:
        modules = [adapter for layer in view.layers for adapter in layer.adapters.values()]
        self._names = [(module, active_names(module)) for module in modules]

    def begin(self, active: Collection[int], step: int) -> None:
        """A step begins."""
        self.check()

    def check(self) -> None:
        """Raise ValueError where others are active."""
        for module, names in self._names:
            if (now := active_names(module)) != names:
                raise ValueError(
                    f"The active adapter is {listed(now)} and was {listed(names)} when this tuner was made, so that "
                    f"every layer of {listed(now)} would train: call model.set_adapter({listed(names)}) before the "
                    "step, or close this tuner, and make an optimizer and a SparseTuner for the new adapter."
                )

    def close(self) -> None:
        """Let the modules go."""
        self._names = []


def listed(names: list[str] | None) -> str:
    """Names as `set_adapter` takes them."""
    return repr(names[0] if names and len(names) == 1 else names or [])
