"""A file that lines are appended to, each whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from pathlib import Path
from typing import Any

__all__ = ["AppendedFile"]

APPENDING = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)


class AppendedFile:
    """A file to append to. It is opened once, which takes longer than to write a line, and again where it is gone.

    Args:
        path: of the file.
        head: see there.
    """

    def __init__(self, path: Path, head: bytes = b"") -> None:
        self.head = head
        """What the file begins with where it is gone and made anew."""
        self._path = path
        self._close: weakref.finalize[..., Any] | None = None
        self._descriptor = -1

    def append(self, data: bytes) -> bool:
        """Append data whole or not at all: a part that did get onto a full disk is cut off again.

        Returns:
            Whether the file was gone, and begins anew with `head`.

        Raises:
            OSError: it could not be written.
        """
        if self._close is None or not self._is_there():
            self._open()
        end = os.lseek(self._descriptor, 0, os.SEEK_END)
        begins = end == 0 and bool(self.head)
        if begins:
            data = self.head + data
        try:
            if os.write(self._descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, end)
            self.close()
            raise
        return begins

    def close(self) -> None:
        """Let go of the file until the next line."""
        if self._close is not None:
            with contextlib.suppress(OSError):
                self._close()
            self._close = None

    def _is_there(self) -> bool:
        """Whether the open file still has a name, and so is found by its readers."""
        try:
            return os.fstat(self._descriptor).st_nlink > 0
        except OSError:  # such as of a network folder that was taken away
            return False

    def _open(self) -> None:
        """Open the file; one that is gone is made, and its folder too."""
        self.close()
        try:
            self._descriptor = os.open(self._path, APPENDING, 0o666)
        except FileNotFoundError:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._path, APPENDING, 0o666)
        self._close = weakref.finalize(self, os.close, self._descriptor)

    def __reduce__(self) -> tuple[Any, ...]:
        return AppendedFile, (self._path, self.head)
