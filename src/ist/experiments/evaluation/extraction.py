"""The answer in a generated response.

`careful` reads what the response says; `paper` does what the evaluation scripts of LLM-Adapters (Hu et al., 2023) do,
which the paper follows: the first label anywhere, the last number, the first capital letter from A to E.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from ..data.numbers import find_numbers
from ..data.task_rows import TaskRow

__all__ = ["EXTRACTIONS", "Extraction", "extract_answer", "is_correct"]

Extraction = Literal["careful", "paper"]
EXTRACTIONS: tuple[Extraction, ...] = get_args(Extraction)
TOLERANCE = 1e-3
"""Difference up to which two numbers are the same answer."""

_NEXT_HEADING = re.compile(r"(?:^|\n)\s*###")
_PHRASE = re.compile(r"\banswer\s*(?:is|:|=)", re.IGNORECASE)
_STANDALONE_LETTER = re.compile(r"^\W*([A-E])(?:\b(?!\s+[a-z])|$)")


def extract_answer(row: TaskRow, response: str, extraction: Extraction = "careful") -> str | float | None:
    """What a response answers: a label or letter of the row's options, or a number; None where it says nothing.

    Args:
        row: what was asked.
        response: the text generated after the prompt.
        extraction: how to read it.
    """
    careful = extraction == "careful"
    if row.task.kind == "label":
        labels = [option.label for option in row.options]
        return extract_label(response, labels) if careful else _first_label(response, labels)
    if row.task.kind == "letter":
        return extract_letter(response) if careful else _first_capital(response)
    if row.task.kind == "first_number":
        return next(iter(find_numbers(response)), None)
    return extract_number(response) if careful else _last_number(response)


def is_correct(row: TaskRow, answer: str | float | None) -> bool:
    """Whether an extracted answer is the row's."""
    if answer is None or isinstance(answer, str):
        return answer == row.answer
    return abs(answer - float(row.answer.replace(",", ""))) <= TOLERANCE


def extract_label(response: str, labels: Sequence[str]) -> str | None:
    """The first label that stands as a word; one in other letters ("True", "Answer2") where none stands as it is."""
    text = own_response(response)
    pattern = rf"\b(?:{'|'.join(map(re.escape, labels))})\b"
    match = re.search(pattern, text) or re.search(pattern, text, re.IGNORECASE)
    return match and next(label for label in labels if label.lower() == match[0].lower())


def extract_letter(response: str) -> str | None:
    """A letter from A to E: after the last "answer is", else the last one in brackets, else one that begins the text.

    An "A" that begins a sentence is an article, not an answer.
    """
    text = own_response(response)
    phrases = list(_PHRASE.finditer(text))
    if phrases:
        match = _STANDALONE_LETTER.match(text[phrases[-1].end() :])
        if match:
            return match[1]
    bracketed = re.findall(r"\(([A-E])\)", text)
    if bracketed:
        return bracketed[-1]
    match = _STANDALONE_LETTER.match(text)
    return match and match[1]


def extract_number(response: str) -> float | None:
    """The first number after the last "answer is"; where there is none, the last number of the text."""
    text = own_response(response)
    phrases = list(_PHRASE.finditer(text))
    said = find_numbers(text[phrases[-1].end() :]) if phrases else []
    numbers = find_numbers(text)
    return said[0] if said else numbers[-1] if numbers else None


def own_response(text: str) -> str:
    """A response up to the heading that a model which does not stop writes next."""
    parts = _NEXT_HEADING.split(text.strip(), maxsplit=1)
    return parts[0]


def _first_label(response: str, labels: Sequence[str]) -> str | None:
    if labels[0] == "answer1":
        labels = [f"answer{number}" for number in range(1, 6)]
    match = re.search("|".join(labels), response)
    return match and match[0]


def _first_capital(response: str) -> str | None:
    match = re.search("[A-E]", response)
    return match and match[0]


def _last_number(response: str) -> float | None:
    numbers = re.findall(r"-?[0-9]+\.?[0-9]*", response.replace(",", ""))
    return float(numbers[-1]) if numbers else None
