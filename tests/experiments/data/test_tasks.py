"""The paper's tasks: their names, their rows, their files."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from ist.experiments.data import (
    TASKS,
    Option,
    find_tasks,
    instruction_prompt,
    make_row,
    read_task,
    to_task_row,
    word_problems,
)
from ist.experiments.data.task_rows import parse_options
from tests.helpers.task_rows import INSTRUCTIONS, raw_row, write_collection

OPTIONS = {
    "boolq": [("true", "true"), ("false", "false")],
    "piqa": [("solution1", "wipe it with a towel"), ("solution2", "hold it under the tap")],
    "social_i_qa": [("answer1", "sing"), ("answer2", "look for it"), ("answer3", "paint a door")],
    "hellaswag": [
        ("ending1", "eats a chair."),
        ("ending2", "flies away."),
        ("ending3", "puts it into the oven."),
        ("ending4", "reads it aloud."),
    ],
    "winogrande": [("option1", "cup"), ("option2", "table")],
    "ARC-Easy": [("answer1", "iron"), ("answer2", "salt"), ("answer3", "oxygen"), ("answer4", "water")],
    "AQuA": [("A", "30"), ("B", "36"), ("C", "38"), ("D", "40"), ("E", "44")],
    "MultiArith": [],
    "mawps": [],
}
QUESTIONS = {
    "boolq": "is ice colder than steam?",
    "piqa": "dry a wet plate",
    "social_i_qa": "Kim lost a key. What will Kim do?",
    "hellaswag": "Baking: A man kneads dough. He",
    "winogrande": "The cup fell off the table because the _ was shaking.",
    "ARC-Easy": "Which of these is a liquid at room temperature?",
    "AQuA": "A shirt of $40 is sold at 10% off (sale (A)). What does it cost?",
    "MultiArith": "Ann has 3 nuts and finds 4 more. How many has she now?",
    "mawps": "A bill was 3.5 dollars lower than 2 dollars . What was it ?",
}


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_a_row_of_each_format(name: str) -> None:
    raw = raw_row(name)
    row = make_row(TASKS[name], raw)
    assert row.prompt == instruction_prompt(raw)
    assert row.question == QUESTIONS[name]
    assert row.options == tuple(Option(*option) for option in OPTIONS[name])
    assert row.answer == raw["answer"]
    assert row.completion == (raw["output"] or "The answer is -1.5.")
    assert row.to_prompt_completion() == {"prompt": row.prompt, "completion": row.completion}


@pytest.mark.parametrize(
    ("name", "answer", "completion"),
    [
        ("boolq", "false", "the correct answer is false"),
        ("AQuA", "E", "The answer is E."),
        ("mawps", "12.0", "The answer is 12."),
        ("mawps", "-15.0", "The answer is -15."),
        ("mawps", "0.75", "The answer is 0.75."),
        ("mawps", "1,200", "The answer is 1,200."),
        ("mawps", "10", "The answer is 10."),
    ],
)
def test_a_row_without_a_response_gets_one(name: str, answer: str, completion: str) -> None:
    assert make_row(TASKS[name], {**raw_row(name), "output": "", "answer": answer}).completion == completion


@pytest.mark.parametrize("nothing", [None, math.nan])
def test_null_and_nan_are_nothing(nothing: float | None) -> None:
    row, plain = ({**raw_row("mawps"), "input": value, "output": value} for value in (nothing, ""))
    assert make_row(TASKS["mawps"], row) == make_row(TASKS["mawps"], plain)


def test_an_answer_that_is_a_truth_value_is_one_of_its_options() -> None:
    assert make_row(TASKS["boolq"], {**raw_row("boolq"), "answer": True}).answer == "true"


def test_a_word_problem_is_a_row() -> None:
    problem = word_problems(1, split="test")[0]
    row = to_task_row(problem)
    assert row.prompt == f"Question: {problem.prompt}\nAnswer:"
    assert (row.completion, row.answer) == (f" {problem.answer}", str(problem.answer))


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("boolq", {"answer": "maybe"}, "has the answer 'maybe', which is none of its options true, false"),
        ("boolq", {"instruction": ""}, r"lacks instruction \(it has instruction, input, output, answer\)"),
        ("boolq", {"instruction": "Is it?"}, "names the options none where some belong"),
        (
            "ARC-Easy",
            {"instruction": "Q\n\nAnswer1: a Answer3: b\n\nAnswer format: answer1/answer2"},
            "names the options answer1, answer3 where answer1, answer2 belong",
        ),
        ("AQuA", {"instruction": "Q? Answer Choices: (A) 1 (C) 2"}, "names the options A, C where A, B belong"),
        ("mawps", {"answer": "seven"}, "has the answer 'seven', which is not a number"),
        ("mawps", {"answer": None}, r"lacks answer \(it has .*\)"),
        ("mawps", {"answer": math.nan}, r"lacks answer \(it has .*\)"),
        ("mawps", {"answer": "nan"}, "has the answer 'nan', which is not a number"),
        ("boolq", {"input": "\ud83d"}, r"has a field, input, that has a lone surrogate .*"),
    ],
)
def test_a_row_that_does_not_fit(tmp_path: Path, name: str, change: dict[str, str], said: str) -> None:
    folder = write_collection(tmp_path, {name: [raw_row(name), {**raw_row(name), **change}]})
    with pytest.raises(ValueError, match=rf"test\.json, row 2 {said}\.$"):
        read_task(folder, TASKS[name])


def test_options_within_the_question_are_no_options() -> None:
    question, options = parse_options(
        "Please choose the correct answer to the question: Is it the answer1 or the Answer format?\n\n"
        "Answer1: one/two Answer2: three\n\nAnswer format: answer1/answer2"
    )
    assert question == "Is it the answer1 or the Answer format?"
    assert options == (Option("answer1", "one/two"), Option("answer2", "three"))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("boolq", ["boolq"]),
        ("boolq,piqa", ["boolq", "piqa"]),
        (["arc-easy", "GSM8K, svamp"], ["ARC-Easy", "gsm8k", "SVAMP"]),
        ("arithmetic", ["MultiArith", "gsm8k", "AddSub", "AQuA", "SingleEq", "SVAMP", "mawps"]),
        (["commonsense", "word-problems"], [*list(TASKS)[:8], "word-problems"]),
    ],
)
def test_tasks_are_found_by_name(names: str | list[str], found: list[str]) -> None:
    assert [task.name for task in find_tasks(names)] == found


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("riddles", "task='riddles' is unknown: choose some of boolq, piqa"),
        (["boolq", "commonsense"], "boolq given twice: name each task once"),
        ("", "No task given"),
        ([], "No task given"),
    ],
)
def test_names_that_are_refused(names: str | list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        find_tasks(names)


@pytest.mark.parametrize(
    ("family", "num", "max_new_tokens"), [("commonsense", 8, 32), ("arithmetic", 7, 256), ("built-in", 1, 8)]
)
def test_a_family_generates_as_much_as_the_paper(family: str, num: int, max_new_tokens: int) -> None:
    tasks = [task for task in TASKS.values() if task.family == family]
    assert [task.max_new_tokens for task in tasks] == [max_new_tokens] * num


@pytest.mark.parametrize("part", ["", "commonsense", "math", "dataset"])
def test_the_folder_may_have_parts(tmp_path: Path, part: str) -> None:
    write_collection(tmp_path / part, {"boolq": [raw_row("boolq")]})
    assert len(read_task(tmp_path, TASKS["boolq"])) == 1


FILES = [
    ("gsm8k", "train", "train.jsonl", {"question": "How many?", "answer": "6 - 2 = <<6-2=4>>4 left.\n#### 1,004"},
     "6 - 2 = 4 left.\nThe answer is 1,004.", "1004"),
    ("mawps", "train", "trainset.json", {"id": 1, "original_text": "How many ?", "equation": "X=1", "ans": 12.0},
     "The answer is 12.", "12.0"),
    ("mawps", "validation", "validset.json", {"original_text": "How many ?", "ans": "2,125"},
     "The answer is 2125.", "2125"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "split", "file", "row", "completion", "answer"), FILES)
def test_the_files_with_rows_of_their_own(
    tmp_path: Path, name: str, split: str, file: str, row: dict[str, str], completion: str, answer: str
) -> None:
    (tmp_path / name).mkdir()
    text = json.dumps(row)
    (tmp_path / name / file).write_text(text if file.endswith("l") else f"[{text}]")
    (found,) = read_task(tmp_path, TASKS[name], split)
    assert (found.completion, found.answer) == (completion, answer)
    assert found.question == row.get("question", "How many ?")


def test_a_sample_is_read_and_called_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_collection(tmp_path, {"piqa": [raw_row("piqa")]}, split="sample")
    assert len(read_task(tmp_path, TASKS["piqa"])) == 1
    assert "is a sample, not the whole test set of piqa" in caplog.text


@pytest.mark.parametrize(
    ("folder", "split", "said"),
    [
        ("", "test", "holds no test set of boolq: it belongs in boolq/test.json"),
        ("", "dev", "split='dev' is unknown: choose one of train, validation, test"),
        ("none", "test", "is not a folder: --data_folder takes the one that holds boolq"),
    ],
)
def test_what_is_not_there(tmp_path: Path, folder: str, split: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_task(tmp_path / folder, TASKS["boolq"], split)


SIZES = [
         ("boolq", "train", 9427), ("boolq", "test", 3270), ("ARC-Easy", "test", 2376), ("ARC-Challenge", "test", 1172),
         ("openbookqa", "test", 500), ("gsm8k", "test", 1319), ("mawps", "train", 1898), ("mawps", "test", 238),
         ("AddSub", "test", 395), ("MultiArith", "test", 600), ("SingleEq", "test", 508), ("AQuA", "test", 254),
         ("piqa", "test", 20), ("social_i_qa", "test", 20), ("winogrande", "test", 20), ("SVAMP", "test", 20),
]  # fmt: skip


@pytest.mark.parametrize(("name", "split", "num"), SIZES)
def test_the_real_files_are_read_whole(shared_data: Path, name: str, split: str, num: int) -> None:
    rows = read_task(shared_data, TASKS[name], split)
    assert len(rows) == num
    assert all(len(row.options) >= 2 for row in rows) == (TASKS[name].kind in ("label", "letter"))
