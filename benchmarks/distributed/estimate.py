"""How long a cell will take, before it starts: on paper, corrected by what the cells before it took."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from grid import Cell  # noqa: E402
from model import Machine, predict, received_bytes, traffic, work  # noqa: E402

__all__ = ["expected_seconds", "training_seconds"]

MACHINES = {"cuda": Machine(3e14, 2e11, 0.05), "cpu": Machine(2e10, 1e9, 0.05)}
"""Assumed, of a data-centre GPU and its links, and of a core."""
START = 20.0
"""Seconds of a cell beside its steps, while none has been measured: processes that import, and weights."""


def training_seconds(cell: Cell, schedule: Mapping[str, int], kind: str) -> float:
    """Seconds of all steps of a cell on paper: to warm up, those that are timed, and those that are counted.

    A round of sampled training is counted, and one step of the others.

    Args:
        cell: what is measured.
        schedule: `interval`, `rounds` and `warm_up`.
        kind: `cuda` or `cpu`.
    """
    counted = traffic(cell.size, cell.method, cell.engine, cell.processes)
    received = received_bytes(counted, cell.engine, cell.processes)
    step = predict(MACHINES[kind], work(cell.size, cell.method, cell.rows, cell.tokens), received)
    rounds = schedule["rounds"] + schedule.get("warm_up", 1)
    if cell.method != "sampled":
        return (rounds * schedule["interval"] + 1) * step
    return (rounds + 1) * (schedule["interval"] * step + step + cell.late)  # Three forwards of a row each.


def expected_seconds(
    cell: Cell, schedule: Mapping[str, int], kind: str, rows: Sequence[Mapping[str, Any]] = ()
) -> float:
    """Seconds of a cell from its start to its row.

    Args:
        cell: what is measured.
        schedule: `interval`, `rounds` and `warm_up`.
        kind: `cuda` or `cpu`.
        rows: of cells that were measured on the same machine. What they took beside their steps on paper, the median of
            those with as many processes, or of all, is what this one will.
    """
    known = [row for row in rows if "seconds" in row and "error" not in row]
    like = [row for row in known if row["cell"]["processes"] == cell.processes] or known
    besides = [row["seconds"] - training_seconds(Cell(**row["cell"]), row["schedule"], kind) for row in like]
    return training_seconds(cell, schedule, kind) + (max(0.0, median(besides)) if besides else START)
