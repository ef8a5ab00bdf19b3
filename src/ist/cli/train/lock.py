"""The lock of a run's folder: one run at a time, for as long as the process that took it lives."""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from functools import cache
from pathlib import Path

from ...runs.files import open_own

__all__ = ["LOCK_FILE", "FolderLock"]

LOCK_FILE = ".ist_run.lock"


class FolderLock:
    """A lock on a file in a folder, which the system takes back when its process ends, however that ends.

    Processes that this one forks (workers that load data) close the file, so that none of them holds the lock for a
    dead parent.

    Args:
        folder: that exists.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOCK_FILE
        self._descriptor: int | None = None

    def take(self) -> bool:
        """Take the lock; False where another process has it. File systems without locks let everybody have it."""
        while self._descriptor is None:
            descriptor = open_own(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            if not lock(descriptor):
                os.close(descriptor)
                return False
            if is_at(descriptor, self.file):
                self._descriptor = descriptor
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"{os.getpid()}\n".encode())
                held().add(self)
            else:  # its former holder removed the file between the two lines above
                os.close(descriptor)
        return True

    def release(self) -> None:
        """Give the lock back and remove its file."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                self.file.unlink()
            self.forget()

    def forget(self) -> None:
        """Close the file and leave it where it is."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def holder(self) -> str:
        """The process that has the lock, in words."""
        with contextlib.suppress(OSError, ValueError):
            return f"process {int(self.file.read_text(encoding='utf-8'))}"
        return "another process"


def lock(descriptor: int) -> bool:
    """Lock an open file, without waiting; False where another process has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system that knows no locks
        return True
    return True


def is_at(descriptor: int, file: Path) -> bool:
    """Whether an open file is still the one that a path names."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except OSError:
        return False


@cache
def held() -> weakref.WeakSet[FolderLock]:
    """The locks of this process; from the first call on, its forks close them."""
    locks: weakref.WeakSet[FolderLock] = weakref.WeakSet()

    def forget_all() -> None:
        for lock in list(locks):
            lock.forget()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forget_all)
    return locks
