"""Who chooses the layers of a step: `ist` (the paper's) and the baselines, by name."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from ..config import ISTConfig, check_choice
from .baselines.every import EverySelector, FullSelector
from .baselines.fixed import FixedFactory, FixedSelector, fixed_layers
from .baselines.lift import LIFT_ORDERS, LiftSelector
from .baselines.lisa import LisaSelector
from .selectors.base import ImportanceUpdate, Measure, Selector, SelectorFactory, least_layers, what_trains
from .selectors.learned import LearnedSelector
from .selectors.random_sets import RandomSelector

__all__ = [
    "SELECTORS",
    "EverySelector",
    "FixedSelector",
    "FullSelector",
    "ImportanceUpdate",
    "LearnedSelector",
    "LiftSelector",
    "LisaSelector",
    "Measure",
    "RandomSelector",
    "Selector",
    "SelectorFactory",
    "fixed_layers",
    "least_layers",
    "make_selector",
    "selector_factory",
    "what_trains",
]

SELECTORS: dict[str, SelectorFactory] = {
    "ist": LearnedSelector,
    "random": RandomSelector,
    "lisa": LisaSelector,
    **{f"lift-{order}": partial(LiftSelector, order=order) for order in LIFT_ORDERS},
    "all": EverySelector,
    "full": FullSelector,
}
"""Selectors that need nothing but a configuration and the number of layers. Beside them there is `fixed:LAYERS`."""


METHODS = ("choose", "learn", "state_dict", "load_state_dict")
"""What a selector can do, see `Selector`."""


def selector_factory(selector: str | SelectorFactory) -> SelectorFactory:
    """The factory of that name, or the factory itself.

    Args:
        selector: a name in `SELECTORS`; `fixed:` and what `fixed_layers` takes, as in `fixed:0,3,5`; or a factory.

    Raises:
        ValueError: there is no selector of that name, or it is none of these.
    """
    if not isinstance(selector, str):
        if not callable(selector):
            raise ValueError(
                f"selector={selector!r} chooses nothing: give one of {', '.join(map(repr, SELECTORS))}, "
                "'fixed:LAYERS', or a function (config, number of layers) -> Selector."
            )
        return selector
    name, _, argument = selector.partition(":")
    if name == "fixed":
        return FixedFactory(argument)
    check_choice("selector", selector, (*SELECTORS, "fixed:LAYERS"))
    return SELECTORS[selector]


def make_selector(factory: SelectorFactory, config: ISTConfig, names: Sequence[str]) -> Selector:
    """The selector for a model whose layers have these names.

    Raises:
        ValueError: the configuration does not fit the model, a layer that the selector is given is none of it, or a
            function returned no selector.
    """
    if isinstance(factory, FixedFactory):
        return factory.with_names(config, names)
    selector = factory(config, len(names))
    if missing := [name for name in METHODS if not callable(getattr(selector, name, None))]:
        raise ValueError(
            f"The selector's function returned {shown_kind(selector)}, which has no {missing[0]}(): return an object "
            f"with {', '.join(METHODS)}, such as RandomSelector(config, num_layers)."
        )
    return selector


def shown_kind(value: object) -> str:
    """A value's type in words, `nothing` for None."""
    return "nothing" if value is None else f"a {type(value).__name__}"
