"""Values of data files as texts: JSON for what is structured, nothing for null and NaN, and no halves of characters."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

__all__ = ["as_text", "check_characters", "is_missing", "text_field"]


def is_missing(value: Any) -> bool:
    """Whether a value stands for nothing: null, or the NaN that tables have where a cell is empty."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def as_text(value: Any) -> str:
    """A value as the text that stands for it in a prompt or an answer.

    Texts stay as they are; numbers, truth values, lists and objects are written as JSON (`true`, `{"a": null}`), and
    what else tables have (dates, decimals) as Python prints it.

    Raises:
        ValueError: the value is missing, or has bytes, an infinite number or a NaN in it.
    """
    if isinstance(value, str):
        return value
    if is_missing(value):
        raise ValueError("is null" if value is None else "is NaN")
    if isinstance(value, (bytes, bytearray)):
        raise ValueError("is bytes, not text")
    try:
        return _json(value) if isinstance(value, (bool, int, float, list, tuple, dict)) else str(value)
    except ValueError as error:
        raise ValueError("has a number in it that is not finite") from error
    except TypeError as error:
        raise ValueError(f"cannot be written as JSON ({error})") from error


def check_characters(text: str) -> None:
    """Raise ValueError at a surrogate without its other half, which no tokenizer takes.

    JSON can hold one (`"\\ud83d"`) where a text was cut within a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"has a lone surrogate (\\u{ord(text[error.start]):04x} at character {error.start + 1}), half of a "
            "character that was cut"
        ) from error


def text_field(given: Mapping[str, Any], name: str) -> str:
    """One field of a row as a text.

    Raises:
        ValueError: it cannot be one; the message names the field.
    """
    try:
        text = as_text(given[name])
        check_characters(text)
    except ValueError as error:
        raise ValueError(f"has a field, {name}, that {error}") from error
    return text


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=_other)


def _other(value: Any) -> str:
    """A date or a decimal within a list or an object."""
    if isinstance(value, (bytes, bytearray)):
        raise TypeError("bytes in it")
    return str(value)
