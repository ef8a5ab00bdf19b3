"""Rows of a user's own with the answers that they are marked by."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ist.experiments.data.instructions import instruction_prompt
from ist.experiments.data.own_rows import read_own_rows

USER, SAYS = {"role": "user", "content": "q"}, {"role": "assistant", "content": " a\n"}


@pytest.mark.parametrize(
    ("row", "completion", "expected"),
    [
        ({"instruction": "a", "output": "b "}, "b ", "b"),
        ({"instruction": "a", "output": "So it is b.", "answer": "b"}, "So it is b.", "b"),
        ({"instruction": "a", "output": "", "answer": 3}, "", "3"),
        ({"instruction": "a", "output": None, "answer": True}, "true", "true"),
        ({"instruction": "a", "answer": "b"}, "b", "b"),
        ({"instruction": "a", "output": "b", "answer": math.nan}, "b", "b"),
        ({"prompt": "p", "completion": "b", "answer": "c"}, "b", "c"),
        ({"messages": [USER, SAYS]}, [SAYS], "a"),
        ({"messages": [USER, SAYS], "answer": ["a", None]}, [SAYS], '["a", null]'),
    ],
)
def test_what_is_expected(tmp_path: Path, row: dict[str, Any], completion: Any, expected: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"instruction": "a", "output": "first"}) + "\n" + json.dumps(row))
    _, read = read_own_rows(file)
    assert (read.number, read.completion, read.expected) == (2, completion, expected)
    assert read.to_prompt_completion() == {"prompt": read.prompt, "completion": completion}
    if "instruction" in row:
        assert read.prompt == instruction_prompt(row)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "a", "output": " "}, "has an empty answer, with which none can be compared"),
        ({"instruction": "a", "output": "b", "answer": ""}, "has an empty answer"),
        ({"instruction": "a", "output": "b", "answer": "\ud83d"}, "has a field, answer, that has a lone surrogate"),
        ({"instruction": "a"}, r"lacks output \(it has instruction\)"),
        (3, "is a int: rows are objects"),
    ],
)
def test_a_row_without_an_answer_is_named(tmp_path: Path, row: Any, said: str) -> None:
    (tmp_path / "mine.json").write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=rf"mine\.json, row 1 {said}"):
        read_own_rows(tmp_path / "mine.json")
