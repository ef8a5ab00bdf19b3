"""What was chosen and learned, step by step, as JSON lines that reports and researchers read.

Four kinds of lines, distinguished by `event`:

- `run`: the layers' names, the configuration and the versions, once at the start and once after each resume;
- `step`: `step` (from 1, the optimizer steps done) and `active`, the indices of the layers that it updated;
- `importance`: `step`, `candidates`, `losses` in nats (null where not finite), `rewards`, the scores after the update
  as `importance`, and `skipped` with the reason where nothing was learned;
- `log`: `step` and what the training framework logged, such as `loss` and `eval_loss`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import warnings
import weakref
from pathlib import Path
from typing import Any

from .files import write_whole

__all__ = ["HISTORY_FILE", "History", "read_history"]

APPENDING = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
HISTORY_FILE = "ist_history.jsonl"
"""Name of the history in a run's folder."""


class History:
    """Writes a history, one line at a time, so that a killed run loses at most the line that it was writing.

    Where the disk is full the training continues: lines wait in memory, with one warning, for the next that can be
    written.

    Args:
        path: the file. Its folder is made.
        resume_step: keep the lines up to this step and drop later ones, which the resumed run writes again; None
            starts a new file.

    Raises:
        ValueError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], resume_step: int | None = None) -> None:
        self.path = Path(path)
        self._file = AppendedFile(self.path)
        self._waiting: list[str] = []
        self._warned = False
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is None:
                self.path.write_text("", encoding="utf-8")
            else:
                keep_until(self.path, resume_step)
        except OSError as error:
            raise ValueError(
                f"Cannot write the history to {self.path} ({error.strerror}): give a file that can be."
            ) from error

    def write(self, event: str, **fields: Any) -> None:
        """Append one line, and those that have been waiting."""
        self._waiting.append(json.dumps(finite({"event": event, **fields}), allow_nan=False) + "\n")
        try:
            self._file.append("".join(self._waiting))
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"The history {self.path} cannot be written ({error.strerror}); training continues, and its lines "
                    "are kept until they can be.",
                    stacklevel=4,
                )
            return
        self._waiting.clear()


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the lines of a history; a last line cut short by a kill is left out.

    Raises:
        ValueError: there is no such file, or a line before the last is not JSON.
    """
    file = Path(path)
    if file.is_dir():
        file = file / HISTORY_FILE
    if not file.is_file():
        raise ValueError(f"{file} does not exist: give the folder of a run, which holds {HISTORY_FILE}.")
    lines = file.read_text(encoding="utf-8").splitlines()
    events = []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{file}, line {number} is not JSON ({error.msg}): the file is damaged.") from error
            continue
        if not isinstance(event, dict) or "event" not in event:
            raise ValueError(f"{file}, line {number} is not an event of a history: the file is damaged.")
        events.append(event)
    return events


class AppendedFile:
    """A file to append to. It is opened once, which takes longer than to write a line, and again where it is gone."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._close: weakref.finalize[..., Any] | None = None
        self._descriptor = -1

    def append(self, text: str) -> None:
        """Append a text whole or not at all: a part that did get onto a full disk is cut off again.

        Raises:
            OSError: it could not be written.
        """
        if self._close is None or os.fstat(self._descriptor).st_nlink == 0:
            self.close()
            self._descriptor = os.open(self._path, APPENDING, 0o666)
            self._close = weakref.finalize(self, os.close, self._descriptor)
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        data = text.encode()
        try:
            if os.write(self._descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, end)
            self.close()
            raise

    def close(self) -> None:
        """Let go of the file until the next text."""
        if self._close is not None:
            self._close()
            self._close = None

    def __reduce__(self) -> tuple[Any, ...]:
        return AppendedFile, (self._path,)


def finite(value: Any) -> Any:
    """`value` with None in the place of numbers that JSON cannot write."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of later steps, by way of a second file so that a kill loses nothing."""
    if not path.exists():
        path.touch()
        return
    kept = [event for event in read_history(path) if event.get("step", 0) <= step]
    write_whole(path, "".join(json.dumps(event) + "\n" for event in kept))
