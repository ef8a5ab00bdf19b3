"""The line of `ist analyse`: what it measures, the share that is done, and how long is left."""

from __future__ import annotations

import io

import pytest

from ist.cli.analyse.progress import AnalysisProgress, Work, in_words
from ist.cli.console import PlainConsole


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(terminal: bool = False, **totals: int) -> tuple[AnalysisProgress, Clock, io.StringIO]:
    clock, shown = Clock(), io.StringIO()
    console = PlainConsole(file=shown, force_terminal=terminal, width=100, _environ={})
    return AnalysisProgress(console, totals, clock), clock, shown


def spend(progress: AnalysisProgress, clock: Clock, kind: str, seconds: float, number: int, parts: int = 1) -> None:
    for _ in progress.each(range(number), kind, parts):
        clock.now += seconds


def test_time_left_counts_each_kind_by_its_own_pace() -> None:
    progress, clock, shown = make(losses=10, answers=2)
    with progress.measuring("the losses"):
        spend(progress, clock, "losses", 2, 5)
    assert progress.describe_left() == "more than 10 s left"  # an answer was not timed yet
    with progress.measuring("the answers"):
        spend(progress, clock, "answers", 40, 1)
    assert progress.describe_left() == "about 50 s left"
    assert progress.share() == 0.5
    with progress.measuring("the rest"):
        spend(progress, clock, "losses", 2, 5)
        spend(progress, clock, "answers", 40, 1)
    assert (progress.share(), progress.describe_left()) == (1.0, "about 0 s left")
    lines = shown.getvalue().splitlines()
    assert lines[0] == "the losses … 0% done"
    assert lines[1] == "the answers … 50% done, more than 10 s left"
    assert lines[2:4] == ["the answers … 50% done, about 50 s left", "the rest … 50% done, about 50 s left"]


def test_a_pipe_gets_a_line_each_half_minute_and_a_terminal_one_that_moves() -> None:
    progress, clock, shown = make(losses=100)
    with progress.measuring("the losses"):
        spend(progress, clock, "losses", 1, 10, parts=10)
    assert shown.getvalue().count("\n") == 1
    progress, clock, shown = make(losses=100)
    with progress.measuring("the losses"):
        spend(progress, clock, "losses", 16, 10, parts=10)
    assert shown.getvalue().count("\n") == 6
    assert "the losses … 20% done, about 2 min left\n" in shown.getvalue()

    progress, clock, shown = make(terminal=True, losses=4)
    with progress.measuring("the losses"):
        spend(progress, clock, "losses", 50, 2)
    assert "about 2 min left" in shown.getvalue()
    assert "\x1b[" in shown.getvalue()


def test_work_that_is_done_has_nothing_left() -> None:
    assert Work(0).left == 0.0
    assert Work(4).left is None
    assert Work(4, done=1, seconds=3.0).left == 9.0


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (99, "99 s"), (100, "2 min"), (3540, "59 min"), (7500, "2 h 5 min")]
)
def test_a_duration_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words
