"""Training rows that are test rows."""

from __future__ import annotations

import pytest

from ist.experiments.data import contaminated_rows, without_contamination

TRAIN = ["A dog .", "a  DOG.", "a dogs.", "", "Straße", "two\nlines"]


@pytest.mark.parametrize(
    ("test", "found"),
    [
        ([], []),
        (["A dog ."], [0, 1]),
        (["aDog."], [0, 1]),
        (["A dog"], []),
        (["STRASSE"], [4]),
        (["two lines", "a dogs."], [2, 5]),
    ],
)
def test_rows_are_the_same_whatever_their_white_space_and_case(test: list[str], found: list[int]) -> None:
    assert contaminated_rows(TRAIN, test) == found
    rows = [{"prompt": text} for text in TRAIN]
    clean, count = without_contamination(rows, test, lambda row: row["prompt"])
    assert count == len(found)
    assert clean == [row for index, row in enumerate(rows) if index not in found]
