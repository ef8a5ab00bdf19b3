"""What `ist analyse` shows on its way: what it measures, how far it is, and how long is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

__all__ = ["AnalysisProgress"]

Item = TypeVar("Item")

SILENCE = 30.0
"""Seconds after which another line is printed where no line can move."""


@dataclass
class Work:
    """Work of one kind, whose parts all take about as long."""

    total: int
    done: int = 0
    seconds: float = 0.0

    @property
    def left(self) -> float | None:
        """Seconds that are left, or None where no part has been timed yet."""
        if self.done >= self.total:
            return 0.0
        return self.seconds / self.done * (self.total - self.done) if self.done else None


class AnalysisProgress:
    """On a terminal one line that moves; elsewhere a line for each measurement, and one after each half minute.

    Args:
        console: that shows it.
        totals: parts of each kind of work: `losses` of a batch and a set of layers, and sets whose `answers` are found.
        now: the time in seconds.
    """

    def __init__(
        self, console: Console, totals: Mapping[str, int], now: Callable[[], float] = time.perf_counter
    ) -> None:
        self._console = console
        self._work = {kind: Work(total) for kind, total in totals.items()}
        self._now = now
        self._what = ""
        self._mark = self._shown = now()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: Any = self._bar.add_task("", total=1.0, left="")

    @contextmanager
    def measuring(self, what: str) -> Iterator[None]:
        """Say what is being measured while it is."""
        self._what, self._mark = what, self._now()
        self.show(anyway=True)
        with self._bar:
            yield

    def each(self, items: Iterable[Item], kind: str, parts: int = 1) -> Iterator[Item]:
        """The items, each counted as so many parts of work when the next one is asked for."""
        for item in items:
            yield item
            work, now = self._work[kind], self._now()
            work.done += parts
            work.seconds += now - self._mark
            self._mark = now
            self.show()

    def show(self, anyway: bool = False) -> None:
        """Move the line, or print one where none can move and the last one is old."""
        share, left = self.share(), self.describe_left()
        self._bar.update(self._task, description=self._what, completed=share, left=left)
        if not self._console.is_terminal and (anyway or self._now() - self._shown >= SILENCE):
            self._console.print(
                f"{self._what} … {', '.join(filter(None, (f'{share:.0%} done', left)))}", soft_wrap=True
            )
            self._shown = self._now()

    def share(self) -> float:
        """The share of the whole that is done, in time where it is known."""
        spent = sum(work.seconds for work in self._work.values())
        left = sum(work.left or 0.0 for work in self._work.values())
        return spent / (spent + left) if spent else 0.0

    def describe_left(self) -> str:
        """How long is left, in words; nothing before anything was timed."""
        left = [work.left for work in self._work.values()]
        known = [seconds for seconds in left if seconds is not None]
        if not any(work.done for work in self._work.values()):
            return ""
        return f"{'about' if len(known) == len(left) else 'more than'} {in_words(sum(known))} left"


def in_words(seconds: float) -> str:
    """A duration as a reader wants it: 40 s, 12 min, 3 h 5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
