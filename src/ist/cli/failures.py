"""What an exception says to a user: a mistake and its message, or a fault of this library and how to see it."""

from __future__ import annotations

import traceback
from pathlib import Path

__all__ = ["describe_failure"]

PACKAGE = Path(__file__).parents[1]
MEANT = (ValueError, OSError, ImportError)
"""What this library raises on purpose, with a message of its own."""

FAULTS = (TypeError, KeyError, AttributeError, IndexError, NameError, AssertionError, NotImplementedError)
"""What is a fault of this library where a line of its own raises it."""

TIMES = {"RecursionError": "something nests too deep", "MemoryError": "the memory is full"}
"""Words for exceptions whose own message says little."""


def describe_failure(error: Exception) -> str:
    """The sentence after `error:`.

    An exception of another library comes from a file or a flag that it could not use, and keeps its first line with its
    type; one of the kinds that no input should cause, raised by a line of this library, is called a fault.
    """
    said = str(error).strip()
    if isinstance(error, MEANT):
        return said or type(error).__name__
    name = type(error).__name__
    first = TIMES.get(name) or next((line.strip() for line in said.splitlines() if line.strip()), "no message")
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and PACKAGE in Path(frames[-1].filename).parents
    if ours and isinstance(error, FAULTS):
        return f"this is a fault of ist, not yours ({name}: {first}): IST_DEBUG=1 shows where; please report it."
    return f"{name}: {first}; IST_DEBUG=1 shows where it comes from."
