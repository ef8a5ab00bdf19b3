"""The one way in which a whole file is written, and the names of the files that commands leave for each other."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "EVALUATION_FILE",
    "FOCUS_FILE",
    "RESULT_FILE",
    "open_own",
    "read_object",
    "replacing",
    "write_json",
    "write_whole",
]

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
    with replacing(Path(file)) as part, part.open("w", encoding="utf-8", newline="\n") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Within the block, a second file in the same folder to write to, which then takes the place of `target`.

    A folder may come from a stranger: where `target` is a symbolic link, the link is replaced and what it leads to is
    left alone. After an exception `target` is as it was.

    Raises:
        ValueError: `target` is a folder.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    with contextlib.suppress(FileNotFoundError):
        part.unlink()  # of a stranger, perhaps a link
    try:
        yield part
        if target.is_dir() and not target.is_symlink():
            raise ValueError(f"{target} is a folder, where a file has to be written: remove or rename it.")
        os.replace(part, target)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def open_own(file: str | os.PathLike[str], flags: int, mode: int = 0o666) -> int:
    """`os.open` of a file that is to be written, also as an `opener`; a symbolic link is not followed.

    Raises:
        ValueError: the file is a symbolic link, which could lead to any file of the user's.
    """
    try:
        return os.open(file, flags | getattr(os, "O_NOFOLLOW", 0), mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"{file} is a symbolic link, and what it leads to is not written: remove it.") from None
        raise


def read_object(file: Path, way_out: str) -> dict[str, Any]:
    """The object in a JSON file that a run left; a stranger may have written it.

    Args:
        file: that exists.
        way_out: what the message tells to do.

    Raises:
        ValueError: it holds none; the message names the file.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged (it is no JSON object): {way_out}")
    return found


def write_json(file: str | os.PathLike[str], value: Any, indent: int | None = 2) -> None:
    """Write a value as a JSON file, whole or not at all."""
    write_whole(file, json.dumps(value, indent=indent) + "\n")
