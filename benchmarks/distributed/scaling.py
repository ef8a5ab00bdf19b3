"""What the lines of run.py say: figures of a row, and the tables and the figure that are made of them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median, quantiles
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
    "draw",
    "grid_table",
    "load_rows",
    "probe_table",
    "rows_of_one_gpu",
    "traffic_table",
]

COMMAND = "python benchmarks/distributed/run.py node --sizes 13b 70b --processes 1 2 4 8"
PLANNED = (("13b", "70b"), (1, 2, 4, 8))
"""What that measures."""
COLORS = {"lora": "0.4", "sampled": "tab:blue", "focused": "tab:red"}
LINES = {"none": "-", "ddp": "--", "fsdp2": "-"}


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
        """Quartiles of that."""
        low, _, high = quantiles(self.line["step_seconds"], n=4, method="inclusive")
        return low, high

    @property
    def probe(self) -> float | None:
        """Median seconds of a measurement of importance, with the update; None where there is none."""
        return median(self.line["probe_seconds"]) if self.line["probe_seconds"] else None

    @property
    def whole_step(self) -> float:
        """Seconds of a step with its share of a measurement."""
        return self.step + (self.probe or 0.0) / self.line["schedule"]["interval"]

    @property
    def tokens_per_second(self) -> float:
        """Of each process."""
        return self.cell.rows * self.cell.tokens / self.whole_step

    @property
    def counted(self) -> Traffic:
        """Bytes of a step at the collectives, on average over a round."""
        steps = self.line["step_collectives"]
        return Traffic(mean(step["gathered"] for step in steps), mean(step["reduced"] for step in steps))

    @property
    def agreed(self) -> bool:
        """Whether all ranks chose, measured and learned the same."""
        return len(set(self.line["digests"])) == 1


def load_rows(folder: Path) -> list[Row]:
    """Every line of every `*.jsonl` of a folder; of a cell on one kind of device, the last."""
    rows: dict[Any, Row] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for text in file.read_text(encoding="utf-8").splitlines():
            row = Row(json.loads(text))
            rows[row.cell.key, row.line["device"]] = row
    return list(rows.values())


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


def sources(rows: Sequence[Row]) -> str:
    """Device, commit and versions of rows, each once."""
    return "; ".join(dict.fromkeys(source(row.line) for row in rows)) + "."


def cell_table(rows: Sequence[Row]) -> str:
    """Every figure of every cell."""
    header = (
        *("shape", "processes", "backend", "method", "batch of each", "step, median (quartiles)", "with measurements"),
        *("gathered a step", "reduced a step", "peak memory of a rank", "tokens/s of each"),
    )
    lines = []
    for row in rows:
        cell = row.cell
        late = f", one {cell.late:g} s late" if cell.late else ""
        start = (cell.size, str(cell.processes), ENGINES[cell.engine], METHODS[cell.method] + late)
        batch = f"{cell.rows} × {cell.tokens}"
        if row.error:
            lines.append((*start, batch, row.error, *("–",) * 5))
            continue
        low, high = row.spread
        lines.append(
            (
                *(*start, batch),
                f"{row.step * 1e3:.1f} ms ({low * 1e3:.1f} to {high * 1e3:.1f})",
                f"{row.whole_step * 1e3:.1f} ms",
                size_of(row.counted.gathered),
                size_of(row.counted.reduced),
                size_of(max(row.line["peak_bytes"])),
                f"{row.tokens_per_second:.0f}",
            )
        )
    return f"{markdown(header, lines)}\n\n{sources(rows)}" if lines else ""


def grid_table(rows: Sequence[Row], rows_of_each: int = 2, tokens: int = 512) -> str:
    """Tokens a second of each GPU under weak scaling: a line for a shape, backend and method, a column for a number of
    GPUs; planned cells without a row are named.

    Args:
        rows: of one kind of GPU.
        rows_of_each: of a batch, on each GPU.
        tokens: of a row.
    """
    sizes, numbers = PLANNED
    found = {row.cell.key: row for row in rows}

    def text(cell: Cell) -> str:
        row = found.get(cell.key)
        if row is None:
            return "not run"
        return f"{row.tokens_per_second:.0f}" if row.error is None else re.sub(r"^rank \d+: |: .*", "", row.error)

    lines = []
    for size in sizes:
        for engine in ("ddp", "fsdp2"):
            for method in METHODS:
                cells = (
                    Cell(
                        size=size,
                        processes=number,
                        engine=engine if number > 1 else "none",
                        method=method,
                        rows=rows_of_each,
                        tokens=tokens,
                    )
                    for number in numbers
                )
                lines.append((size, ENGINES[engine], METHODS[method], *map(text, cells)))
    columns = tuple(f"{number} GPU{'s' if number > 1 else ''}" for number in numbers)
    table = markdown(("shape", "backend", "method", *columns), lines)
    note = f"Tokens/s of each GPU, {rows_of_each} × {tokens} tokens on each. Cells not run: `{COMMAND}`."
    return f"{table}\n\n{note}" + (f" {sources([*found.values()])}" if found else "")


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
        *("shape", "processes", "backend", "late rank", "a measurement", "share of a step", "gathered by it"),
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
                "–" if cell.late else f"{share:.0%}",
                size_of(row.line["probe_collectives"]["gathered"]),
                f"{len(row.line['digests'])} of {len(row.line['digests'])}" if row.agreed else "**no**",
            )
        )
    if not lines:
        return ""
    return f"{markdown(header, lines)}\n\n{sources(shown)}"


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


def largest_group(rows: Sequence[Row], kind: Any) -> list[Row]:
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
