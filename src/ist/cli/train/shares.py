"""Rows that are answered on all ranks: each takes its share, and all have every mark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...runtime.distributed import Ranks
from ...runtime.sharding import is_sharded

__all__ = ["marks_of"]


def marks_of(
    model: Any, rows: Sequence[Any], ranks: Ranks, mark: Callable[[list[Any]], Sequence[float]]
) -> list[float]:
    """The mark of each row, the same on every rank. A collective.

    Args:
        model: that answers. Each rank answers its share of the rows, or all of them together where each holds a part
            of the weights.
        rows: the same on every rank.
        ranks: the processes.
        mark: the marks of some of the rows, in their order; not called without rows.
    """
    shared = not is_sharded(model)
    own = range(ranks.rank, len(rows), ranks.size) if shared else range(len(rows))
    marks = [0.0] * len(rows)
    found = mark([rows[index] for index in own]) if own else ()
    for index, value in zip(own, found, strict=True):
        marks[index] = float(value)
    return [value * (ranks.size if shared else 1) for value in ranks.mean(marks)]
