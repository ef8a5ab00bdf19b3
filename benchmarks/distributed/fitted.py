"""The model of model.py, fitted to the lines of run.py, and how well it explains them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import isfinite
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from grid import ENGINES, METHODS  # noqa: E402
from model import Machine, Work, fit, predict, received_bytes, work  # noqa: E402
from scaling import Row, spread_of  # noqa: E402

from pages import markdown  # noqa: E402

__all__ = ["fit_table", "fitted_rows", "left_out", "machines_of", "worst_errors"]


def fitted_rows(rows: Sequence[Row]) -> list[Row]:
    """Those that the model is of: measured, and without a late rank."""
    return [row for row in rows if row.error is None and not row.cell.late]


def work_of(row: Row) -> Work:
    """A row in the terms of the model: the median of its steps."""
    cell = row.cell
    flops = work(cell.size, cell.method, cell.rows, cell.tokens)
    return Work(flops, received_bytes(row.counted, cell.engine, cell.processes), row.step)


def machines_of(rows: Sequence[Row]) -> dict[str, Machine]:
    """What a GPU reaches with each method; empty where no step on several GPUs was measured."""
    steps: dict[str, list[Work]] = {method: [] for method in METHODS}
    for row in fitted_rows(rows):
        steps[row.cell.method].append(work_of(row))
    if not any(step.received for own in steps.values() for step in own):
        return {}
    machines = fit(steps)
    return machines if all(isfinite(machine.bandwidth) for machine in machines.values()) else {}


def seconds_of(machines: dict[str, Machine], row: Row) -> float | None:
    """The step of a row by the model; None where the model knows nothing of its method."""
    step = work_of(row)
    machine = machines.get(row.cell.method)
    return None if machine is None else predict(machine, step.flops, step.received)


def left_out(rows: Sequence[Row]) -> list[float | None]:
    """The step of each row of `fitted_rows` by the model that is fitted to the others."""
    known = fitted_rows(rows)
    return [seconds_of(machines_of([*known[:at], *known[at + 1 :]]), row) for at, row in enumerate(known)]


def worst_errors(rows: Sequence[Row]) -> tuple[float, float]:
    """Measured over predicted, the least and the most, where each row is predicted from the others: `left_out`."""
    known = fitted_rows(rows)
    ratios = [row.step / seconds for row, seconds in zip(known, left_out(rows), strict=True) if seconds is not None]
    return min(ratios, default=1.0), max(ratios, default=1.0)


def fit_table(rows: Sequence[Row]) -> str:
    """Each measured step beside the model's; empty without a model."""
    machines = machines_of(rows)
    if not machines:
        return ""
    lines = []
    errors: dict[str, list[float]] = {"all": [], "others": []}
    known = fitted_rows(rows)
    for row, alone in zip(known, left_out(rows), strict=True):
        cell, seconds = row.cell, seconds_of(machines, row)
        shown = []
        for value, own in zip((seconds, alone), errors.values(), strict=True):
            if value is None:
                shown.append("–")
                continue
            own.append(value / row.step - 1)
            shown.append(f"{value * 1e3:.0f} ms ({own[-1]:+.0%})".replace("-", "−"))
        batch = f"{cell.rows} × {cell.tokens}"
        start = (cell.size, str(cell.processes), ENGINES[cell.engine], METHODS[cell.method], batch)
        lines.append((*start, f"{row.step * 1e3:.0f} ms ({spread_of(row.line['step_seconds'], 1e3)})", *shown))
    header = (
        *("shape", "GPUs", "backend", "method", "batch of each", "measured: median (fastest to slowest)"),
        *("model", "model without this row"),
    )
    rates = ", ".join(f"{machine.flops / 1e12:.0f} TFLOP/s for {METHODS[name]}" for name, machine in machines.items())
    one = next(iter(machines.values()))
    besides = (
        f"{one.overhead * 1e3:.0f} ms of a step besides"
        if one.overhead
        else "nothing of a step besides, as these rows cannot tell a fixed time from a slower rate"
    )
    worst, worst_alone = (max(map(abs, own), default=0.0) for own in errors.values())
    numbers = len(machines) + 1 + bool(one.overhead)
    note = (
        f"{numbers} numbers, fitted to {len(known)} rows: {rates}, {one.bandwidth / 1e9:.0f} GB/s received by a GPU "
        f"within a node for all methods, and {besides}. The model differs from the measured steps by up to "
        f"{worst:.0%}, and by up to {worst_alone:.0%} where the row is not among those that it was fitted to."
    )
    return f"{markdown(header, lines)}\n\n{note}"
