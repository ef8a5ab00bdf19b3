"""The answer in a generated response.

`careful` reads what the response says; `paper` does what the evaluation scripts of LLM-Adapters (Hu et al., 2023) do,
which the paper follows: the first label anywhere, the last number, the first capital letter from A to E.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from ..data.numbers import find_numbers, first_result
from ..data.task_rows import TaskRow

__all__ = ["EXTRACTIONS", "Extraction", "extract_answer", "find_label", "is_correct", "own_response"]

Extraction = Literal["careful", "paper"]
EXTRACTIONS: tuple[Extraction, ...] = get_args(Extraction)
TOLERANCE = 1e-3
"""Difference up to which two numbers are the same answer."""

_NEXT_HEADING = re.compile(r"(?:^|\n)\s*###")
_PHRASE = re.compile(r"\b(?:answer|option|choice)\s*(?:(?:is|must be|should be|would be)\b|:|=)", re.IGNORECASE)
_REASONS = r"because|since|as|is|was|for"
"""Words after a letter that make it an answer: "A because it is lighter"."""
_NAMED = r"(?:(?:the\s+)?(?:option|choice|answer)\s+)?"
_STANDALONE_LETTER = re.compile(
    rf"^\W*(?i:{_NAMED})\W*(?:([A-E])(?:\b(?!\s+[a-z])|\b(?=\s+(?:{_REASONS})\b)|$)|([B-E])\b(?=\s))"
)
_WITH_REASON = re.compile(rf"^\W*(?i:{_NAMED})\W*([A-E])\W*\s(?:{_REASONS})\b")
_OPTION = re.compile(r"\b(?i:option|choice)\s+\(?([A-E])\b")


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
        return first_result(response)
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


def find_label(response: str, labels: Sequence[str]) -> str | None:
    """The first of a user's labels that stands in a response, the longest of those that begin there.

    Where none stands as it is written, one in other letters counts.
    """
    text = own_response(response)
    longest_first = sorted(labels, key=len, reverse=True)
    pattern = rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)"
    match = re.search(pattern, text)
    if match:
        return match[0]
    match = re.search(pattern, text, re.IGNORECASE)
    return match and next(label for label in longest_first if label.lower() == match[0].lower())


def extract_letter(response: str) -> str | None:
    """A letter from A to E: after the last "answer is", else the one that the text begins with and gives a reason for.

    Else the last one in brackets, else the last one called an option or a choice, else one that begins the text. An "A"
    that begins a sentence is an article, not an answer, unless a reason follows ("A because").
    """
    text = own_response(response)
    phrases = list(_PHRASE.finditer(text))
    if phrases and (said := begins_with_letter(text[phrases[-1].end() :])):
        return said
    if reasoned := _WITH_REASON.match(text):
        return reasoned[1]
    for named in (re.findall(r"\(([A-E])\)", text), _OPTION.findall(text)):
        if named:
            return named[-1]
    return begins_with_letter(text)


def begins_with_letter(text: str) -> str | None:
    """The letter that a text begins with, maybe after "option" or in brackets."""
    match = _STANDALONE_LETTER.match(text)
    return match and (match[1] or match[2])


def extract_number(response: str) -> float | None:
    """The first number after the last "answer is"; where there is none, the last number of the text.

    Of a calculation after it ("1.25 + 1.25 = 2.5") the result counts.
    """
    text = own_response(response)
    phrases = list(_PHRASE.finditer(text))
    said = first_result(text[phrases[-1].end() :]) if phrases else None
    numbers = find_numbers(text)
    return said if said is not None else numbers[-1] if numbers else None


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
