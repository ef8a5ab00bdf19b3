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
from scaling import Row, spread_of  # noqa: E402

__all__ = ["apart", "draw", "panels_of", "strong_rows", "weak_rows"]

COLORS = {"lora": "0.4", "sampled": "tab:blue", "focused": "tab:red"}
LINES = {"ddp": "--", "fsdp2": "-"}


def draw(file: Path, rows: Sequence[Row]) -> None:
    """A panel of weak scaling for each shape (tokens/s of each GPU), and one of strong scaling (of all together) where
    one batch was split over several numbers of GPUs.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = panels_of([row for row in rows if row.error is None and not row.cell.late])
    columns = len(shown) if len(shown) < 4 else 2
    lines = -(-len(shown) // columns)
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.2 * columns, 4 * lines), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        panels = figure.subplots(lines, columns, squeeze=False).flat
        for (own, together), axes in zip(shown, panels, strict=False):
            draw_panel(axes, own, together)
        for axes in panels:  # Places without rows.
            axes.set_axis_off()
        figure.supxlabel(footnote([row for own, _ in shown for row in own]), color="0.4", fontsize=9)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Software": None})


def panels_of(rows: Sequence[Row]) -> list[tuple[list[Row], bool]]:
    """The rows of each panel, and whether they are of one batch for all GPUs together."""
    shapes: dict[str, list[Row]] = {}
    for row in rows:
        shapes.setdefault(row.cell.size, []).append(row)
    panels = []
    for own in shapes.values():
        panels.append((weak_rows(own), False))
        if len({row.cell.processes for row in strong_rows(own)}) > 1:
            panels.append((strong_rows(own), True))
    return panels


def footnote(rows: Sequence[Row]) -> str:
    """What a point and its bar are."""
    steps = spread_of([len(row.line["step_seconds"]) for row in rows])
    text = f"Medians of {steps} steps, bars from the slowest to the fastest."
    intervals = [row.line["schedule"]["interval"] for row in rows if row.cell.method == "sampled"]
    if intervals:
        text += f" Sampled training with a measurement of importance every {spread_of(intervals)} steps."
    return text


def draw_panel(axes: Any, rows: Sequence[Row], together: bool) -> None:
    """The curves of one shape, over the numbers of GPUs that were measured, with a title."""
    cell = rows[0].cell
    batch = cell.rows * (cell.processes if together else 1)
    numbers = sorted({row.cell.processes for row in rows})
    kind, of, on = ("Strong", "all GPUs", "in all") if together else ("Weak", "each GPU", "on each")
    title = f"{cell.size.upper()}, {batch} × {cell.tokens} tokens {on}"
    axes.set_title(f"{kind} scaling, {title}" if len(numbers) > 1 else title)
    axes.set(xlabel="GPUs", ylabel=f"tokens/s of {of}")
    axes.set_xscale("log", base=2)
    axes.set(ylim=(0, 1.08 * max(row.speeds[1] * (row.cell.processes if together else 1) for row in rows)))
    draw_curves(axes, rows, together)
    axes.set(xlim=(numbers[0] / 1.2, numbers[-1] * 2.3))  # Room for the names of the curves.
    axes.set_xticks(numbers)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:.0f}")


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
