"""What an exception says to a user: a mistake and its message, or a fault of this library and how to see it."""

from __future__ import annotations

import traceback
from importlib.metadata import PackageNotFoundError
from pathlib import Path

__all__ = ["describe_failure", "describe_missing"]

PACKAGE = Path(__file__).parents[1]
MEANT = (ValueError, OSError, ImportError)
"""What this library raises on purpose, with a message of its own."""

FAULTS = (TypeError, KeyError, AttributeError, IndexError, NameError, AssertionError, NotImplementedError)
"""What is a fault of this library where a line of its own raises it."""

OF_EXTRAS = {
    "trl": "train",
    "datasets": "train",
    "rich": "train",
    "yaml": "train",
    "lm_eval": "eval",
    "gguf": "quickstart",
    "matplotlib": "report",
}
"""Packages that an extra of this library brings, and which."""

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


def describe_missing(error: ModuleNotFoundError, command: str) -> str:
    """The sentence after `error:` where a package is missing: what brings it."""
    said = " ".join(str(error).split()).rstrip(" .:")
    if isinstance(error, PackageNotFoundError):  # Its own text repeats itself where transformers has put a sentence in.
        return f"{' '.join(str(error.name).split()).rstrip(' .:')}: install it with pip."
    package = (error.name or "").partition(".")[0]
    extra = ("report" if command == "report" else "train") if package == "ist" else OF_EXTRAS.get(package)
    way = f"pip install 'ist-peft[{extra}]'" if extra else f"pip install {package}" if package else "pip"
    return f"{said}: install it with {way}"
