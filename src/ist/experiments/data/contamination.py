"""Training rows that are test rows: found, counted and left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

__all__ = ["contaminated_rows", "normalise", "without_contamination"]

Row = TypeVar("Row")


def normalise(text: str) -> str:
    """A text without its white space, in lower case: "A dog ." and "a  dog." are the same."""
    return "".join(text.split()).casefold()


def contaminated_rows(train: Iterable[str], test: Iterable[str]) -> list[int]:
    """The indices of the training questions that are also test questions.

    Args:
        train: questions, or whole prompts if those of the test set are given whole too.
        test: what must not be trained on.
    """
    known = {normalise(text) for text in test}
    return [index for index, text in enumerate(train) if normalise(text) in known]


def without_contamination(
    train: Sequence[Row], test: Iterable[str], text: Callable[[Row], str]
) -> tuple[list[Row], int]:
    """The training rows that are no test rows, and how many were.

    Args:
        train: rows to train on.
        test: the questions or prompts of the test set.
        text: the question or prompt of a training row.
    """
    left_out = set(contaminated_rows(map(text, train), test))
    return [row for index, row in enumerate(train) if index not in left_out], len(left_out)
