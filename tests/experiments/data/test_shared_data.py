"""The paper's training sets, where they lie beside the project: the real files are read as they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from ist.experiments.data.instructions import read_instructions

ROWS = {"boolq": 9427, "ARC-Easy": 2251, "ARC-Challenge": 1119, "openbookqa": 4957}


@pytest.mark.parametrize("task", ROWS)
def test_a_training_set_is_read_whole(shared_data: Path, task: str) -> None:
    rows = read_instructions([shared_data / "commonsense" / task / "train.json"])
    assert len(rows) == ROWS[task]
    assert all(row["prompt"].startswith("Below is an instruction") for row in rows)
    assert all(row["prompt"].endswith("\n\n### Response:\n") for row in rows)
    assert all(row["completion"].startswith("the correct answer is ") for row in rows)


def test_four_sets_are_joined_in_order(shared_data: Path) -> None:
    files = [shared_data / "commonsense" / task / "train.json" for task in ROWS]
    rows = read_instructions(files)
    assert len(rows) == sum(ROWS.values())
    assert rows[: ROWS["boolq"]] == read_instructions(files[:1])


def test_a_file_of_another_format_is_named(shared_data: Path) -> None:
    with pytest.raises(ValueError, match=r"trainset\.json, row 1 lacks instruction and output \(it has id, "):
        read_instructions([shared_data / "math" / "mawps" / "trainset.json"])
