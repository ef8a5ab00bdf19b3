"""What every way of choosing layers has in common, so that a comparison changes one word."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from ...config import ISTConfig, Trains

__all__ = ["ImportanceUpdate", "Measure", "Selector", "SelectorFactory", "Unlearned", "least_layers", "what_trains"]

Measure = Callable[[Sequence[tuple[int, ...]]], "Tensor | None"]
"""Sets of layers that keep their response -> their losses in nats, float64 `[N_c]`; None where there is no batch."""


@dataclass(frozen=True)
class ImportanceUpdate:
    """One turn of the importance loop."""

    candidates: tuple[tuple[int, ...], ...]
    """The layers that kept their response, for each candidate."""
    losses: tuple[float, ...]
    """Loss of each candidate in nats."""
    rewards: tuple[float, ...]
    """Reward of each candidate, eq. 9; empty where the update was skipped."""
    importance: tuple[float, ...]
    """Score of each layer after the update."""
    skipped: str | None = None
    """Why nothing was learned, or None."""

    def state_dict(self) -> dict[str, Any]:
        """The update as plain JSON values."""
        return {
            "candidates": [list(candidate) for candidate in self.candidates],
            "losses": list(self.losses),
            "rewards": list(self.rewards),
            "importance": list(self.importance),
            "skipped": self.skipped,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> ImportanceUpdate:
        """The update that `state_dict` was called on."""
        return cls(
            candidates=tuple(tuple(candidate) for candidate in state["candidates"]),
            losses=tuple(state["losses"]),
            rewards=tuple(state["rewards"]),
            importance=tuple(state["importance"]),
            skipped=state["skipped"],
        )


class Selector(Protocol):
    """Chooses the layers of a step, and may learn from the losses of sets that it asks to be measured."""

    def choose(self, step: int) -> tuple[int, ...]:
        """The layers that the optimizer step number `step` (from 0) trains, in ascending order."""
        ...

    def learn(self, step: int, measure: Measure) -> ImportanceUpdate | None:
        """After `step` optimizer steps: measure and learn where it is time to, else return None."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What has been learned, as plain JSON values."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state_dict` returned."""
        ...


class Unlearned:
    """A selector that measures nothing and learns nothing: its choice follows from the configuration and the step."""

    def learn(self, step: int, measure: Measure) -> ImportanceUpdate | None:
        """Learn nothing."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """Nothing to save."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load."""


SelectorFactory = Callable[[ISTConfig, int], Selector]
"""`(config, number of layers) -> selector`."""


def what_trains(factory: SelectorFactory) -> Trains:
    """What the selectors of a factory train in a layer: its attribute `trains`, or adapters where it has none."""
    return attribute(factory, "trains", "adapters")


def least_layers(factory: SelectorFactory) -> int:
    """With how few layers the selectors of a factory do: its attribute `least_layers`, or the 2 of a choice."""
    return attribute(factory, "least_layers", 2)


def attribute(factory: SelectorFactory, name: str, default: Any) -> Any:
    """What a factory says of its selectors."""
    return getattr(factory.func if isinstance(factory, partial) else factory, name, default)
