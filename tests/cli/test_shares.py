"""Rows that the ranks answer together: each answers its share, and all know every mark."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from ist.cli.train.shares import marks_of
from ist.runtime.distributed import Ranks, current_ranks


class Together(Ranks):
    """A rank whose exchange adds what another one has found."""

    def __init__(self, rank: int, others: list[float]) -> None:
        self.rank, self.size, self.others = rank, 2, others

    def mean(self, values: Any) -> list[float]:
        """Of two ranks."""
        return [(one + other) / 2 for one, other in zip(values, self.others, strict=True)]


@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_answers_its_share(rank: int) -> None:
    rows, asked = [1.0, 2.0, 3.0, 4.0, 5.0], []

    def mark(own: list[float]) -> list[float]:
        asked.extend(own)
        return [10 * row for row in own]

    others = [0.0 if index % 2 == rank else 10 * row for index, row in enumerate(rows)]
    assert marks_of(nn.Linear(1, 1), rows, Together(rank, others), mark) == [10.0, 20.0, 30.0, 40.0, 50.0]
    assert asked == rows[rank::2]


def test_a_rank_without_rows_answers_none() -> None:
    assert marks_of(nn.Linear(1, 1), [1.0], Together(1, [7.0]), lambda rows: pytest.fail("asked")) == [7.0]


def test_one_process_answers_all() -> None:
    assert marks_of(nn.Linear(1, 1), [2, 3], current_ranks(), lambda rows: [row == 2 for row in rows]) == [1.0, 0.0]
