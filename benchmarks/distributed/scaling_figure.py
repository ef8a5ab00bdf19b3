"""The figure of weak and strong scaling, from the lines of run.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from grid import ENGINES, METHODS  # noqa: E402
from scaling import PLANNED, Row, spread_of  # noqa: E402

__all__ = ["apart", "draw", "strong_rows", "weak_rows"]

COLORS = {"lora": "0.4", "sampled": "tab:blue", "focused": "tab:red"}
LINES = {"ddp": "--", "fsdp2": "-"}


def draw(file: Path, rows: Sequence[Row]) -> None:
    """Weak scaling (tokens/s of each GPU), and strong scaling (of all together) where it was measured: a row of panels
    for each shape.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.error is None and not row.cell.late]
    sizes = list(dict.fromkeys(row.cell.size for row in rows))
    together = any(is_scaling(strong_rows([row for row in rows if row.cell.size == size])) for size in sizes)
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11 if together else 7.5, 4 * len(sizes)), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(sizes), 1 + together, squeeze=False)
        for own_panels, size in zip(panels, sizes, strict=True):
            own = [row for row in rows if row.cell.size == size]
            draw_panel(own_panels[0], weak_rows(own), together=False)
            if together:
                draw_panel(own_panels[1], strong_rows(own), together=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Software": None})


def is_scaling(rows: Sequence[Row]) -> bool:
    """Whether the rows have several numbers of processes."""
    return len({row.cell.processes for row in rows}) > 1


def draw_panel(axes: Any, rows: Sequence[Row], together: bool) -> None:
    """The curves of one shape, with a title, and a word where nothing was run."""
    cell = rows[0].cell
    batch = cell.rows * (cell.processes if together else 1)
    kind, of, on = ("Strong", "all GPUs", "in all") if together else ("Weak", "each GPU", "on each")
    axes.set_title(f"{kind} scaling, {cell.size.upper()} shape, {batch} × {cell.tokens} tokens {on}", pad=18)
    steps = spread_of([len(row.line["step_seconds"]) for row in rows])
    bars = f"medians of {steps} steps; bars: slowest to fastest"
    axes.text(0.5, 1.02, bars, color="0.4", ha="center", transform=axes.transAxes)
    axes.set(xlabel="GPUs", ylabel=f"tokens/s of {of}")
    axes.set_xscale("log", base=2)
    shown = is_scaling(rows) or not together  # One number of GPUs is a point of weak scaling, and no strong scaling.
    if shown:
        draw_curves(axes, rows, together)
    measured = {row.cell.processes for row in rows} if shown else set()
    numbers = sorted({*PLANNED[1], *measured})
    axes.set(xlim=(numbers[0] / 1.2, numbers[-1] * 1.2), ylim=(0, None))
    axes.set_xticks(numbers)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:.0f}")
    for number in numbers:
        if number not in measured:
            axes.text(number, 0.02, "not run", color="0.5", ha="center", transform=axes.get_xaxis_transform())


def weak_rows(rows: Sequence[Row]) -> list[Row]:
    """Those with the rows of each process that most numbers of processes have."""
    return largest_group(rows, lambda row: row.cell.rows)


def strong_rows(rows: Sequence[Row]) -> list[Row]:
    """Those with the rows of all processes together that most numbers of processes have."""
    return largest_group(rows, lambda row: row.cell.rows * row.cell.processes)


def largest_group(rows: Sequence[Row], kind: Callable[[Row], int]) -> list[Row]:
    """The rows of the kind that has the most numbers of processes."""
    groups: dict[int, list[Row]] = {}
    for row in rows:
        groups.setdefault(kind(row), []).append(row)
    return max(groups.values(), key=lambda own: len({row.cell.processes for row in own}), default=[])


def draw_curves(axes: Any, rows: Sequence[Row], together: bool) -> None:
    """Tokens a second, of each process or of all together: a curve for each method and backend, which begins at one
    process where that was measured. Bars reach from the slowest step to the fastest.
    """
    ends = []
    for place, (engine, method) in enumerate(product(LINES, METHODS)):
        own = sorted(
            (row for row in rows if row.cell.method == method and row.cell.engine in (engine, "none")),
            key=lambda row: row.cell.processes,
        )
        if not any(row.cell.engine == engine for row in own):
            continue
        factors = [row.cell.processes if together else 1 for row in own]
        values = [row.tokens_per_second * factor for row, factor in zip(own, factors, strict=True)]
        bars = [
            [abs(row.speeds[end] * factor - value) for row, factor, value in zip(own, factors, values, strict=True)]
            for end in (0, 1)
        ]
        # Side by side, so that no bar hides another; the row of one process is that of both backends.
        numbers = [
            row.cell.processes * 2 ** (0.03 * ((place if row.cell.processes > 1 else place % len(METHODS)) - 2))
            for row in own
        ]
        look = {"color": COLORS[method], "linestyle": LINES[engine], "marker": "o", "markersize": 3}
        axes.errorbar(numbers, values, yerr=bars, linewidth=1.2, elinewidth=0.8, capsize=2, **look)
        ends.append((values[-1], own[-1].cell.processes, f"{METHODS[method]}, {ENGINES[engine]}", COLORS[method]))
    heights = apart([value for value, *_ in ends], axes.get_ylim()[1] / 18)
    for height, (_, number, label, color) in zip(heights, ends, strict=True):
        axes.text(number * 2**0.16, height, label, color=color, va="center")


def apart(values: Sequence[float], gap: float) -> list[float]:
    """Heights of labels beside values: from the highest down, each at least `gap` below the one above it."""
    heights = [0.0] * len(values)
    above = float("inf")
    for place in sorted(range(len(values)), key=lambda place: -values[place]):
        above = heights[place] = min(values[place], above - gap)
    return heights
