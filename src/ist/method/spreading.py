"""Which layers a focused training keeps: the most important ones, spread over the depth. Pure functions.

The most important layers anywhere tend to be neighbours, so importance chooses within a spread over the depth: the best
layer of each equal part (`parts`), or the best sum of scores with bounds on the distance between
neighbours (`distance`), which cannot take two neighbours across the border of two parts and leave a gap beside them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, get_args

from ..config import check_choice

__all__ = [
    "SPREADS",
    "Spread",
    "best_of_parts",
    "best_with_distance",
    "choose_layers",
    "default_distances",
    "default_num_layers",
    "evenly_spread",
    "lowest_layer",
    "most_important",
]

Spread = Literal["parts", "distance", "even", "anywhere"]
SPREADS: tuple[str, ...] = get_args(Spread)


def default_num_layers(num_layers: int) -> int:
    """How many of a model's layers a focused training keeps where the user does not say: half of them, rounded up."""
    return max(1, math.ceil(num_layers / 2))


def lowest_layer(min_depth: float, num_layers: int, num: int) -> int:
    """The first of a model's layers that may be kept where the lowest part of the depth is left out.

    Args:
        min_depth: this part, from 0 to below 1; rounded to whole layers.
        num_layers: of the model.
        num: how many layers to keep of the others.

    Raises:
        ValueError: it is no such fraction, or leaves fewer than `num` layers.
    """
    if isinstance(min_depth, bool) or not isinstance(min_depth, (int, float)) or not 0 <= min_depth < 1:
        raise ValueError(f"min_depth={min_depth!r} is no fraction of the depth: give 0 (all layers) to below 1.")
    lowest = math.floor(round(min_depth * num_layers, 9) + 0.5)
    if num > num_layers - lowest:
        raise ValueError(
            f"min_depth={min_depth} leaves {num_layers - lowest} of {num_layers} layers, and {num} are to be kept: "
            "lower min_depth or num_layers."
        )
    return lowest


def choose_layers(
    scores: Sequence[float],
    num: int,
    spread: Spread = "parts",
    *,
    lowest: int = 0,
    least_distance: int | None = None,
    largest_distance: int | None = None,
) -> tuple[int, ...]:
    """The layers to keep.

    Args:
        scores: importance of each layer in the order of the forward pass; finite, larger is more important. With
            `spread="even"` only their number matters.
        num: how many layers to keep, 1 to the number of layers.
        spread: `parts`, `distance`, `even` or `anywhere`, see the functions below.
        lowest: the first layer that may be kept; the set is spread over it and those above.
        least_distance: of neighbours, for `distance`; see `default_distances` for None.
        largest_distance: likewise.

    Returns:
        `num` indices in ascending order. Of equal scores the lower index is taken.

    Raises:
        ValueError: an argument is outside what is allowed, or no set satisfies the distances.
    """
    check_choice("spread", spread, SPREADS)
    if isinstance(num, bool) or not isinstance(num, int) or not 1 <= num <= len(scores):
        raise ValueError(f"num_layers={num!r} is not a whole number from 1 to {len(scores)}, the number of layers.")
    if lowest:
        above = choose_layers(
            scores[lowest:], num, spread, least_distance=least_distance, largest_distance=largest_distance
        )
        return tuple(lowest + index for index in above)
    if spread != "distance" and (least_distance is not None or largest_distance is not None):
        raise ValueError(f"least_distance and largest_distance have no effect with spread={spread!r}: leave them out.")
    if spread == "even":
        return evenly_spread(len(scores), num)
    broken = [index for index, score in enumerate(scores) if not math.isfinite(score)]
    if broken:
        raise ValueError(f"The score of layer {broken[0]} is {scores[broken[0]]}: scores must be finite numbers.")
    if spread == "anywhere":
        return most_important(scores, num)
    if spread == "parts":
        return best_of_parts(scores, num)
    least, largest = default_distances(len(scores), num)
    return best_with_distance(
        scores,
        num,
        least if least_distance is None else least_distance,
        largest if largest_distance is None else largest_distance,
    )


def evenly_spread(num_layers: int, num: int) -> tuple[int, ...]:
    """The middle of each of `num` equal parts of the depth; no importance."""
    return tuple((2 * part + 1) * num_layers // (2 * num) for part in range(num))


def most_important(scores: Sequence[float], num: int) -> tuple[int, ...]:
    """The `num` largest scores wherever they stand, as Aletheia (arXiv 2604.15351) chooses."""
    return tuple(sorted(sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:num]))


def best_of_parts(scores: Sequence[float], num: int) -> tuple[int, ...]:
    """The largest score of each of `num` parts of the depth, whose lengths differ by at most 1."""
    borders = [part * len(scores) // num for part in range(num + 1)]
    parts = (range(start, end) for start, end in itertools.pairwise(borders))
    return tuple(max(part, key=lambda index: (scores[index], -index)) for part in parts)


def default_distances(num_layers: int, num: int) -> tuple[int, int]:
    """The least and the largest distance of neighbours for `distance`: half of and one and a half times a part.

    A part has `num_layers / num` layers. Both are rounded so that an even spread always satisfies them.
    """
    part = num_layers / num
    return math.ceil(part / 2), max(math.ceil(part), math.floor(1.5 * part))


def best_with_distance(scores: Sequence[float], num: int, least: int, largest: int) -> tuple[int, ...]:
    """The `num` layers `l_1 < … < l_num` with the largest sum of scores, `least <= l_{k+1} - l_k <= largest`.

    The largest distance holds at the ends too: the first layer is below `largest`, and less than that many follow the
    last. An exact dynamic programme: `best_k(j) = s_j + max_{least <= j-i <= largest} best_{k-1}(i)`.

    Raises:
        ValueError: no set of that many layers satisfies the distances.
    """
    total = len(scores)
    if not 1 <= least <= largest:
        raise ValueError(f"least_distance={least} and largest_distance={largest}: 1 <= least <= largest is needed.")
    nothing = -math.inf
    best = [score if index < largest else nothing for index, score in enumerate(scores)]
    before: list[list[int]] = []
    for _ in range(num - 1):
        came_from, now = [-1] * total, [nothing] * total
        for index in range(total):
            earlier = range(max(0, index - largest), index - least + 1)
            source = max(earlier, key=lambda i: (best[i], -i), default=-1)
            if source >= 0 and best[source] > nothing:
                came_from[index], now[index] = source, best[source] + scores[index]
        before.append(came_from)
        best = now
    ends = [index for index in range(max(0, total - largest), total) if best[index] > nothing]
    if not ends:
        raise ValueError(
            f"No {num} of {total} layers have neighbours {least} to {largest} apart and no longer gap at the ends: "
            f"least_distance={default_distances(total, num)[0]} and "
            f"largest_distance={default_distances(total, num)[1]} are the default."
        )
    chosen = [max(ends, key=lambda i: (best[i], -i))]
    for came_from in reversed(before):
        chosen.append(came_from[chosen[-1]])
    return tuple(reversed(chosen))
