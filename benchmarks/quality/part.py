"""The part of some plans that one call runs, so that two calls on two GPUs have no training in common."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Part", "read_share"]


@dataclass(frozen=True)
class Part:
    """Some of all trainings. What is timed, and what measures importance, is of the first seed of the first plan."""

    seeds: frozenset[int] | None = None
    """These alone; None is all."""
    share: tuple[int, int] = (1, 1)
    """Which of how many shares: of the tasks, methods and seeds of all plans, in their order, every so-many-th. All
    learning rates of a task, method and seed are of one share."""

    def of(self, trainings: Iterable[Mapping[str, Any]], plans: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Those trainings of the plans that are of this part, whatever is done already."""
        number, shares = self.share
        first = next(iter(plans[0].get("seeds", [0]))) if plans else 0
        places: dict[tuple[str, str, int], int] = {}
        for plan in plans:
            for seed in plan.get("seeds", [0]):
                for task in plan["tasks"]:
                    for method in plan["methods"]:
                        places.setdefault((task, method, seed), len(places))
        found = []
        for training in trainings:
            seed = training["seed"] if training["kind"] == "training" else first
            place = places.get((training["task"], training["method"], seed), 0)
            if (self.seeds is None or seed in self.seeds) and place % shares == number - 1:
                found.append(training)
        return found


def read_share(text: str) -> tuple[int, int]:
    """`1/2` is the first of two shares.

    Raises:
        ValueError: there is no such share.
    """
    number, _, shares = text.partition("/")
    if not (number.isdecimal() and shares.isdecimal() and 1 <= int(number) <= int(shares)):
        raise ValueError(f"--share {text!r} is no share: 1/2 is the first of two, 2/2 the second.")
    return int(number), int(shares)
