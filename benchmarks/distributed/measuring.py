"""Runs cells one after the other, and keeps what came of each as a line of a file."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from bytes_on_paper import state_bytes  # noqa: E402
from estimate import expected_seconds  # noqa: E402
from grid import Cell  # noqa: E402
from workers import CellError, Workers  # noqa: E402

import ist  # noqa: E402
from commit import commit, versions  # noqa: E402
from harness import GIB  # noqa: E402

__all__ = ["Planned", "Trial", "measure", "read_rows", "run_cells"]

Planned = tuple[Cell, dict[str, int]]
"""A cell, and the `interval`, `rounds` and `warm_up` of its schedule."""


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a results file; a last line that was cut off is left out."""
    lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]


def too_large(cell: Cell) -> str | None:
    """Why a cell need not be started: what it keeps between steps is more than a GPU has; None otherwise."""
    if not torch.cuda.is_available():
        return None
    needed = sum(state_bytes(cell.size, cell.method, cell.engine, cell.processes)[0].values())
    if needed <= torch.cuda.get_device_properties(0).total_memory:
        return None
    return f"does not fit: weights, gradients and optimizer state take {needed / GIB:.0f} GiB on each GPU"


class Trial:
    """A cell whose processes have been started, which import and wait; a context that ends them."""

    def __init__(self, cell: Cell, schedule: Mapping[str, int], limit: float) -> None:
        self._error = too_large(cell)
        self._folder = tempfile.TemporaryDirectory()
        self._file = Path(self._folder.name) / "row.json"
        given = json.dumps({"cell": asdict(cell), "schedule": schedule, "limit": limit})
        command = [str(HERE / "worker.py"), given, str(self._file)]
        self._workers = None if self._error else Workers(command, cell.processes, limit)

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, *_: object) -> None:
        if self._workers:
            self._workers.__exit__()
        self._folder.cleanup()

    def row(self) -> dict[str, Any]:
        """Let the processes run; their figures, or why there are none."""
        error = self._error
        if self._workers:
            try:
                self._workers.finish()
                return json.loads(self._file.read_text(encoding="utf-8"))
            except CellError as failed:
                error = str(failed)
        return {"error": error, "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"}


def measure(cell: Cell, schedule: Mapping[str, int], limit: float) -> dict[str, Any]:
    """The row of a cell: its figures, or why there are none."""
    with Trial(cell, schedule, limit) as trial:
        return trial.row()


class Ahead:
    """Rows of cells in their order, where the processes of the next cell are started before this one's run.

    Importing takes as long as the steps of a short cell, and needs no GPU.
    """

    def __init__(self, left: Sequence[Planned], limit: float, ahead: bool) -> None:
        self._left, self._limit, self._ahead = [*left], limit, ahead
        self._next: tuple[Planned, Trial] | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        if self._next:
            self._next[1].__exit__()
        self._next = None

    def row(self, planned: Planned) -> dict[str, Any]:
        """That of the cell; those before it that were left out are skipped."""
        if self._next is None or self._next[0] != planned:
            self.__exit__()
            self._next = planned, Trial(*planned, self._limit)
        trial, self._next = self._next[1], None
        with trial:
            after = self._left[self._left.index(planned) + 1 :]
            if self._ahead and after:
                self._next = after[0], Trial(*after[0], self._limit)
            return trial.row()


def run_cells(
    planned: Sequence[Planned],
    file: Path,
    limit: float,
    within: float = float("inf"),
    ahead: bool = False,
) -> None:
    """Measure the cells that have no row in `file` yet; those with more processes than there are GPUs stay not run.

    Args:
        planned: cells, each with its `interval`, `rounds` and `warm_up`.
        file: gets a line for each cell, as soon as it has been measured.
        limit: seconds for a cell.
        within: seconds for all; a cell that would take longer than what is left is not run.
        ahead: start the processes of the next cell before this one's run.
    """
    begin = time.monotonic()
    rows = read_rows(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = {Cell(**row["cell"]).key for row in rows}
    source = {"commit": commit(), "versions": {"ist": ist.__version__, **versions("torch", "transformers", "peft")}}
    gpus = torch.cuda.device_count()
    kind = "cuda" if gpus else "cpu"
    left = [(cell, own) for cell, own in planned if cell.key not in done and not 0 < gpus < cell.processes]
    total = sum(expected_seconds(cell, schedule, kind) for cell, schedule in left)
    print(f"{len(left)} cells to measure, about {total:.0f} s", flush=True)
    timed: list[dict[str, Any]] = []
    with Ahead(left, limit, ahead) as trials:
        for number, (cell, schedule) in enumerate(planned, 1):
            if cell.key in done:
                continue
            title = f"{number} of {len(planned)}: {cell.name}"
            if 0 < gpus < cell.processes:
                print(f"{title}: not run, there are {gpus} GPUs", flush=True)
                continue
            expected = expected_seconds(cell, schedule, kind, timed)
            start = time.monotonic()
            if start + expected > begin + within:
                spare = begin + within - start
                print(f"{title}: not run, about {expected:.0f} s with {spare:.0f} s left", flush=True)
                continue
            print(f"{title}: about {expected:.0f} s", flush=True)
            row = {**trials.row((cell, schedule)), "seconds": round(time.monotonic() - start, 1)}
            date = datetime.now(timezone.utc).isoformat(timespec="seconds")
            timed.append({"cell": asdict(cell), **row, **source, "schedule": schedule, "date": date})
            with file.open("a", encoding="utf-8") as out:
                out.write(json.dumps(timed[-1]) + "\n")
            print(f"{title}: {row.get('error', 'measured')}, {row['seconds']:.0f} s", flush=True)
