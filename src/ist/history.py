"""What was chosen and learned, step by step, as JSON lines that reports and researchers read.

Four kinds of lines, told apart by `event`:

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
from pathlib import Path
from typing import Any

__all__ = ["HISTORY_FILE", "History", "read_history"]

HISTORY_FILE = "ist_history.jsonl"
"""Name of the history in a run's folder."""


class History:
    """Writes a history, one line at a time, so that a killed run loses at most the line that it was writing.

    Where the disk is full the training goes on: lines wait in memory, with one warning, for the next that can be
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
            append(self.path, "".join(self._waiting))
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"The history {self.path} cannot be written ({error.strerror}); training goes on, and its lines "
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


def append(path: Path, text: str) -> None:
    """Append a text whole or not at all: a part that did get onto a full disk is cut off again.

    Raises:
        OSError: it could not be written.
    """
    with path.open("ab", buffering=0) as file:
        end = file.tell()
        data = text.encode()
        try:
            written = file.write(data)
            if written is not None and written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise


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
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(event) + "\n" for event in kept), encoding="utf-8")
    os.replace(temporary, path)
