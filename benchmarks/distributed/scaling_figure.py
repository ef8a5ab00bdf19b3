"""The figure of weak and strong scaling, from the lines of run.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from grid import ENGINES, METHODS  # noqa: E402
from scaling import Row  # noqa: E402

__all__ = ["draw", "strong_rows", "weak_rows"]

COLORS = {"lora": "0.4", "sampled": "tab:blue", "focused": "tab:red"}
LINES = {"ddp": "--", "fsdp2": "-"}


def draw(file: Path, rows: Sequence[Row]) -> None:
    """Weak scaling (tokens/s of each process) and strong scaling (of all together), a row of panels for each shape."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.error is None and not row.cell.late]
    sizes = list(dict.fromkeys(row.cell.size for row in rows))
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 4 * len(sizes)), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(sizes), 2, squeeze=False)
        for (weak, strong), size in zip(panels, sizes, strict=True):
            own = [row for row in rows if row.cell.size == size]
            draw_curves(weak, weak_rows(own), together=False)
            draw_curves(strong, strong_rows(own), together=True)
            weak.set(title=f"{size}, weak scaling", xlabel="processes", ylabel="tokens/s of each", ylim=(0, None))
            strong.set(title=f"{size}, strong scaling", xlabel="processes", ylabel="tokens/s of all", ylim=(0, None))
            weak.legend(frameon=False)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Software": None})


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
    process where that was measured.
    """
    for engine in ("ddp", "fsdp2"):
        for method in METHODS:
            own = sorted(
                (row for row in rows if row.cell.method == method and row.cell.engine in (engine, "none")),
                key=lambda row: row.cell.processes,
            )
            if not any(row.cell.engine == engine for row in own):
                continue
            numbers = [row.cell.processes for row in own]
            values = [row.tokens_per_second * (row.cell.processes if together else 1) for row in own]
            label = f"{METHODS[method]}, {ENGINES[engine]}"
            axes.plot(numbers, values, LINES[engine], color=COLORS[method], marker="o", markersize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row.cell.processes for row in rows}))
    axes.xaxis.set_major_formatter("{x:.0f}")
