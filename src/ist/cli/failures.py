"""What an exception says to a user: a mistake and its message, or a fault of this library and how to see it."""

from __future__ import annotations

import sys
import traceback
from importlib.metadata import PackageNotFoundError
from pathlib import Path

from ..runtime.packages import is_of_python, say_how_to_install

__all__ = ["describe_failure", "describe_missing"]

PACKAGE = Path(__file__).parents[1]
MEANT = (ValueError, OSError, ImportError)
"""What this library raises on purpose, with a message of its own."""

FAULTS = (TypeError, KeyError, AttributeError, IndexError, NameError, AssertionError, NotImplementedError)
"""What is a fault of this library where a line of its own raises it."""

WORDS = {
    "RecursionError": "something nests too deep",
    "MemoryError": "the memory is full",
    "UnpicklingError": "a file is damaged, or runs code when it is read, which is refused",
}
"""For exceptions whose own message says little, or how to run a file's code."""


def describe_failure(error: BaseException) -> str:
    """The sentence after `error:`.

    An exception of another library comes from a file or a flag that it could not use, and keeps its first line with its
    type; one of the kinds that no input should cause, raised by a line of this library, is called a fault.
    """
    said = str(error).strip()
    if isinstance(error, MEANT):
        return said or type(error).__name__
    name = type(error).__name__
    if "inline_container" in said or "os error 28" in said:  # of torch's and safetensors' writers
        return f"a file could not be written whole, the disk is full or a limit is reached ({name}): make room for it."
    first = WORDS.get(name) or next((line.strip() for line in said.splitlines() if line.strip()), "no message")
    frames = traceback.extract_tb(error.__traceback__)
    ours = bool(frames) and PACKAGE in Path(frames[-1].filename).parents
    if ours and isinstance(error, FAULTS):
        return f"this is a fault of ist, not yours ({name}: {first}): IST_DEBUG=1 shows where; please report it."
    return f"{name}: {first}; IST_DEBUG=1 shows where it comes from."


def describe_missing(error: ModuleNotFoundError, command: str) -> str:
    """The sentence after `error:` where a package is missing: what brings it."""
    said = " ".join(str(error).split()).rstrip(" .:")
    if isinstance(error, PackageNotFoundError):  # Its own text repeats itself where transformers has put a sentence in.
        return f"{' '.join(str(error.name).split()).rstrip(' .:')}: install it with pip."
    module = error.name or ""
    if module.partition(".")[0] == "ist":
        way = say_how_to_install("matplotlib" if command == "report" else "trl")
    elif is_of_python(module):
        return f"{said}: it is a part of Python, and this one ({sys.executable}) lacks it: take another Python."
    else:
        way = say_how_to_install(module) if module else "install it with pip"
    return f"{said}: {way}"
