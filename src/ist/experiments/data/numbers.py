"""Numbers in running text: "1,234", "-3", ".5", "12." at the end of a sentence."""

from __future__ import annotations

import re

__all__ = ["NUMBER", "find_numbers"]

NUMBER = re.compile(
    r"(?P<sign>(?<!\w)[-−])?"  # a hyphen inside a word ("route-7") is no sign
    r"(?:(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)|(?<!\w)(?=\.[0-9]))"  # 1,234 or 1234 or the nothing of .5
    r"(?P<fraction>\.[0-9]+)?"
)


def find_numbers(text: str) -> list[float]:
    """All numbers of a text, in order."""
    return [
        (-1 if match["sign"] else 1) * float((match["whole"] or "0").replace(",", "") + (match["fraction"] or ""))
        for match in NUMBER.finditer(text)
    ]
