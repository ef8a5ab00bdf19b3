"""LIFT: a window of neighbouring layers trains for a period, then the next one, in an order that never learns.

Zhu et al., "LIFT: Efficient Layer-wise Fine-tuning for Large Model Models" (2023): one layer at a time, from the front
(the layer nearest the input) to the end, from the end to the front, or in random order.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from ...config import ISTConfig, Trains, check_choice
from ...runtime.randomness import keyed_generator
from ..selectors.base import Unlearned

__all__ = ["LIFT_ORDERS", "LiftSelector"]

Order = Literal["front-to-end", "end-to-front", "random"]
LIFT_ORDERS: tuple[Order, ...] = ("front-to-end", "end-to-front", "random")


class LiftSelector(Unlearned):
    """The next `N_u` layers every `update_interval` steps; after the last of them begins another sweep over all.

    The last window of a sweep is smaller where `N_u` does not divide the layers: each is in one window of a sweep. In
    random order each sweep has an order of its own, and a window's layers are no neighbours.

    Args:
        config: gives the window's size, the period and the seed.
        num_layers: `N_L`.
        order: `front-to-end`, `end-to-front` or `random`.
    """

    trains: Trains = "either"

    def __init__(self, config: ISTConfig, num_layers: int, order: Order) -> None:
        check_choice("order", order, LIFT_ORDERS)
        self._config = config
        self._order = order
        self._counts = config.layer_counts(num_layers)

    def choose(self, step: int) -> tuple[int, ...]:
        """The window of the period that a step lies in."""
        size, total = self._counts.active, self._counts.total
        sweep, window = divmod(step // self._config.update_interval, -(-total // size))
        return tuple(sorted(self._layers_in_order(sweep)[window * size : (window + 1) * size]))

    def state_dict(self) -> dict[str, Any]:
        """The order."""
        return {"order": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that the order is the one that the run began with.

        Raises:
            ValueError: it is another.
        """
        if state["order"] != self._order:
            raise ValueError(
                f"The run began with lift-{state['order']} and would resume with lift-{self._order}: give the former, "
                "or begin a new run from the saved adapter."
            )

    def _layers_in_order(self, sweep: int) -> list[int]:
        """All layers in the order of a sweep."""
        if self._order == "random":
            generator = keyed_generator(self._config.seed, "sweep", sweep)
            return torch.randperm(self._counts.total, generator=generator).tolist()
        layers = list(range(self._counts.total))
        return layers if self._order == "front-to-end" else layers[::-1]
