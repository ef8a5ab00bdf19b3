"""LISA: a few whole layers drawn anew every period, beside embeddings and head, which train at every step.

Pan et al., "LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning" (2024). LISA's
"importance" is the probability of a draw: 1 for embeddings and head, low and equal for all layers between them.
"""

from __future__ import annotations

from ...config import ISTConfig, Trains
from ..selectors.base import Unlearned
from ..selectors.random_sets import random_set

__all__ = ["LisaSelector"]


class LisaSelector(Unlearned):
    """A uniformly random set of `N_u` whole layers (LISA's γ), drawn anew every `update_interval` steps (LISA's K).

    What is outside of the layers trains at every step, as everywhere. `optimizer_state="reset"` forgets the moments of
    a layer when its period ends.
    """

    trains: Trains = "whole layers"

    def __init__(self, config: ISTConfig, num_layers: int) -> None:
        self._config = config
        self._counts = config.layer_counts(num_layers)

    def choose(self, step: int) -> tuple[int, ...]:
        """The set of the period that a step lies in."""
        period = step // self._config.update_interval
        return random_set(self._config, self._counts.total, self._counts.active, period)
