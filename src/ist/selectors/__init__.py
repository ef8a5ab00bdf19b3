"""Who chooses the layers of a step: `ist` (the paper's) and the baselines, by name."""

from __future__ import annotations

from ..config import check_choice
from .base import ImportanceUpdate, Measure, Selector, SelectorFactory, what_trains
from .every import EverySelector, FullSelector
from .fixed import FixedSelector
from .learned import LearnedSelector
from .lisa import LisaSelector
from .random_sets import RandomSelector

__all__ = [
    "SELECTORS",
    "EverySelector",
    "FixedSelector",
    "FullSelector",
    "ImportanceUpdate",
    "LearnedSelector",
    "LisaSelector",
    "Measure",
    "RandomSelector",
    "Selector",
    "SelectorFactory",
    "selector_factory",
    "what_trains",
]

SELECTORS: dict[str, SelectorFactory] = {
    "ist": LearnedSelector,
    "random": RandomSelector,
    "lisa": LisaSelector,
    "all": EverySelector,
    "full": FullSelector,
}
"""Selectors that need nothing but a configuration and the number of layers."""


def selector_factory(selector: str | SelectorFactory) -> SelectorFactory:
    """The factory of that name, or the factory itself.

    Raises:
        ValueError: there is no selector of that name.
    """
    if isinstance(selector, str):
        check_choice("selector", selector, SELECTORS)
        return SELECTORS[selector]
    return selector
