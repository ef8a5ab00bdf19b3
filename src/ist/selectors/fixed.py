"""The same layers at every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..config import ISTConfig
from ..whole_layers import Trains
from .base import Unlearned

__all__ = ["FixedSelector"]


class FixedSelector(Unlearned):
    """The same layers at every step.

    Args:
        config: not used but for its place in the interface.
        num_layers: `N_L`.
        layers: their indices.

    Raises:
        ValueError: no layer is given, or an index is not that of a layer.
    """

    trains: Trains = "either"

    def __init__(self, config: ISTConfig, num_layers: int, layers: Sequence[int]) -> None:
        given = list(layers) if isinstance(layers, (list, tuple, range)) else []
        if not given or any(not isinstance(index, int) or not 0 <= index < num_layers for index in given):
            raise ValueError(
                f"layers={given or layers!r} is not a set of layers of this model: give one or more indices from 0 to "
                f"{num_layers - 1}."
            )
        self._layers = tuple(sorted(set(given)))

    def choose(self, step: int) -> tuple[int, ...]:
        """The given layers."""
        return self._layers

    def state_dict(self) -> dict[str, Any]:
        """The layers."""
        return {"layers": list(self._layers)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the layers are those that the run began with.

        Raises:
            ValueError: they are others.
        """
        if list(state["layers"]) != list(self._layers):
            raise ValueError(
                f"The run began with the layers {state['layers']} and would go on with {list(self._layers)}: give the "
                "former ones, or begin a new run from the saved adapter."
            )
