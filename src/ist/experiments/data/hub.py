"""The tasks from datasets of the Hugging Face hub: each row becomes a row in the collection's wording.

AddSub and SingleEq have no such dataset that loads without running code of its own; they come from the collection's
files alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .collection import solved_row
from .task_rows import TaskRow, make_row
from .tasks import Task

__all__ = ["HUB", "HubSource", "from_hub_row", "load_hub_task"]

HubRow = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """Where a task lies on the hub, and how its rows are worded anew."""

    name: str
    config: str | None = None
    test_split: str = "test"
    """The split that the collection calls test: `validation` where the hub's test set has no answers."""
    convert: Callable[[HubRow], dict[str, str]]
    """From a row of the dataset to `instruction`, `answer` and maybe `output`."""


def from_hub_row(task: Task, row: HubRow) -> TaskRow:
    """A row of the hub's dataset as a row of the task.

    Raises:
        ValueError: the task has no dataset there, or the row is not as expected.
    """
    try:
        return make_row(task, _source(task).convert(row))
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"A row of {_source(task).name} is not as expected ({error!r}; it has {', '.join(row)}): give the "
            "collection's files with --data_folder."
        ) from error


def load_hub_task(task: Task, split: str = "test") -> list[TaskRow]:
    """Download a task by name.

    Args:
        task: what to read.
        split: `train`, or `test` for the split that the paper tests on.

    Raises:
        ValueError: the task has no dataset on the hub, or its rows are not as expected.
    """
    source = _source(task)

    import datasets

    part = source.test_split if split == "test" else split
    rows: Any = datasets.load_dataset(source.name, source.config, split=part)
    return [from_hub_row(task, row) for row in rows]


def _source(task: Task) -> HubSource:
    if task.name not in HUB:
        raise ValueError(f"{task.name} is in no dataset of the hub: give the collection's files with --data_folder.")
    return HUB[task.name]


def _choose(
    question: str, texts: Sequence[str], answer: int, *, what: str = "answer", between: str = " "
) -> dict[str, str]:
    """A row with options in the collection's wording; `answer` counts from 0."""
    labels = [f"{what}{number}" for number in range(1, len(texts) + 1)]
    listed = between.join(f"{label.capitalize()}: {text}" for label, text in zip(labels, texts, strict=True))
    ask = {
        "answer": "Please choose the correct answer to the question: ",
        "solution": "Please choose the correct solution to the question: ",
        "ending": "Please choose the correct ending to complete the given sentence: ",
        "option": "Please choose the correct answer to fill in the blank to complete the given sentence: ",
    }[what]
    gap = " " if what == "option" else "\n\n"
    instruction = f"{ask}{question}\n\n{listed}{gap}Answer format: {'/'.join(labels)}"
    return _labelled(instruction, labels[answer])


def _labelled(instruction: str, label: str) -> dict[str, str]:
    return {"instruction": instruction, "output": f"the correct answer is {label}", "answer": label}


def _boolq(row: HubRow) -> dict[str, str]:
    question = f"Please answer the following question with true or false, question: {row['question']}?"
    return _labelled(f"{question}\n\nAnswer format: true/false", "true" if row["answer"] else "false")


def _piqa(row: HubRow) -> dict[str, str]:
    return _choose(row["goal"], [row["sol1"], row["sol2"]], int(row["label"]), what="solution", between="\n\n")


def _social_i_qa(row: HubRow) -> dict[str, str]:
    texts = [row["answerA"], row["answerB"], row["answerC"]]
    return _choose(f"{row['context']} {row['question']}", texts, int(row["label"]) - 1)


def _hellaswag(row: HubRow) -> dict[str, str]:
    sentence = f"{row['activity_label']}: {row['ctx']}"
    return _choose(sentence, row["endings"], int(row["label"]), what="ending")


def _winogrande(row: HubRow) -> dict[str, str]:
    return _choose(row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1, what="option")


def _arc(row: HubRow) -> dict[str, str]:
    choices = row["choices"]
    question = row["question"] if "question" in row else row["question_stem"]
    return _choose(question, choices["text"], list(choices["label"]).index(row["answerKey"].strip()))


def _aqua(row: HubRow) -> dict[str, str]:
    options = " ".join(f"({option[0]}) {option[2:].strip()}" for option in row["options"])
    output = f"{row['rationale'].strip()}\nThe answer is ({row['correct']})."
    return {"instruction": f"{row['question']} Answer Choices: {options}", "output": output, "answer": row["correct"]}


def _numbered(question: Callable[[HubRow], str], answer: str) -> Callable[[HubRow], dict[str, str]]:
    return lambda row: {"instruction": question(row), "answer": str(row[answer])}


HUB: dict[str, HubSource] = {
    "boolq": HubSource(name="google/boolq", test_split="validation", convert=_boolq),
    "piqa": HubSource(name="baber/piqa", test_split="validation", convert=_piqa),
    "social_i_qa": HubSource(name="lighteval/siqa", test_split="validation", convert=_social_i_qa),
    "hellaswag": HubSource(name="Rowan/hellaswag", test_split="validation", convert=_hellaswag),
    "winogrande": HubSource(
        name="allenai/winogrande", config="winogrande_xl", test_split="validation", convert=_winogrande
    ),
    "ARC-Easy": HubSource(name="allenai/ai2_arc", config="ARC-Easy", convert=_arc),
    "ARC-Challenge": HubSource(name="allenai/ai2_arc", config="ARC-Challenge", convert=_arc),
    "openbookqa": HubSource(name="allenai/openbookqa", config="main", convert=_arc),
    "MultiArith": HubSource(name="ChilleD/MultiArith", convert=_numbered(lambda row: row["question"], "final_ans")),
    "gsm8k": HubSource(name="openai/gsm8k", config="main", convert=solved_row),
    "AQuA": HubSource(name="deepmind/aqua_rat", config="raw", convert=_aqua),
    "SVAMP": HubSource(
        name="ChilleD/SVAMP", convert=_numbered(lambda row: f"{row['Body'].strip()} {row['Question']}", "Answer")
    ),
    "mawps": HubSource(name="MU-NLPC/Calc-mawps", convert=_numbered(lambda row: row["question"], "result")),
}
"""The datasets of the hub, by task."""
