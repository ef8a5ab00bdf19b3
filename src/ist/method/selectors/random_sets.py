"""Random sparse tuning (RST), the paper's own baseline: another random set of layers at every step."""

from __future__ import annotations

import torch

from ...config import ISTConfig
from ...runtime.randomness import keyed_generator
from ..sampling import sample_cost_aware
from .base import Unlearned

__all__ = ["RandomSelector", "random_set"]


def random_set(config: ISTConfig, num_layers: int, num_active: int, turn: int) -> tuple[int, ...]:
    """A uniformly random set of layers, the same for the same seed and turn.

    It is the very set that the paper's selector draws at step `turn` while all its scores are equal.

    Args:
        config: gives the seed, and the policy and cost exponent of the draw.
        num_layers: `N_L`.
        num_active: how many to draw.
        turn: number of the draw, from 0.
    """
    alike = torch.zeros(num_layers, dtype=torch.float64)
    generator = keyed_generator(config.seed, "active", turn)
    return sample_cost_aware(alike, num_active, generator, str(config.policy), config.cost_exponent)


class RandomSelector(Unlearned):
    """A uniformly random set of `N_u` layers at every step."""

    def __init__(self, config: ISTConfig, num_layers: int) -> None:
        self._config = config
        self._counts = config.layer_counts(num_layers)

    def choose(self, step: int) -> tuple[int, ...]:
        """A uniformly random set."""
        return random_set(self._config, self._counts.total, self._counts.active, step)
