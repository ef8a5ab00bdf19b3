"""Rows of a user's own that a model answers: what it is asked, and what it should say."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .encoding import Text
from .files import read_rows
from .instructions import is_empty, to_prompt_completion
from .values import is_missing, text_field

__all__ = ["OwnRow", "own_row", "read_own_rows", "rows_at"]


@dataclass(frozen=True, kw_only=True)
class OwnRow:
    """A question with the answer that a metric compares."""

    number: int
    """In its file, from 1."""
    prompt: Text
    """A text, or the messages of a chat."""
    completion: Text
    """What it is trained to say: a text, or the message of a chat."""
    expected: str
    """The row's `answer` where it has one, else its output, completion or last message."""
    fields: Mapping[str, Any]
    """The row as it stands in the file."""

    def to_prompt_completion(self) -> dict[str, Any]:
        """The row as TRL's trainers take it."""
        return {"prompt": self.prompt, "completion": self.completion}


def read_own_rows(file: str | Path) -> list[OwnRow]:
    """The rows of a file in any of the forms of `read_instructions`, each maybe with an `answer` beside its output.

    Raises:
        ValueError: the file cannot be read, a row does not fit, or has no answer to compare with.
    """
    return [own_row(file, number, row) for number, row in enumerate(read_rows(file), start=1)]


def rows_at(places: Iterable[tuple[str, int]]) -> list[OwnRow]:
    """The rows at some places, each a file and a row's number from 1; every file is read once.

    Raises:
        ValueError: as `read_own_rows`.
    """
    places = list(places)
    files = {file: read_rows(file) for file in dict.fromkeys(file for file, _ in places)}
    return [own_row(file, number, files[file][number - 1]) for file, number in places]


def own_row(file: str | Path, number: int, row: Any) -> OwnRow:
    """A row as it stands in a file, or in a dataset of that name.

    Raises:
        ValueError: it does not fit, or has no answer to compare with.
    """
    given = row if isinstance(row, dict) else {}
    answer = given.get("answer")
    if not is_missing(answer) and "instruction" in given and is_missing(given.get("output")):
        given = row = {**given, "output": answer}
    texts = to_prompt_completion(Path(file), number, row)
    completion = texts["completion"]
    try:
        said = completion if isinstance(completion, str) else completion[-1]["content"]
        expected = said if is_missing(answer) else text_field(given, "answer")
        if is_empty(expected):
            raise ValueError("has an empty answer, with which none can be compared")
    except ValueError as error:
        raise ValueError(f"{file}, row {number} {error}.") from error
    return OwnRow(number=number, **texts, expected=expected.strip(), fields=given)
