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

_NEXT_HEADING = re.compile(r"(?:^|\n)\s*###(?!#)")
"""Of the format of instructions; four signs precede the result in GSM8K's answers."""
_EMPHASIS = r"[*_`\"')\]]*"
_PHRASE = re.compile(
    rf"\b(?:answer|option|choice|ans\.?){_EMPHASIS}\s*(?:(?:is|must be|should be|would be)\b|:|=)|####", re.IGNORECASE
)
_BOXED = re.compile(r"\\boxed\s*\{\s*(?:\\(?:text|mathrm|mathbf)\s*\{)?([^{}]*)\}")
"""As models of mathematics mark a result."""
_REASONS = r"(?i:because|since|as)|is(?!\s+(?:wrong|false|incorrect|not)\b)|was|for"
"""Words after a letter that make it an answer: "A because it is lighter"."""
_NAMED = r"(?:(?:the\s+)?(?:option|choice|answer|letter)\s+)?"
_STANDALONE_LETTER = re.compile(
    rf"^\W{{0,20}}(?i:{_NAMED})\W{{0,20}}(?:([A-E])(?:\b(?!\s+[a-z])|\b(?=\s+(?:{_REASONS})\b)|$)|([B-E])\b(?=\s))"
)
_SMALL_LETTER = re.compile(rf"^\W{{0,20}}(?i:{_NAMED})(?:\(([a-e])\)|([a-e])(?=\W{{0,20}}(?:$|\n)|\)))")
"""A small letter counts where no word can be meant: in brackets, or alone."""
_WITH_REASON = re.compile(rf"^\W{{0,20}}(?i:{_NAMED})\W{{0,20}}([A-E])\W{{0,20}}\s(?:{_REASONS})\b")
_OPTION = re.compile(r"\b(?i:option|choice)\s+\(?([A-E])\b(?!\W{0,20}\s(?i:is|was)\s+(?:wrong|false|incorrect|not)\b)")
_LAST_WORD = re.compile(r"(?<![A-E], )(?<!\band )(?<!\bor )(?<!\bnor )(?<!\w)([A-E])\W*$")


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
    return match and named_by(match[0], labels)


def find_label(response: str, labels: Sequence[str]) -> str | None:
    """The first of a user's labels that stands in a response, the longest of those that begin there.

    After the last "answer is" one counts before all others, one after "not" or "non-" does not, and where none stands
    as it is written, one in other letters does.
    """
    text = own_response(response)
    longest_first = sorted(labels, key=len, reverse=True)
    names = "|".join(r"\s+".join(map(re.escape, label.split())) for label in longest_first)
    pattern = rf"(?<!\bnot )(?<!\bnon-)(?<!\w)(?:{names})(?!\w)"
    phrases = list(_PHRASE.finditer(text))
    for part in [text[phrases[-1].end() :], text] if phrases else [text]:
        match = re.search(pattern, part) or re.search(pattern, part, re.IGNORECASE)
        if match:
            return named_by(match[0], longest_first)
    return None


def named_by(found: str, labels: Sequence[str]) -> str | None:
    """The label that a part of a text names, in these letters if there is one, else in others."""
    words = " ".join(found.split())
    for same in (str, str.casefold):
        if label := next((label for label in labels if same(" ".join(label.split())) == same(words)), None):
            return label
    return None


def extract_letter(response: str) -> str | None:
    """A letter from A to E: after the last "answer is", else the one that the text begins with and gives a reason for.

    Else the last one in brackets, else the last one called an option or a choice, else one that begins the text, else
    one that ends it. An "A" that begins a sentence is an article, not an answer, unless a reason follows ("A because").
    """
    text = own_response(response)
    if boxed := _BOXED.findall(text):
        text = boxed[-1]
    phrases = list(_PHRASE.finditer(text))
    if phrases and (said := begins_with_letter(text[phrases[-1].end() :])):
        return said
    if reasoned := _WITH_REASON.match(text):
        return reasoned[1]
    for named in (re.findall(r"\(([A-E])\)", text), _OPTION.findall(text)):
        if named:
            return named[-1]
    if first := begins_with_letter(text):
        return first
    last = _LAST_WORD.search(text)
    return last and last[1]


def begins_with_letter(text: str) -> str | None:
    """The letter that a text begins with, maybe after "option" or in brackets."""
    match = _STANDALONE_LETTER.match(text) or _SMALL_LETTER.match(text)
    return match and (match[1] or match[2]).upper()


def extract_number(response: str) -> float | None:
    """The first number after the last "answer is" or "####"; where there is none, the last number of the text.

    Of a calculation after it ("1.25 + 1.25 = 2.5") the result counts, and what is in `\\boxed{}` before all.
    """
    text = own_response(response)
    if (boxed := _BOXED.findall(text)) and (numbers := find_numbers(boxed[-1])):
        return numbers[-1]
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
