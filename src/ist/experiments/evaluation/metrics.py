"""How answers to a user's own rows are marked: exact match, label accuracy, or a function of the user's.

Each metric gives a number to a response, given what is expected; the result is their mean.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..data.own_rows import OwnRow
from .extraction import find_label, own_response

__all__ = ["METRICS", "Marker", "Metric", "UserMetric", "make_marker", "metric_identity"]

Metric = Literal["exact_match", "label_accuracy"]
METRICS: tuple[Metric, ...] = get_args(Metric)
MAX_LABELS = 100
"""Different answers of a file that can be its labels."""

Marker = Callable[[OwnRow, str], float]


@dataclass(frozen=True)
class UserMetric:
    """A function of the user's: `f(response, expected)` or `f(response, expected, row)` gives a number."""

    function: Callable[..., Any]
    name: str
    """For messages and for the record."""
    digest: str = ""
    """Of its source, so that answers that another version marked are not taken for its own."""


def metric_identity(metric: Metric, labels: Sequence[str], function: UserMetric | None) -> dict[str, Any]:
    """What the marks depend on, as plain values."""
    if function is not None:
        return {"metric": f"{function.name} {function.digest}".strip()}
    return {"metric": metric, **({"labels": list(labels)} if labels else {})}


def make_marker(metric: Metric, rows: Sequence[OwnRow], labels: Sequence[str], function: UserMetric | None) -> Marker:
    """What marks the responses to some rows.

    Raises:
        ValueError: the answers of the rows are no labels.
    """
    if function is not None:
        return user_marker(function)
    if metric == "exact_match":
        return lambda row, response: float(exact_match(response, row.expected))
    known = labels_of(rows, labels)
    return lambda row, response: float(find_label(response, known) == row.expected)


def exact_match(response: str, expected: str) -> bool:
    """Whether a response is the expected text; white space at the ends or repeated does not count.

    What follows a heading of the format of instructions does not count either, unless it is expected.
    """
    return any(text.split() == expected.split() for text in (response, own_response(response)))


def labels_of(rows: Sequence[OwnRow], labels: Sequence[str]) -> list[str]:
    """The labels that a response may name: those given, or all different answers.

    Raises:
        ValueError: an answer is none of the labels given, or there are too many different ones.
    """
    found = list(dict.fromkeys(row.expected for row in rows))
    if labels:
        for row in rows:
            if row.expected not in labels:
                raise ValueError(
                    f"row {row.number} has the answer {row.expected!r}, which is none of the labels "
                    f"{', '.join(labels)}: add it to --labels"
                )
        return list(labels)
    if len(found) > MAX_LABELS:
        raise ValueError(f"has {len(found)} different answers, too many for labels: give --labels, or exact_match")
    return found


def user_marker(metric: UserMetric) -> Marker:
    """Calls the user's function; its mistakes are named with the row."""
    takes_row = takes_three(metric.function)

    def mark(row: OwnRow, response: str) -> float:
        more = (dict(row.fields),) if takes_row else ()
        try:
            value = metric.function(response, row.expected, *more)
        except Exception as error:
            said = " ".join(str(error).split())
            raise ValueError(f"{metric.name} failed at row {row.number} ({type(error).__name__}: {said}).") from error
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, str) or not math.isfinite(number):
            raise ValueError(
                f"{metric.name} gave {value!r} at row {row.number}: a metric gives a finite number, or True or False."
            )
        return number

    return mark


def takes_three(function: Callable[..., Any]) -> bool:
    """Whether a function needs the row beside the response and what is expected."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty]
    return len(places) >= 3
