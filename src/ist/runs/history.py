"""What was chosen and learned, step by step, as JSON lines that reports and researchers read.

Five kinds of lines, distinguished by `event`:

- `run`: the layers' names, the configuration and the versions, once at the start and once after each resume;
- `step`: `step` (from 1, the optimizer steps done) and `active`, the indices of the layers that it updated;
- `importance`: `step`, `candidates`, `losses` in nats (null where not finite), `rewards`, the scores after the update
  as `importance`, and `skipped` with the reason where nothing was learned;
- `log`: `step` and what the training framework logged, such as `loss` and `eval_loss`;
- `gap`: `num_lines` lines are missing here, since the disk was full for long.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import deque
from pathlib import Path
from typing import Any

from .appended import AppendedFile
from .events import find_wrong_field
from .files import open_own, write_whole

__all__ = ["HISTORY_FILE", "History", "check_history", "history_file", "read_history"]

HISTORY_FILE = "ist_history.jsonl"
"""Name of the history in a run's folder."""

MAX_WAITING_BYTES = 1 << 22
"""Lines that wait for room on the disk take no more memory than this."""

BEGIN = b'{"event": "'
"""How every line begins."""

BLANK = object()
"""The content of a line of spaces."""

RUN = BEGIN + b'run"'
"""How a line begins that a file needs to be read."""


class History:
    """Writes a history, one line at a time, so that a killed run loses at most the line that it was writing.

    Where the disk is full the training continues, with one warning: lines wait in memory for the next that can be
    written, up to `MAX_WAITING_BYTES`; later ones are counted and left out. A file or folder that is deleted during
    the run is made anew.

    Args:
        path: the file. Its folder is made.
        resume_step: keep the lines up to this step and drop later ones, which the resumed run writes again; None
            starts a new file.
        resume_log_step: the same for lines of the kind `log`, where whoever writes them counts steps that a gradient
            scaler skipped; None is `resume_step`.

    Raises:
        ValueError: the file cannot be written or is a symbolic link, or on a resume the one that is there cannot be
            read.
    """

    def __init__(
        self, path: str | os.PathLike[str], resume_step: int | None = None, resume_log_step: int | None = None
    ) -> None:
        self.path = Path(path)
        self._file = AppendedFile(self.path)
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._num_lost = 0
        self._warned: set[str] = set()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if resume_step is None:
                os.close(open_own(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
            else:
                keep_until(self.path, resume_step, resume_step if resume_log_step is None else resume_log_step)
        except OSError as error:
            raise ValueError(
                f"Cannot write the history to {self.path} ({error.strerror}): give a file that can be."
            ) from error

    def write(self, event: str, **fields: Any) -> None:
        """Append one line, after those that have been waiting."""
        line = encode(event, fields)
        try:
            self._write_waiting()
            self._append(line)
        except OSError as error:
            self._keep(line)
            self._warn(
                "full",
                f"The history {self.path} cannot be written ({error.strerror or error}); training continues, and its "
                f"lines are kept until they can be, {MAX_WAITING_BYTES >> 20} MiB of them at most.",
            )

    def _append(self, line: bytes) -> None:
        """Write a line to the file, which begins anew with the run's line where it is gone."""
        if self._file.append(line):
            self._warn("gone", f"The history {self.path} was deleted during the run: it is begun anew.")
        if line.startswith(RUN):
            self._file.head = line

    def _write_waiting(self) -> None:
        """Write the lines that wait. On a disk that stays full this ends at the first, however many there are."""
        while self._waiting:
            self._append(self._waiting[0])
            self._waiting_bytes -= len(self._waiting.popleft())
        if self._num_lost:
            self._append(encode("gap", {"num_lines": self._num_lost}))
            self._num_lost = 0

    def _keep(self, line: bytes) -> None:
        """Let a line wait, where there is room for it and none before it was left out."""
        if self._num_lost or self._waiting_bytes + len(line) > MAX_WAITING_BYTES:
            self._num_lost += 1
            return
        self._waiting.append(line)
        self._waiting_bytes += len(line)

    def _warn(self, kind: str, message: str) -> None:
        """Say something once."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=5)


def history_file(path: str | os.PathLike[str]) -> Path:
    """The history of a run, given by its folder or by itself.

    Raises:
        ValueError: there is no such file.
    """
    file = Path(path)
    if file.is_dir():
        file = file / HISTORY_FILE
    if not file.is_file():
        raise ValueError(f"{file} does not exist: give the folder of a run, which holds {HISTORY_FILE}.")
    return file


def check_history(history: Any) -> None:
    """Raise ValueError unless `history` is a History or None."""
    if not isinstance(history, History | None):
        raise ValueError(
            f"history={history!r} is a {type(history).__name__}: give a History, as in history=ist.History('runs/mine/"
            f"{HISTORY_FILE}'), or leave it out."
        )


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Read the lines of a history; a last line cut short by a kill is left out.

    Raises:
        ValueError: there is no such file, it is no UTF-8, or a line is no JSON or holds a value of another type; the
            message names the file and the line.
    """
    file = history_file(path)
    events = []
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                event = decode(line, number)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file}, line {number} is not UTF-8 ({error.reason}): the file is damaged."
                ) from error
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n") and line[: len(BEGIN)] == BEGIN[: len(line)]:
                    break  # A kill cut it short.
                why = getattr(error, "msg", None) or str(error)
                raise ValueError(f"{file}, line {number} is not JSON ({why}): the file is damaged.") from error
            if event is BLANK:
                continue
            if wrong := find_wrong_field(event):
                raise ValueError(f"{file}, line {number} is not an event of a history ({wrong}): the file is damaged.")
            events.append(event)
    return events


def encode(event: str, fields: dict[str, Any]) -> bytes:
    """A line of a history."""
    return (json.dumps(finite({"event": event, **fields}), allow_nan=False) + "\n").encode()


def decode(line: bytes, number: int) -> Any:
    """The content of a line, or `BLANK`. Editors put a byte order mark before the first."""
    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    return json.loads(text, parse_constant=refuse_constant) if text else BLANK


def refuse_constant(name: str) -> None:
    """NaN and infinities are no JSON, though Python reads them."""
    raise ValueError(f"{name} is not a number of JSON")


def finite(value: Any) -> Any:
    """`value` with None in the place of numbers that JSON cannot write."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def keep_until(path: Path, step: int, log_step: int) -> None:
    """Drop the lines of later steps, by way of a second file so that a kill loses nothing."""
    is_new = not path.exists()
    if is_new or path.stat().st_size == 0:
        os.close(open_own(path, os.O_WRONLY | os.O_CREAT))
        if not is_new:
            warnings.warn(
                f"The history {path} is empty, though the run resumes at step {step}: it is written from there on.",
                stacklevel=4,
            )
        return
    try:
        events = read_history(path)
    except ValueError as error:
        raise ValueError(f"{error} Move it elsewhere, and the resumed run begins another.") from error
    kept = [event for event in events if event.get("step", 0) <= (log_step if event["event"] == "log" else step)]
    write_whole(path, "".join(json.dumps(event) + "\n" for event in kept))
