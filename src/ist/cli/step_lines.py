"""The progress line of a training, and how `ist train` tells it to the `ist compare` that has started it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import astuple, dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

__all__ = ["STEP_MARK", "StepLine", "progress_line", "read_step", "tell_step", "told_environment"]

VARIABLE = "IST_TELL_STEPS"
STEP_MARK = "\x1e"
"""Begins a line that tells of a step: a sign that no text has which is printed (`printable`)."""


@dataclass(frozen=True)
class StepLine:
    """What the progress line shows."""

    step: int
    total: int
    layers: str
    loss: str


def progress_line(console: Console) -> Progress:
    """The step, the layers that it trains, the loss, the time left. On a terminal it moves; elsewhere it is nothing."""
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[layers]}"),
        TextColumn("loss {task.fields[loss]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def told_environment() -> Mapping[str, str]:
    """The environment of a process that is to tell of its steps."""
    return {**os.environ, VARIABLE: "1"}


def tell_step(line: StepLine) -> None:
    """Tell of a step, where this process is asked to."""
    if VARIABLE in os.environ:
        sys.stdout.write(f"{STEP_MARK}{json.dumps(astuple(line))}\n")  # In one piece: others write to the pipe as well.
        sys.stdout.flush()


def read_step(text: str) -> StepLine | None:
    """What a line of a process tells; None where it is another line, or torn."""
    if not text.startswith(STEP_MARK):
        return None
    try:
        return StepLine(*json.loads(text[1:]))
    except (ValueError, TypeError):
        return None
