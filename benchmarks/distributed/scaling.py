"""What the lines of run.py say: figures of a row, and the tables that are made of them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from grid import ENGINES, METHODS, Cell  # noqa: E402
from model import Traffic, traffic  # noqa: E402

from pages import markdown, source  # noqa: E402

__all__ = [
    "COMMAND",
    "Row",
    "cell_table",
    "grid_table",
    "load_rows",
    "probe_table",
    "rows_of_one_gpu",
    "sources",
    "spread_of",
    "traffic_table",
]

COMMAND = "python benchmarks/distributed/run.py node --sizes 13b 70b --processes 1 2 4 8"
PLANNED = (("13b", "70b"), (1, 2, 4, 8))
"""What that measures."""


class Row:
    """A line of results: a cell, and its figures or the reason that it has none."""

    def __init__(self, line: dict[str, Any]) -> None:
        self.line = line
        self.cell = Cell(**line["cell"])
        self.error: str | None = line.get("error")

    @property
    def on_gpu(self) -> bool:
        return not self.line["device"].startswith("CPU")

    @property
    def step(self) -> float:
        """Median seconds of a step without the measurement."""
        return median(self.line["step_seconds"])

    @property
    def spread(self) -> tuple[float, float]:
        """Seconds of the fastest step and of the slowest."""
        return min(self.line["step_seconds"]), max(self.line["step_seconds"])

    @property
    def probe(self) -> float | None:
        """Median seconds of a measurement of importance, with the update; None where there is none."""
        return median(self.line["probe_seconds"]) if self.line["probe_seconds"] else None

    def with_measurement(self, step: float) -> float:
        """Seconds of a step that takes `step`, with its share of a measurement."""
        return step + (self.probe or 0.0) / self.line["schedule"]["interval"]

    @property
    def whole_step(self) -> float:
        """Seconds of a step with its share of a measurement."""
        return self.with_measurement(self.step)

    @property
    def tokens_per_second(self) -> float:
        """Of each process, by the median step."""
        return self.cell.rows * self.cell.tokens / self.whole_step

    @property
    def speeds(self) -> tuple[float, float]:
        """Tokens a second of each process by the slowest step and by the fastest."""
        fast, slow = (self.cell.rows * self.cell.tokens / self.with_measurement(step) for step in self.spread)
        return slow, fast

    @property
    def counted(self) -> Traffic:
        """Bytes of a step at the collectives, on average over a round."""
        steps = self.line["step_collectives"]
        return Traffic(mean(step["gathered"] for step in steps), mean(step["reduced"] for step in steps))

    @property
    def collectives(self) -> float:
        """How many a step has, on average over a round."""
        return mean(step["calls"] for step in self.line["step_collectives"])

    @property
    def agreed(self) -> bool:
        """Whether all ranks chose, measured and learned the same."""
        return len(set(self.line["digests"])) == 1


def load_rows(folder: Path) -> list[Row]:
    """The lines of every `*.jsonl` of a folder: of a cell on one kind of device, the last by date.

    One that failed replaces none that was measured.
    """
    lines = [
        (number, Row(json.loads(text)))
        for number, text in enumerate(
            text for file in sorted(folder.glob("*.jsonl")) for text in file.read_text(encoding="utf-8").splitlines()
        )
    ]
    best: dict[Any, tuple[bool, str, int, Row]] = {}
    for number, row in lines:
        own = (row.error is None, row.line.get("date", ""), number, row)
        key = row.cell.key, row.line["device"]
        best[key] = max(best.get(key, own), own, key=lambda rank: rank[:3])
    return [row for *_, row in best.values()]


def rows_of_one_gpu(rows: Sequence[Row]) -> list[Row]:
    """The rows of the kind of GPU that most cells were measured on; none where none was measured on a GPU."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        if row.on_gpu:
            kinds.setdefault(row.line["device"], []).append(row)
    return max(kinds.values(), key=len, default=[])


