"""Focused training: measure which layers matter before training, and give the adapters to those alone.

A set of layers that stays, spread over the depth, chosen by importance, with the rank of all layers moved to it, learns
in short trainings about as much as adapters in every layer, in less time and memory. What comes out is a plain PEFT
configuration.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from logging import getLogger
from typing import Any, get_args

from torch import nn

from .adapters.narrowed import Rank, write_config
from .adapters.outline import Outline, adapted_modules, outline
from .config import (
    check_choice,
    check_layer_number,
    check_whole,
    keywords_of,
    plain,
    unknown_keywords,
    with_checked_keywords,
)
from .method.ranks import SCALING_EXPONENTS
from .method.spreading import SPREADS, Spread, choose_layers, default_num_layers, lowest_layer
from .probing.criteria import Criterion, check_measurement, scores_of
from .probing.initialisation import gradient_init
from .probing.suppression import LossFunction

__all__ = ["Focus", "Rank", "find_focus", "focus", "gradient_init"]

logger = getLogger(__name__)


@dataclass(frozen=True)
class Focus:
    """What a look at the data has found, and the configuration that follows from it."""

    config: Any
    """A plain PEFT configuration for `get_peft_model`."""
    layers: tuple[int, ...]
    """The layers that get adapters, as indices of `names`."""
    names: tuple[str, ...]
    """All layers of the model that could have them."""
    scores: tuple[float, ...] | None
    """The importance of each; None for an even spread."""
    ranks: dict[str, int]
    """The rank of each adapted module of these layers by name; empty for kinds without one."""
    num_parameters: int
    """Trainable parameters of the layers' adapters now,"""
    num_parameters_before: int
    """and with the configuration that was given."""
    seconds: float
    """What finding out has taken."""


def focus(
    model: nn.Module, peft_config: Any, batches: Iterable[Mapping[str, Any]] | None = None, **options: Any
) -> Any:
    """The configuration that puts adapters on the layers that matter, and on no others.

    ::

        config = focus(model, LoraConfig(r=32, target_modules="all-linear"), loader)
        model = get_peft_model(model, config)

    The depth is split into `num_layers` equal parts, and the layer with the largest score of each is taken. By default
    the ranks grow so that as many parameters train as with adapters in all layers. What is returned is plain PEFT: any
    trainer and any server takes it. `SparseTuner(model, selector="all")` or `IST(selector="all")` makes its steps
    cheaper.

    Args:
        model: the base model, before adapters; it is left as it was.
        peft_config: what you would train all layers with. It is not changed.
        batches: batches of the training data, such as its DataLoader. Not needed with `scores` or `spread="even"`.
        options: those of `find_focus`.

    Returns:
        A configuration of the same class.

    Raises:
        ValueError: an argument is outside what is allowed, or the model and the configuration do not fit.
        TypeError: an argument is unknown.
    """
    if message := unknown_keywords("focus", options, keywords_of(find_focus)):
        raise TypeError(message)
    return find_focus(model, peft_config, batches, **options).config


@with_checked_keywords
def find_focus(
    model: nn.Module,
    peft_config: Any,
    batches: Iterable[Mapping[str, Any]] | None = None,
    *,
    num_layers: int | float | None = None,
    rank: Rank = "moved",
    scaling: str = "sqrt",
    criterion: Criterion = "gradient",
    spread: Spread = "parts",
    min_depth: float = 0.0,
    scores: Sequence[float] | None = None,
    num_batches: int = 4,
    layers: str | Sequence[str] | None = None,
    loss_function: LossFunction | None = None,
    seed: int = 0,
) -> Focus:
    """As `focus`, with everything that was found.

    Args:
        model: the base model.
        peft_config: what you would train all layers with.
        batches: batches of the training data.
        num_layers: how many layers get adapters, as a count or as a fraction; half of them where None.
        rank: `moved` raises the ranks so that as many parameters train as before (a rank stops at the smaller side of
            its module, and the others take what is left over); `kept` keeps them; `uneven` moves them and gives
            layers with larger scores more; a number is the rank of all.
        scaling: how the factor on a response follows its rank: `sqrt` divides it by the root of the rank's growth,
            which is meant to keep the best learning rate near that of the given rank; `same` keeps it; `inverse`
            divides it by the growth, that is, keeps alpha.
        criterion: what is measured, see `ist.probing.criteria.CRITERIA`.
        spread: `parts`, `distance`, `even` or `anywhere`, see `ist.method.spreading`.
        min_depth: the lowest part of the depth that gets no adapters, as a fraction; the backward ends above it.
        scores: the importance of each layer, where it is known already.
        num_batches: how many batches are read at most.
        layers: the stack of blocks, where the model has several: see `discover_layers`.
        loss_function: `(model, batch) -> loss` in nats; `model(**batch).loss` if None.
        seed: of the probe.

    Raises:
        ValueError: as `focus`.
        TypeError: an argument is unknown.
    """
    start = time.perf_counter()
    check_look(rank, scaling, spread)
    check_measurement(criterion, num_batches, loss_function, seed)
    full = outline(model, peft_config, layers)
    num = resolve_num_layers(num_layers, len(full.layers))
    lowest = lowest_layer(min_depth, len(full.layers), num)
    if scores is None and spread != "even":
        if batches is None:
            raise ValueError("batches are needed to measure importance: give some, or scores, or spread='even'.")
        scores = scores_of(model, full, peft_config, batches, criterion, num_batches, loss_function, seed)
    known = [0.0] * len(full.layers) if scores is None else numbers_of(scores, len(full.layers))
    kept = choose_layers(known, num, spread, lowest=lowest)
    config = write_config(model, peft_config, full, kept, rank, scaling, known)
    found = focus_of(model, config, full, kept, None if scores is None else tuple(known), start)
    logger.info(describe(found))
    return found


