"""What `ist eval` shows on its way: how many rows are done, and what they give so far."""

from __future__ import annotations

import sys

from ...experiments.evaluation import TaskResult
from ..printable import printable

__all__ = ["Progress"]


class Progress:
    """On a terminal a line that counts the rows; elsewhere a line after each tenth of them."""

    def __init__(self) -> None:
        self._result = ""
        self._shown: dict[str, int] = {}

    def found(self, task: str, result: TaskResult) -> None:
        """Keep the result of the rows done, for the line that follows."""
        self._result = f", {result}"

    def __call__(self, task: str, done: int, total: int) -> None:
        """Show how far a task is."""
        line = printable(f"{task}: {done} of {total}{self._result}")
        if sys.stderr.isatty():
            print(f"\r{line}\x1b[K", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done < total and 10 * done // total > self._shown.get(task, 0):
            self._shown[task] = 10 * done // total
            print(line, file=sys.stderr, flush=True)
