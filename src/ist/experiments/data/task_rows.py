"""One row of a task: what the model is asked, what it should say, and the options that it has."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .instructions import instruction_prompt
from .tasks import TASKS, Task
from .values import is_missing, text_field
from .word_problems import WordProblem, to_prompt_completion

__all__ = ["Option", "TaskRow", "make_row", "parse_options", "to_task_row"]

_FIELDS = ("instruction", "input", "output", "answer")
_ANSWER_FORMAT = "Answer format:"
_LETTER_OPTIONS = "Answer Choices:"


@dataclass(frozen=True)
class Option:
    """One of the answers that a row offers."""

    label: str
    """What the response names it by: "answer1", "solution2", "true", "C"."""
    text: str
    """What it says: "dry palms"; a label that says all itself is its own text."""


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """A question of a task, in the paper's prompt."""

    task: Task
    prompt: str
    completion: str
    """The response to train on."""
    answer: str
    """A label, a letter or a number."""
    question: str
    """The question alone, without options and instruction."""
    options: tuple[Option, ...] = ()
    """Empty where the answer is a number."""

    def to_prompt_completion(self) -> dict[str, str]:
        """The row as TRL's trainers take it."""
        return {"prompt": self.prompt, "completion": self.completion}


def make_row(task: Task, row: Mapping[str, Any]) -> TaskRow:
    """A row from the collection's fields: `instruction`, `answer`, and maybe `input` and `output`.

    Args:
        task: what the row belongs to.
        row: its fields. Without an `output` the completion is one sentence that names the answer.

    Raises:
        ValueError: a field is missing, the options cannot be read, or the answer is none of them or no number.
    """
    given = {name: value for name, value in row.items() if not is_missing(value)}
    missing = [name for name in ("instruction", "answer") if given.get(name, "") == ""]
    if missing:
        raise ValueError(f"lacks {' and '.join(missing)} (it has {', '.join(map(str, row)) or 'nothing'})")
    texts = {name: text_field(given, name) for name in _FIELDS if name in given}
    instruction, answer = texts["instruction"], texts["answer"].strip()
    question = instruction.strip()
    options: tuple[Option, ...] = ()
    if task.kind in ("label", "letter"):
        question, options = parse_options(instruction)
        labels = [option.label for option in options]
        if answer not in labels:
            raise ValueError(f"has the answer {answer!r}, which is none of its options {', '.join(labels)}")
    elif not _is_number(answer):
        raise ValueError(f"has the answer {answer!r}, which is not a number")
    output = texts.get("output", "")
    return TaskRow(
        task=task,
        prompt=instruction_prompt(texts),
        completion=output if output.strip() else f"{task.prefix}{_plain(answer)}{'' if task.kind == 'label' else '.'}",
        answer=answer,
        question=question,
        options=options,
    )


def to_task_row(problem: WordProblem) -> TaskRow:
    """A built-in word problem as a row."""
    texts = to_prompt_completion(problem)
    return TaskRow(
        task=TASKS["word-problems"],
        prompt=texts["prompt"],
        completion=texts["completion"],
        answer=str(problem.answer),
        question=problem.prompt,
    )


def parse_options(instruction: str) -> tuple[str, tuple[Option, ...]]:
    """The question and the options of an instruction in the collection's wording.

    Options stand after "Answer1:", "Solution1:", "Ending1:", "Option1:" …, and their labels after "Answer format:"; or,
    for AQuA, as "(A) …" after "Answer Choices:". True and false are options without a text of their own.

    Raises:
        ValueError: they are not all there.
    """
    question = ""
    if _ANSWER_FORMAT in instruction:
        body, _, labels_text = instruction.rpartition(_ANSWER_FORMAT)
        labels = [label.strip() for label in labels_text.split("/")]
        stem = labels[0].rstrip("0123456789")
        if stem == labels[0]:
            return _question(body), tuple(Option(label, label) for label in labels)
        signs = re.compile(rf"\b{stem.capitalize()}(\d+):")
        numbered = [f"{stem}{number}" for number in signs.findall(body)]
    else:
        question, sign, body = instruction.rpartition(_LETTER_OPTIONS)
        signs = re.compile(r"\(([A-E])\)")
        numbered = signs.findall(body)
        labels = list("ABCDE"[: len(numbered)]) if sign else []
    if not labels or numbered != labels:
        found, needed = ", ".join(numbered) or "none", ", ".join(labels) or "some"
        raise ValueError(f"names the options {found} where {needed} belong")
    before, *texts = _split(signs, body)
    options = tuple(Option(label, text) for label, text in zip(labels, texts, strict=True))
    return _question(question or before), options


def _split(signs: re.Pattern[str], body: str) -> Sequence[str]:
    """The texts before, between and after the signs."""
    ends = [0, *(match.end() for match in signs.finditer(body))]
    starts = [*(match.start() for match in signs.finditer(body)), len(body)]
    return [body[end:start].strip() for end, start in zip(ends, starts, strict=True)]


def _question(text: str) -> str:
    """What comes after the collection's "Please …:"."""
    text = text.strip()
    return text.partition(":")[2].strip() if text.startswith("Please ") and ":" in text else text


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text.replace(",", "")))
    except ValueError:
        return False


def _plain(answer: str) -> str:
    """A whole number without its ".0"."""
    return re.sub(r"^(-?[\d,]+)\.0+$", r"\1", answer)