def focus_of(
    model: nn.Module, config: Any, full: Outline, kept: tuple[int, ...], scores: tuple[float, ...] | None, start: float
) -> Focus:
    """What was found, with the adapters that `config` makes; `start` is when the search began."""
    own = {module.name for module in full.modules if module.layer in kept}
    after = [module for module in adapted_modules(model, config) if module.name in own]
    return Focus(
        config=config,
        layers=kept,
        names=full.layers,
        scores=scores,
        ranks={module.name: module.rank for module in after if module.rank is not None},
        num_parameters=sum(module.num_parameters for module in after),
        num_parameters_before=full.num_parameters,
        seconds=time.perf_counter() - start,
    )


def check_look(rank: Any, scaling: str, spread: str) -> None:
    """Raise ValueError unless the options of a look at the data are what is allowed."""
    if isinstance(rank, str):
        check_choice("rank", rank, get_args(get_args(Rank)[0]))
    else:
        check_whole("rank", rank, at_least=1, why="give a rank, or 'moved', 'kept' or 'uneven'")
    check_choice("scaling", scaling, SCALING_EXPONENTS)
    check_choice("spread", spread, SPREADS)


def numbers_of(scores: Any, num_layers: int) -> list[float]:
    """The scores of the layers as numbers.

    Raises:
        ValueError: they are no sequence of numbers, or not one for each layer.
    """
    unordered = isinstance(scores, (str, bytes, Mapping, Set)) or not isinstance(scores, Iterable)
    given = None if unordered else [plain(score) for score in scores]
    if given is None or not all(isinstance(score, (int, float)) for score in given):
        raise ValueError(
            f"scores is a {type(scores).__name__} and no list of numbers: give one for each of the {num_layers} layers "
            "that get adapters, in the order of the forward pass, as ist.layer_scores returns them."
        )
    if len(given) != num_layers:
        raise ValueError(f"scores has {len(given)} numbers, and {num_layers} layers get adapters: give one each.")
    return [float(score) for score in given]


def resolve_num_layers(num_layers: int | float | None, total: int) -> int:
    """How many of `total` layers to keep."""
    if num_layers is None:
        return default_num_layers(total)
    check_layer_number("num_layers", num_layers)
    if isinstance(num_layers, float):
        return max(1, math.floor(round(num_layers * total, 9) + 0.5))
    if num_layers > total:
        raise ValueError(
            f"num_layers={num_layers} is more than the {total} layers that get adapters: give a count from 1 to "
            f"{total}, or a fraction such as 0.5."
        )
    return int(num_layers)


def describe(found: Focus) -> str:
    """What was chosen, in one line."""
    numbers = [found.names[layer].rpartition(".")[2] for layer in found.layers]
    if len(set(numbers)) < len(numbers):  # of two stacks
        numbers = [found.names[layer] for layer in found.layers]
    ranks = sorted(set(found.ranks.values()))
    size = f", rank {ranks[0]}" if len(ranks) == 1 else f", ranks {ranks[0]} to {ranks[-1]}" if ranks else ""
    return (
        f"Focused on {len(found.layers)} of {len(found.names)} layers ({', '.join(numbers)}){size}: "
        f"{found.num_parameters:,} trainable parameters in their adapters, where all layers had "
        f"{found.num_parameters_before:,}."
    )
