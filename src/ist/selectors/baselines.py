"""Choosers to compare the paper's with. They measure nothing and learn nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..config import ISTConfig
from ..sampling import keyed_generator, sample_affordable
from .base import ImportanceUpdate, Measure

__all__ = ["FixedSelector", "RandomSelector"]


class RandomSelector:
    """Random sparse tuning (RST): a uniformly random set of `N_u` layers at every step.

    It draws the very sets that the paper's chooser draws while all its scores are equal.
    """

    def __init__(self, config: ISTConfig, num_layers: int) -> None:
        self._config = config
        self._counts = config.layer_counts(num_layers)

    def choose(self, step: int) -> tuple[int, ...]:
        """A uniformly random set."""
        alike = torch.zeros(self._counts.total, dtype=torch.float64)
        generator = keyed_generator(self._config.seed, "active", step)
        config = self._config
        return sample_affordable(alike, self._counts.active, generator, str(config.policy), config.price)

    def learn(self, step: int, measure: Measure) -> ImportanceUpdate | None:
        """Learn nothing."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


class FixedSelector:
    """The same layers at every step.

    Args:
        config: not used but for its place in the interface.
        num_layers: `N_L`.
        layers: their indices.

    Raises:
        ValueError: no layer is given, or an index is not that of a layer.
    """

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

    def learn(self, step: int, measure: Measure) -> ImportanceUpdate | None:
        """Learn nothing."""
        return None

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