def size_of(count: float) -> str:
    """Bytes for people."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count / 1e3:.1f} kB" if count else "–"


def spread_of(values: Sequence[float], scale: float = 1.0) -> str:
    """The least and the most in whole numbers, once where they are the same."""
    return " to ".join(dict.fromkeys(f"{value * scale:.0f}" for value in (min(values), max(values))))


def sources(rows: Sequence[Row]) -> str:
    """Device, commits and versions of rows."""
    commits: dict[str, list[str]] = {}
    for row in rows:
        same = commits.setdefault(source({**row.line, "commit": "{}"}), [])
        if row.line["commit"] not in same:
            same.append(row.line["commit"])
    return "; ".join(text.replace("{}", ", ".join(own)) for text, own in commits.items()) + "."


def cell_table(rows: Sequence[Row]) -> str:
    """Every figure of every cell."""
    header = (
        *(
            "shape",
            "processes",
            "backend",
            "method",
            "batch of each",
            "steps timed",
            "median (fastest to slowest)",
            "with measurements",
        ),
        *("gathered a step", "reduced a step", "peak memory of the ranks", "tokens/s of each"),
    )
    lines = []
    for row in rows:
        cell = row.cell
        late = f", one {cell.late:g} s late" if cell.late else ""
        start = (cell.size, str(cell.processes), ENGINES[cell.engine], METHODS[cell.method] + late)
        batch = f"{cell.rows} × {cell.tokens}"
        if row.error:
            lines.append((*start, batch, row.error, *("–",) * 6))
            continue
        low, high = row.spread
        lines.append(
            (
                *(*start, batch, str(len(row.line["step_seconds"]))),
                f"{row.step * 1e3:.1f} ms ({low * 1e3:.1f} to {high * 1e3:.1f})",
                f"{row.whole_step * 1e3:.1f} ms",
                size_of(row.counted.gathered),
                size_of(row.counted.reduced),
                " to ".join(dict.fromkeys(map(size_of, (min(row.line["peak_bytes"]), max(row.line["peak_bytes"]))))),
                f"{row.tokens_per_second:.0f}",
            )
        )
    return f"{markdown(header, lines)}\n\n{sources(rows)}" if lines else ""


def grid_table(rows: Sequence[Row], rows_of_each: int = 2, tokens: int = 512) -> str:
    """Tokens a second of each GPU under weak scaling: a line for a shape, backend and method, a column for a number of
    GPUs; planned cells without a row are named, and a shape without any has one line.

    Args:
        rows: of one kind of GPU.
        rows_of_each: of a batch, on each GPU.
        tokens: of a row.
    """
    if not rows:
        return f"Not measured yet: `{COMMAND}`."
    sizes, numbers = PLANNED
    found = {row.cell.key: row for row in rows}

    def text(cell: Cell) -> str:
        row = found.get(cell.key)
        if row is None:
            return "not run"
        if row.error is not None:
            return re.sub(r"^rank \d+: |: .*", "", row.error)
        return f"{row.tokens_per_second:.0f} ({spread_of(row.speeds)})"

    lines = []
    shown: list[Row] = []
    for size in sizes:
        if not any(row.cell.size == size for row in rows):
            lines.append((size, "DDP, FSDP2", "all", *["not run"] * len(numbers)))
            continue
        for engine in ("ddp", "fsdp2"):
            if not any(row.cell.size == size and row.cell.engine in (engine, "none") for row in rows):
                lines.append((size, ENGINES[engine], "all", *["not run"] * len(numbers)))
                continue
            for method in METHODS:
                cells = [
                    Cell(
                        size=size,
                        processes=number,
                        engine=engine if number > 1 else "none",
                        method=method,
                        rows=rows_of_each,
                        tokens=tokens,
                    )
                    for number in numbers
                ]
                shown += [found[cell.key] for cell in cells if cell.key in found]
                lines.append((size, ENGINES[engine], METHODS[method], *map(text, cells)))
    columns = tuple(f"{number} GPU{'s' if number > 1 else ''}" for number in numbers)
    table = markdown(("shape", "backend", "method", *columns), lines)
    measured = [row for row in shown if row.error is None]
    steps = spread_of([len(row.line["step_seconds"]) for row in measured] or [0])
    sampled = [row for row in measured if row.cell.method == "sampled"]
    intervals = spread_of([row.line["schedule"]["interval"] for row in sampled] or [0])
    note = (
        f"Tokens/s of each GPU by the median of {steps} steps (by the slowest to by the fastest), {rows_of_each} × "
        f"{tokens} tokens on each; sampled training with a measurement of importance every {intervals} steps. Cells "
        f"not run, and strong scaling: `{COMMAND}`."
    )
    return f"{table}\n\n{note} {sources(list(dict.fromkeys(shown)) or rows)}"


def traffic_table(rows: Sequence[Row]) -> str:
    """Bytes counted at the collectives beside those on paper."""
    lines = []
    for row in rows:
        cell = row.cell
        if row.error or cell.processes == 1 or cell.late:
            continue
        paper = traffic(cell.size, cell.method, cell.engine, cell.processes)
        start = (cell.size, str(cell.processes), ENGINES[cell.engine], METHODS[cell.method])
        counted = row.counted
        lines.append(
            (*start, *map(size_of, (counted.gathered, paper.gathered, counted.reduced, paper.reduced))),
        )
    if not lines:
        return ""
    header = ("shape", "processes", "backend", "method", "gathered", "on paper", "reduced", "on paper")
    return f"{markdown(header, dict.fromkeys(lines))}\n\n{sources([row for row in rows if not row.error])}"


def probe_table(rows: Sequence[Row]) -> str:
    """Measurements of importance: what they cost, and whether all ranks came to the same."""
    header = (
        *("shape", "processes", "backend", "late rank", "a measurement", "share of the time", "gathered by it"),
        "ranks agree",
    )
    lines, shown = [], []
    for row in rows:
        cell = row.cell
        if row.error or row.probe is None or cell.processes == 1:
            continue
        shown.append(row)
        share = row.probe / row.line["schedule"]["interval"] / row.whole_step
        lines.append(
            (
                *(cell.size, str(cell.processes), ENGINES[cell.engine]),
                f"by {cell.late:g} s" if cell.late else "none",
                f"{row.probe * 1e3:.0f} ms",
                "–" if cell.late else f"{share:.0%}, every {row.line['schedule']['interval']} steps",
                size_of(row.line["probe_collectives"]["gathered"]),
                f"{len(row.line['digests'])} of {len(row.line['digests'])}" if row.agreed else "**no**",
            )
        )
    if not lines:
        return ""
    return f"{markdown(header, lines)}\n\n{sources(shown)}"
