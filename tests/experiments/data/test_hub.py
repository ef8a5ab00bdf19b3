"""Rows of the hub's datasets, worded as the collection words them. Loading itself needs the network."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ist.experiments.data import TASKS, from_hub_row, load_hub_task, make_row
from ist.experiments.data.hub import HUB
from tests.helpers.task_rows import raw_row

# A row of each dataset's schema, and the instruction and answer that the collection would have for it.
CHOICES = {"text": ["iron", "salt", "oxygen", "water"], "label": ["A", "B", "C", "D"]}
ROWS: list[tuple[str, dict[str, Any]]] = [
    ("boolq", {"question": "is ice colder than steam", "passage": "Ice is cold.", "answer": True}),
    ("piqa", {"goal": "dry a wet plate", "sol1": "wipe it with a towel", "sol2": "hold it under the tap", "label": 0}),
    ("social_i_qa", {"context": "Kim lost a key.", "question": "What will Kim do?", "answerA": "sing",
                     "answerB": "look for it", "answerC": "paint a door", "label": "2"}),
    ("hellaswag", {"activity_label": "Baking", "ctx": "A man kneads dough. He", "label": "2", "ind": 3,
                   "endings": ["eats a chair.", "flies away.", "puts it into the oven.", "reads it aloud."]}),
    ("winogrande", {"sentence": "The cup fell off the table because the _ was shaking.", "option1": "cup",
                    "option2": "table", "answer": "2"}),
    ("ARC-Easy", {"id": "x", "question": "Which of these is a liquid at room temperature?", "choices": CHOICES,
                  "answerKey": "D"}),
    ("AQuA", {"question": "A shirt of $40 is sold at 10% off (sale (A)). What does it cost?", "correct": "B",
              "rationale": "A tenth.", "options": ["A)30", "B)36", "C)38", "D)40", "E)44"]}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_a_row_of_the_hub_is_worded_as_in_the_collection(name: str, row: dict[str, Any]) -> None:
    expected = make_row(TASKS[name], raw_row(name))
    found = from_hub_row(TASKS[name], row)
    assert (found.prompt, found.answer, found.options) == (expected.prompt, expected.answer, expected.options)
    if name != "AQuA":
        assert found.completion == expected.completion


@pytest.mark.parametrize(
    ("name", "row", "question", "answer", "completion"),
    [
        ("MultiArith", {"question": "How many?", "final_ans": "7"}, "How many?", "7", "The answer is 7."),
        ("gsm8k", {"question": "How many?", "answer": "3<<1+2=3>>\n#### 3"}, "How many?", "3", "3\nThe answer is 3."),
        (
            "SVAMP",
            {"Body": "Ann has 5 nuts. ", "Question": "How many?", "Equation": "5", "Answer": "5.0", "Type": "x"},
            "Ann has 5 nuts. How many?",
            "5.0",
            "The answer is 5.",
        ),
        ("mawps", {"id": "m", "question": "How many ?", "result": "12.5"}, "How many ?", "12.5", "The answer is 12.5."),
        (
            "openbookqa",
            {"question_stem": "Ice is", "choices": {"text": ["hot", "cold"], "label": ["A", "B"]}, "answerKey": " B"},
            "Ice is",
            "answer2",
            "the correct answer is answer2",
        ),
        (
            "ARC-Challenge",
            {"question": "Q?", "choices": {"text": list("wxyz"), "label": ["1", "2", "3", "4"]}, "answerKey": "3"},
            "Q?",
            "answer3",
            "the correct answer is answer3",
        ),
    ],
)
def test_other_rows(name: str, row: dict[str, Any], question: str, answer: str, completion: str) -> None:
    found = from_hub_row(TASKS[name], row)
    assert (found.question, found.answer, found.completion) == (question, answer, completion)


@pytest.mark.parametrize("name", HUB)
def test_a_row_of_another_schema_is_named(name: str) -> None:
    said = f"A row of {HUB[name].name} is not as expected"
    with pytest.raises(ValueError, match=re.escape(said) + ".*it has text.*--data_folder"):
        from_hub_row(TASKS[name], {"text": "Q"})


@pytest.mark.parametrize("name", ["AddSub", "SingleEq"])
def test_two_tasks_are_not_on_the_hub(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is in no dataset of the hub: give the collection's files"):
        load_hub_task(TASKS[name])


def test_all_other_tasks_are() -> None:
    assert set(TASKS) - set(HUB) == {"AddSub", "SingleEq", "word-problems"}
