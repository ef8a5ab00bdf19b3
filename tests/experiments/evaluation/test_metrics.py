"""Marks of answers to a user's own rows."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest

from ist.experiments.data.own_rows import OwnRow
from ist.experiments.evaluation.evaluate import summarise_scores
from ist.experiments.evaluation.extraction import find_label
from ist.experiments.evaluation.metrics import MAX_LABELS, UserMetric, exact_match, make_marker, metric_identity
from ist.experiments.evaluation.results import Accuracy, Score


def own(expected: str, number: int = 1) -> OwnRow:
    return OwnRow(number=number, prompt="p", completion=expected, expected=expected, fields={"id": 7})


@pytest.mark.parametrize(
    ("response", "expected", "right"),
    [
        ("b", "b", True),
        (" b\n", "b", True),
        ("a  b\nc", "a b c", True),
        ("b\n\n### Instruction:\nmore", "b", True),
        ("4 left\n#### 4", "4 left\n#### 4", True),
        ("4 left\n#### 4\n\n### Instruction:\nmore", "4 left\n#### 4", True),
        ("4 left\n#### 5", "4 left\n#### 4", False),
        ("# A\n### B\ntext", "# A\n### B\ntext", True),
        ("b.", "b", False),
        ("B", "b", False),
        ("", "b", False),
        ("the b", "b", False),
    ],
)
def test_exact_match(response: str, expected: str, right: bool) -> None:
    assert exact_match(response, expected) == right
    assert make_marker("exact_match", [own(expected)], (), None)(own(expected), response) == float(right)


@pytest.mark.parametrize(
    ("response", "labels", "found"),
    [
        ("positive", ["positive", "negative"], "positive"),
        ("It is negative, not positive.", ["positive", "negative"], "negative"),
        ("Positive!", ["positive", "negative"], "positive"),
        ("very good", ["good", "very good"], "very good"),
        ("not entailment", ["entailment", "not entailment"], "not entailment"),
        ("unpositive", ["positive"], None),
        ("C++ it is", ["C", "C++"], "C++"),
        ("a.b", ["a+b", "a.b"], "a.b"),
        ("class 12", ["1", "12"], "12"),
        ("hm\n### Input:\npositive", ["positive"], None),
        ("It is not positive, it is negative", ["positive", "negative"], "negative"),
        ("non-toxic", ["toxic", "clean"], None),
        ("non-toxic", ["toxic", "non-toxic"], "non-toxic"),
        ("Between positive and negative, the answer is negative", ["positive", "negative"], "negative"),
        ("The answer is clear: negative", ["positive", "negative"], "negative"),
        ("negative. The answer is clear.", ["positive", "negative"], "negative"),
        ("very\n good", ["good", "very good"], "very good"),
        ("\u017f", ["s"], "s"),
        ("ÄRGER", ["ärger"], "ärger"),
        ("", ["positive"], None),
    ],
)
def test_labels_are_found(response: str, labels: list[str], found: str | None) -> None:
    assert find_label(response, labels) == found


def test_label_accuracy_takes_the_labels_of_the_rows_or_those_given() -> None:
    rows = [own("yes"), own("no", 2)]
    mark = make_marker("label_accuracy", rows, (), None)
    assert [mark(rows[0], text) for text in ("yes", "no, or yes", "maybe")] == [1, 0, 0]
    mark = make_marker("label_accuracy", rows, ("yes", "no", "maybe"), None)
    assert mark(rows[0], "maybe, or yes") == 0
    with pytest.raises(
        ValueError, match="row 2 has the answer 'no', which is none of the labels yes: add it to --labels"
    ):
        make_marker("label_accuracy", rows, ("yes",), None)
    with pytest.raises(ValueError, match="has an empty one among its --labels"):
        make_marker("label_accuracy", rows, ("yes", "no", " "), None)
    many = [own(str(number), number) for number in range(MAX_LABELS + 1)]
    with pytest.raises(ValueError, match="has 101 different answers, too many for labels"):
        make_marker("label_accuracy", many, (), None)


def two(response: str, expected: str) -> bool:
    return response == expected


def three(response: str, expected: str, row: dict[str, Any]) -> int:
    return len(response) + row["id"]


def swapped(expected: str, response: str) -> bool:
    return (expected, response) == ("b", "said")


def row_first(row: dict[str, Any], response: str, expected: str) -> bool:
    return (row["id"], response, expected) == (7, "said", "b")


def row_by_name(response: str, expected: str, *, row: dict[str, Any]) -> int:
    return row.pop("id")


def other_names(a: str, b: str, c: dict[str, Any]) -> bool:
    return (a, b, c["id"]) == ("said", "b", 7)


@pytest.mark.parametrize("function", [swapped, row_first, row_by_name, other_names])
def test_a_function_gets_by_name_what_it_names(function: Any) -> None:
    row = own("b")
    mark = make_marker("exact_match", [], (), UserMetric(function, "f"))
    assert [mark(row, "said"), mark(row, "said")] == [float(function is not row_by_name) or 7.0] * 2
    assert row.fields == {"id": 7}


def optional(response: str, expected: str, weight: float = 2.0) -> float:
    return weight


@pytest.mark.parametrize(("function", "value"), [(two, 1.0), (three, 8.0), (optional, 2.0), (lambda *_: 0.5, 0.5)])
def test_a_function_of_the_users_gets_what_it_takes(function: Any, value: float) -> None:
    assert make_marker("exact_match", [], (), UserMetric(function, "f"))(own("b"), "b") == value


class Odd:
    """A value that fails in all that is asked of it."""

    def __float__(self) -> float:
        raise RuntimeError("no number")

    def __repr__(self) -> str:
        raise RuntimeError("no text")


class OddError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def odd() -> None:
    raise OddError


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda response, expected: {}["x"], r"m\.py:f failed at row 3 \(KeyError: 'x'\)"),
        (lambda response, expected: None, "gave None at row 3: a metric gives a finite number, or True or False"),
        (lambda response, expected: math.nan, "gave nan at row 3"),
        (lambda response, expected: "1", "gave '1' at row 3"),
        (lambda response, expected: 10**400, "gave 1000"),
        (lambda response, expected: -1e308, "gave -1e"),
        (lambda response, expected: sys.exit(0), r"failed at row 3 \(SystemExit: 0\)"),
        (lambda response, expected: Odd(), "gave a Odd at row 3"),
        (lambda response, expected: odd(), r"failed at row 3 \(OddError\)"),
        (lambda response: 1, r"failed at row 3 \(TypeError: .*\)"),
    ],
)
def test_a_function_that_fails_is_named_with_the_row(function: Any, said: str) -> None:
    mark = make_marker("exact_match", [], (), UserMetric(function, "m.py:f"))
    with pytest.raises(ValueError, match=said) as error:
        mark(own("b", 3), "b")
    assert "\n" not in str(error.value)


def test_scores_are_a_share_or_a_mean_with_its_interval() -> None:
    assert summarise_scores([1.0, 0.0, 1.0], share=True) == Accuracy(2, 3)
    found = summarise_scores([0.5, 1.0, 0.0, 0.5], share=False)
    assert isinstance(found, Score)
    half = 3.182446 * math.sqrt(0.5 / 3) / 2  # Student's t of 3 degrees of freedom
    assert found.to_dict() == pytest.approx({"score": 0.5, "low": 0.5 - half, "high": 0.5 + half, "total": 4})
    assert str(found) == f"score 0.5 ({0.5 - half:.4g} to {0.5 + half:.4g}), mean of 4"
    one = summarise_scores([0.25], share=False)
    assert one == Score(0.25, 0.0, 1)
    assert one.to_dict() == {"score": 0.25, "low": None, "high": None, "total": 1}
    assert str(one) == "score 0.25, mean of 1"
    many = summarise_scores([0.25, 0.75] * 500, share=False).to_dict()
    assert many["high"] - 0.5 == pytest.approx(1.959964 * 0.25 / math.sqrt(999))


def test_a_users_metric_is_a_mean_whatever_its_values() -> None:
    for scores in ([0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.5, 0.0]):
        assert isinstance(summarise_scores(scores, share=False), Score)
    assert summarise_scores([0.0, 0.0], share=False).to_dict() == {"score": 0.0, "low": 0.0, "high": 0.0, "total": 2}


def test_the_identity_names_what_marks() -> None:
    assert metric_identity("exact_match", (), None) == {"metric": "exact_match"}
    assert metric_identity("label_accuracy", ("a",), None) == {"metric": "label_accuracy", "labels": ["a"]}
    assert metric_identity("exact_match", (), UserMetric(two, "m.py:f", "12ab")) == {"metric": "m.py:f 12ab"}
