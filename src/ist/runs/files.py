"""The one way in which a whole file is written, and the names of the files that commands leave for each other."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

__all__ = ["EVALUATION_FILE", "FOCUS_FILE", "RESULT_FILE", "write_json", "write_whole"]

RESULT_FILE = "ist_result.json"
"""What `ist train` found: losses before and after, versions, the command."""

EVALUATION_FILE = "ist_eval.json"
"""What `ist eval` found."""

FOCUS_FILE = "focus.json"
"""What a focused training found before it began: the score of each layer, the layers chosen, their ranks."""


def write_whole(file: str | os.PathLike[str], text: str) -> None:
    """Write a text file so that a reader finds all of the new text or all of the old, also after a kill.

    The text goes to a second file in the same folder, reaches the disk, and takes the place of the first.

    Args:
        file: in a folder that exists.
        text: written in UTF-8.

    Raises:
        OSError: it cannot be written; the file is as it was, and no part is left beside it.
    """
    target = Path(file)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write_json(file: str | os.PathLike[str], value: Any, indent: int | None = 2) -> None:
    """Write a value as a JSON file, whole or not at all."""
    write_whole(file, json.dumps(value, indent=indent) + "\n")
