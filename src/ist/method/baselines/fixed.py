"""The same layers at every step: named, drawn once, or the most or least important ones of a file of scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...config import ISTConfig, Trains
from ...runs.scores import extreme_layers, read_scores
from ...runtime.randomness import keyed_generator
from ..selectors.base import Unlearned

__all__ = ["FIXED_FORMS", "FixedFactory", "FixedSelector", "fixed_layers"]

FIXED_FORMS = "indices (0,3,5), names of blocks (layers.0,layers.3), random, top:FILE or bottom:FILE"


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
                f"The run began with the layers {state['layers']} and would resume with {list(self._layers)}: give the "
                "former ones, or begin a new run from the saved adapter."
            )


def fixed_layers(text: str, config: ISTConfig, names: Sequence[str]) -> tuple[int, ...]:
    """The layers that a text means.

    Args:
        text: indices or names of blocks (or ends of names) with commas between them; `random`, for `N_u` layers drawn
            once; `top:FILE` or `bottom:FILE`, for the `N_u` most or least important ones by the scores in a file (see
            `ist.runs.scores.read_scores`).
        config: gives `N_u` and the seed.
        names: of all layers.

    Raises:
        ValueError: the text means no layer of this model.
    """
    form, _, file = text.partition(":")
    if text == "random":
        generator = keyed_generator(config.seed, "fixed", 0)
        order = torch.randperm(len(names), generator=generator).tolist()
        return tuple(sorted(order[: config.layer_counts(len(names)).active]))
    if form in ("top", "bottom") and file:
        scores = read_scores(file, names)
        return extreme_layers(scores, config.layer_counts(len(names)).active, most=form == "top")
    given = [part.strip() for part in text.split(",") if part.strip()]
    if not given:
        raise ValueError(f"The fixed layers {text!r} name no layer: give {FIXED_FORMS}.")
    return tuple(sorted({named_layer(part, names) for part in given}))


def named_layer(part: str, names: Sequence[str]) -> int:
    """The layer of one index or name.

    Raises:
        ValueError: there is none, or a name is that of several.
    """
    if part.isdecimal() and int(part) < len(names):
        return int(part)
    found = [index for index, name in enumerate(names) if name == part or name.endswith(f".{part}")]
    if part.isdecimal() or len(found) != 1:
        raise ValueError(
            f"The fixed layer {part!r} is {'no layer' if part.isdecimal() or not found else 'not one layer'} of this "
            f"model, whose layers are 0 ({names[0]}) to {len(names) - 1} ({names[-1]}): give {FIXED_FORMS}."
        )
    return found[0]


class FixedFactory:
    """Makes the selector of the layers that a text means, see `fixed_layers`."""

    trains: Trains = "either"

    def __init__(self, text: str) -> None:
        if not text:
            raise ValueError(f"selector='fixed' needs layers, as in 'fixed:0,3,5': after the colon come {FIXED_FORMS}.")
        self._text = text

    def __call__(self, config: ISTConfig, num_layers: int) -> FixedSelector:
        """The selector for a model of which the number of layers alone is known."""
        return self.with_names(config, [str(index) for index in range(num_layers)])

    def with_names(self, config: ISTConfig, names: Sequence[str]) -> FixedSelector:
        """The selector for a model whose layers have these names."""
        return FixedSelector(config, len(names), fixed_layers(self._text, config, names))
