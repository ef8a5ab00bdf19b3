"""Text from files on its way to a terminal: control characters are shown, and never obeyed."""

from __future__ import annotations

import logging
import sys
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from .wording import in_flags

__all__ = ["one_line", "printable", "printable_logs"]

HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of characters that steer a terminal or the order of its text, or break a line."""


def printable(text: str, keep: str = "\n\t") -> str:
    """A text with its control characters as Python writes them, `\\x1b` for an escape."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        repr(sign)[1:-1] if sign not in keep and unicodedata.category(sign) in HIDDEN else sign for sign in text
    )


def one_line(text: str) -> str:
    """A printable text whose whitespace, line breaks among it, is one space."""
    return printable(" ".join(text.split()), keep="")


class PrintableHandler(logging.Handler):
    """Writes a record's message to the stderr of the moment."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the message, a line each."""
        print(printable(in_flags(record.getMessage())), file=sys.stderr, flush=True)


def warning_line(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as one line, in place of Python's two: what it says, its category and where it comes from."""
    place = filename.replace("\\", "/").rpartition("/site-packages/")[2]
    return one_line(in_flags(f"{category.__name__}: {message} ({place}:{lineno})")) + "\n"


@contextmanager
def printable_logs() -> Iterator[None]:
    """Within the block, what this library logs reaches the terminal with its control characters shown, and so does
    every warning, in one line."""
    logger, handler = logging.getLogger("ist"), PrintableHandler()
    logger.addHandler(handler)
    plain = warnings.formatwarning
    warnings.formatwarning = warning_line
    try:
        yield
    finally:
        warnings.formatwarning = plain
        logger.removeHandler(handler)
