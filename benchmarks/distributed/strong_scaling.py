"""Strong scaling as a table: one batch, split over more GPUs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from grid import ENGINES, METHODS  # noqa: E402
from scaling import Row, sources, spread_of  # noqa: E402

from pages import markdown  # noqa: E402

__all__ = ["strong_table"]


def strong_table(rows: Sequence[Row]) -> str:
    """Tokens a second of all GPUs together on the same batch, and how many times that of one GPU; empty without a batch
    that was split in several ways.

    Args:
        rows: of one kind of GPU.
    """
    measured = [row for row in rows if row.error is None and not row.cell.late]
    groups: dict[tuple[str, int, int], list[Row]] = {}
    for row in measured:
        groups.setdefault((row.cell.size, row.cell.rows * row.cell.processes, row.cell.tokens), []).append(row)
    groups = {kind: own for kind, own in groups.items() if len({row.cell.processes for row in own}) > 1}
    numbers = sorted({row.cell.processes for own in groups.values() for row in own})
    lines = []
    for (size, total, tokens), own in groups.items():
        found = {(row.cell.processes, row.cell.engine, row.cell.method): row for row in own}
        for engine in ("ddp", "fsdp2"):
            for method in METHODS:
                cells = [found.get((number, engine if number > 1 else "none", method)) for number in numbers]
                if any(row and row.cell.engine == engine for row in cells):
                    start = (size, f"{total} × {tokens}", ENGINES[engine], METHODS[method])
                    lines.append((*start, *map(strong_text, cells, [cells[0]] * len(cells))))
    if not lines:
        return ""
    columns = tuple(f"{number} GPU{'s' if number > 1 else ''}" for number in numbers)
    table = markdown(("shape", "batch of all", "backend", "method", *columns), lines)
    shown = [row for own in groups.values() for row in own]
    steps = spread_of([len(row.line["step_seconds"]) for row in shown])
    note = (
        f"Strong scaling: tokens/s of all GPUs together by the median of {steps} steps (by the slowest to by the "
        "fastest), and how many times the first column's."
    )
    return f"{table}\n\n{note} {sources(shown)}"


def strong_text(row: Row | None, first: Row | None) -> str:
    """A cell of `strong_table`."""
    if row is None:
        return "not run"
    number = row.cell.processes
    text = f"{row.tokens_per_second * number:.0f} ({spread_of([speed * number for speed in row.speeds])})"
    if first is None or first is row:
        return text
    return f"{text}, {row.tokens_per_second * number / (first.tokens_per_second * first.cell.processes):.2f} ×"
