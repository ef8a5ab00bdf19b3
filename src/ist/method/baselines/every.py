"""Every layer at every step: the PEFT method alone, or full fine-tuning, through the same loop as all others."""

from __future__ import annotations

from ...config import ISTConfig, Trains
from ..selectors.base import Unlearned

__all__ = ["EverySelector", "FullSelector"]


class EverySelector(Unlearned):
    """All layers: vanilla PEFT where the model has adapters, else full fine-tuning."""

    trains: Trains = "either"
    least_layers = 1
    """It chooses nothing, so one layer is enough, as of a focused training."""

    def __init__(self, config: ISTConfig, num_layers: int) -> None:
        self._all = tuple(range(num_layers))

    def choose(self, step: int) -> tuple[int, ...]:
        """All of them."""
        return self._all


class FullSelector(EverySelector):
    """Full fine-tuning: all weights of a model without adapters."""

    trains: Trains = "whole layers"
