"""How answers to a user's own rows are marked: exact match, label accuracy, or a function of the user's.

Each metric gives a number to a response, given what is expected; the result is their mean.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..data.own_rows import OwnRow
from .extraction import find_label, own_response

__all__ = ["METRICS", "Marker", "Metric", "UserMetric", "make_marker", "metric_identity"]

Metric = Literal["exact_match", "label_accuracy"]
METRICS: tuple[Metric, ...] = get_args(Metric)
MAX_LABELS = 100
"""Different answers of a file that can be its labels."""

GIVEN = ("response", "expected", "row")
"""What a user's function is called with."""
LARGEST = 1e100
"""Beyond it a mean cannot be told from infinity."""

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
        if not all(label.strip() for label in labels):
            raise ValueError("has an empty one among its --labels, which every response contains: leave it out")
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
    call = caller(metric.function)

    def mark(row: OwnRow, response: str) -> float:
        try:
            value = call({"response": response, "expected": row.expected, "row": copy.deepcopy(dict(row.fields))})
        except (Exception, SystemExit) as error:
            raise ValueError(f"{metric.name} failed at row {row.number} ({describe(error)}).") from error
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except Exception:
            number = math.nan
        if not abs(number) <= LARGEST:
            raise ValueError(
                f"{metric.name} gave {shown(value)} at row {row.number}: a metric gives a finite number, or True or "
                "False."
            )
        return number

    return mark


def describe(error: BaseException) -> str:
    """An error's kind and text; the text is the user's code too, and may fail."""
    try:
        said = " ".join(str(error).split())
    except Exception:
        said = ""
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def shown(value: Any) -> str:
    """A value as a message shows it."""
    try:
        text = " ".join(repr(value).split())
    except Exception:
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else text[:79] + "…"


def caller(function: Callable[..., Any]) -> Callable[[Mapping[str, Any]], Any]:
    """What calls a user's function with the response, what is expected and, where it needs a third, the row.

    They come in this order; a function whose parameters have these names gets them by name, whatever their order.
    """
    try:
        parameters = [p for p in inspect.signature(function).parameters.values() if p.kind not in (p.VAR_KEYWORD,)]
    except (TypeError, ValueError):  # Some functions of C say nothing of themselves.
        parameters = []
    needed = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    names = {p.name for p in needed if p.kind is not p.POSITIONAL_ONLY}
    if len(names) == len(needed) and {"response", "expected"} <= names <= set(GIVEN):
        return lambda given: function(**{name: given[name] for name in names})
    places = [p for p in needed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    count = 3 if len(places) >= 3 else 2
    return lambda given: function(*(given[name] for name in GIVEN[:count]))
