"""Numbers in running text: "1,234", "-3", ".5", "12." at the end of a sentence."""

from __future__ import annotations

import re

__all__ = ["NUMBER", "find_numbers", "first_result", "skip_calculation"]

NUMBER = re.compile(
    r"(?P<sign>(?<!\w)[-−])?"  # a hyphen inside a word ("route-7") is no sign
    r"(?:(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)|(?<!\w)(?=\.[0-9]))"  # 1,234 or 1234 or the nothing of .5
    r"(?P<fraction>\.[0-9]+)?"
)

# A space has one way to be read, or "1 + 1 + 1 + …" of a model that repeats itself would take for ever.
_OPERAND = r"(?:[$€£]\s*)?[-−]?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:\s*%)?(?:\s*[A-Za-z]+)?"
_CALCULATION = re.compile(rf"{_OPERAND}(?:\s*(?:[-−+*/×÷·x]|of)\s*{_OPERAND})+\s*=\s*(?=[$€£]?\s*[-−]?\.?[0-9])")
"""What stands before the result of "2 apples + 3 apples = 5 apples"."""


def find_numbers(text: str) -> list[float]:
    """All numbers of a text, in order."""
    return [
        (-1 if match["sign"] else 1) * float((match["whole"] or "0").replace(",", "") + (match["fraction"] or ""))
        for match in NUMBER.finditer(text)
    ]


def skip_calculation(text: str) -> str:
    """A text from its first number on; where a calculation begins there, from its result on.

    "It is 1.25 + 1.25 = 2.5 dollars" becomes "2.5 dollars", "3 apples" stays as it is.
    """
    first = NUMBER.search(text)
    if first is None:
        return text
    begun = _CALCULATION.match(text, first.start())
    return text[begun.end() if begun else first.start() :]


def first_result(text: str) -> float | None:
    """The first number of a text, or the result of the calculation that begins with it."""
    return next(iter(find_numbers(skip_calculation(text))), None)
