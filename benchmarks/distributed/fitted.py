"""The model of model.py, fitted to the lines of run.py, and how well it explains them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from statistics import mean

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from grid import ENGINES, METHODS  # noqa: E402
from model import Machine, Work, fit, predict, received_bytes, work  # noqa: E402
from scaling import Row, spread_of  # noqa: E402

from pages import markdown  # noqa: E402

__all__ = ["fit_table", "fitted_rows", "left_out", "machines_of", "without_its_shape", "worst_errors"]


def fitted_rows(rows: Sequence[Row]) -> list[Row]:
    """Those that the model is of: measured, and without a late rank."""
    return [row for row in rows if row.error is None and not row.cell.late]


def work_of(row: Row) -> Work:
    """A row in the terms of the model: the median of its steps."""
    cell = row.cell
    flops = work(cell.size, cell.method, cell.rows, cell.tokens)
    return Work(flops, received_bytes(row.counted, cell.engine, cell.processes), row.collectives, row.step)


def machines_of(rows: Sequence[Row]) -> dict[str, Machine]:
    """What a GPU reaches with each method; empty where the steps do not show what communication costs."""
    steps: dict[str, list[Work]] = {method: [] for method in METHODS}
    for row in fitted_rows(rows):
        steps[row.cell.method].append(work_of(row))
    if not any(step.received for own in steps.values() for step in own):
        return {}
    machines = fit(steps)
    shown = all(machine.collective or isfinite(machine.bandwidth) for machine in machines.values())
    return machines if shown else {}


def seconds_of(machines: dict[str, Machine], row: Row) -> float | None:
    """The step of a row by the model; None where the model knows nothing of its method."""
    step = work_of(row)
    machine = machines.get(row.cell.method)
    return None if machine is None else predict(machine, step.flops, step.received, step.collectives)


def left_out(rows: Sequence[Row]) -> list[float | None]:
    """The step of each row of `fitted_rows` by the model that is fitted to the others."""
    known = fitted_rows(rows)
    return [seconds_of(machines_of([*known[:at], *known[at + 1 :]]), row) for at, row in enumerate(known)]


def without_its_shape(rows: Sequence[Row]) -> list[float | None]:
    """The step of each row of `fitted_rows` by the model that is fitted to the other shapes; None without one."""
    known = fitted_rows(rows)
    machines = {
        size: machines_of([row for row in known if row.cell.size != size]) for size in {row.cell.size for row in known}
    }
    return [seconds_of(machines[row.cell.size], row) for row in known]


def worst_errors(rows: Sequence[Row]) -> tuple[float, float]:
    """Measured over predicted, the least and the most, where each row is predicted from the others and from the other
    shapes: `left_out`, `without_its_shape`.
    """
    predicted = zip(fitted_rows(rows) * 2, [*left_out(rows), *without_its_shape(rows)], strict=True)
    ratios = [row.step / seconds for row, seconds in predicted if seconds is not None]
    return min(ratios, default=1.0), max(ratios, default=1.0)


def fit_table(rows: Sequence[Row]) -> str:
    """Each measured step beside the model's; empty without a model."""
    machines = machines_of(rows)
    if not machines:
        return ""
    known = fitted_rows(rows)
    columns = [[seconds_of(machines, row) for row in known], left_out(rows), without_its_shape(rows)]
    names = ["model", "model without this row", "model without this shape"]
    if not any(columns[-1]):  # One shape alone.
        columns, names = columns[:-1], names[:-1]
    errors = [
        [value / row.step - 1 for row, value in zip(known, column, strict=True) if value is not None]
        for column in columns
    ]
    lines = []
    for row, *values in zip(known, *columns, strict=True):
        cell = row.cell
        start = (cell.size, str(cell.processes), ENGINES[cell.engine], METHODS[cell.method])
        measured = f"{row.step * 1e3:.0f} ms ({spread_of(row.line['step_seconds'], 1e3)})"
        lines.append((*start, f"{cell.rows} × {cell.tokens}", measured, *(beside(row, value) for value in values)))
    header = (
        *("shape", "GPUs", "backend", "method", "batch of each", "measured: median (fastest to slowest)"),
        *names,
    )
    return f"{markdown(header, lines)}\n\n{numbers_of(machines, len(known))} {errors_of(errors)}"


def beside(row: Row, seconds: float | None) -> str:
    """A step by the model, and how far it is from the measured one."""
    return "–" if seconds is None else f"{seconds * 1e3:.0f} ms ({seconds / row.step - 1:+.0%})".replace("-", "−")


def numbers_of(machines: dict[str, Machine], count: int) -> str:
    """The fitted numbers, as a sentence."""
    one = next(iter(machines.values()))
    parts = [f"{machine.flops / 1e12:.0f} TFLOP/s for {METHODS[name]}" for name, machine in machines.items()]
    if one.collective:
        parts.append(f"{one.collective * 1e3:.2f} ms for a collective")
    if isfinite(one.bandwidth):
        parts.append(f"{one.bandwidth / 1e9:.0f} GB/s received by a GPU within a node")
    if one.overhead:
        parts.append(f"{one.overhead * 1e3:.0f} ms of a step besides")
    return f"{len(parts)} numbers, fitted to {count} rows: {', '.join(parts)}."


def errors_of(errors: Sequence[Sequence[float]]) -> str:
    """How far the model is from the measured steps, as a sentence."""
    conditions = ("", " where it is fitted to the other rows", " where it is fitted to the other shapes")
    parts = [
        f"{max(map(abs, own)):.0%} ({mean(map(abs, own)):.0%} on average){condition}"
        for own, condition in zip(errors, conditions, strict=False)
        if own
    ]
    return f"The model differs from the measured steps by up to {', '.join(parts)}."
