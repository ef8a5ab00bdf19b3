"""Rows of a user's own that a model answers: what it is asked, and what it should say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .encoding import Text
from .files import read_rows
from .instructions import is_empty, to_prompt_completion
from .values import is_missing, text_field

__all__ = ["OwnRow", "read_own_rows"]


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
    rows = []
    for number, row in enumerate(read_rows(file), start=1):
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
        rows.append(OwnRow(number=number, **texts, expected=expected.strip(), fields=given))
    return rows
