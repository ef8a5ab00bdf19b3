"""Numbers in running text: "1,234", "-3", ".5", "1/2", "3,5", "12." at the end of a sentence."""

from __future__ import annotations

import re

__all__ = ["find_numbers", "first_result", "skip_calculation"]

_NUMBER = re.compile(
    r"(?:(?<!\w)(?P<sign>[-−–]))?"  # a hyphen inside a word ("route-7") is no sign
    r"(?:(?<=[-−–])[$€£])?"  # -$3
    r"(?:"
    r"(?<![\d/.,])(?:(?P<units>\d{1,3}) )?(?P<over>\d{1,9})/(?P<under>[1-9]\d{0,8})(?![\d/]|[.,]\d)"  # 1/2, 3 1/2
    r"|(?P<thousands>[1-9]\d{0,2}(?:(?:,\d{3})+|(?:[\u00a0\u2009\u202f'’_]\d{3})+)(?!\d)(?:\.\d+)?)"  # 1,234.5 or 1'234
    r"|(?<![\d],)(?P<comma>(?:\d{1,3}(?:\.\d{3})+|\d+),\d+)(?!\d|[,.]\d)"  # 3,5 or 1.234,50
    r"|(?P<plain>\d+(?:\.\d+)?|(?<!\w)\.\d+)"
    r")(?P<exponent>[eE][-+]?\d{1,3}(?!\w))?",
    re.ASCII,
)

# A space has one way to be read, or "1 + 1 + 1 + …" of a model that repeats itself would take for ever.
_OPERAND = r"\(?[-−]?(?:[$€£]\s*)?[-−]?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)(?:\s*%)?(?:\s*[A-Za-z]+)?\)?"
_OPERATOR = r"(?:\*\*|[-−+*/×÷·x^]|of)"
_CALCULATION = re.compile(rf"{_OPERAND}(?:\s*{_OPERATOR}\s*{_OPERAND})+\s*=\s*(?=[$€£]?\s*[-−]?\.?[0-9])")
"""What stands before the result of "2 apples + 3 apples = 5 apples"."""


def find_numbers(text: str) -> list[float]:
    """All numbers of a text, in order."""
    return [_value(match) for match in _NUMBER.finditer(text)]


def _value(match: re.Match[str]) -> float:
    """The number that was found."""
    if match["under"]:
        size = float(match["units"] or 0) + int(match["over"]) / int(match["under"])
    elif match["comma"]:
        size = float(match["comma"].replace(".", "").replace(",", "."))
    else:
        digits = match["plain"] or re.sub(r"[^\d.]", "", match["thousands"])
        size = float(digits + (match["exponent"] or ""))
    return -size if match["sign"] else size


def skip_calculation(text: str) -> str:
    """A text from its first number on; where a calculation begins there, from its result on.

    "It is 1.25 + 1.25 = 2.5 dollars" becomes "2.5 dollars", "3 apples" stays as it is.
    """
    first = _NUMBER.search(text)
    if first is None:
        return text
    start = first.start()
    while begun := _CALCULATION.match(text, start):
        start = begun.end()
    return text[start:]


def first_result(text: str) -> float | None:
    """The first number of a text, or the result of the calculation that begins with it."""
    return next(iter(find_numbers(skip_calculation(text))), None)
