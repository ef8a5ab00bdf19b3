"""Runs cells one after the other, and keeps what came of each as a line of a file."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
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
from workers import CellError, launch  # noqa: E402

import ist  # noqa: E402
from commit import commit, versions  # noqa: E402
from harness import GIB  # noqa: E402

__all__ = ["measure", "read_rows", "run_cells"]


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows of a results file; a last line that was cut off is left out."""
    lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]


def measure(cell: Cell, schedule: dict[str, int], limit: float) -> dict[str, Any]:
    """The row of a cell: its figures, or why there are none."""
    capacity = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    needed = sum(state_bytes(cell.size, cell.method, cell.engine, cell.processes)[0].values())
    if capacity is not None and needed > capacity:
        error = f"does not fit: weights, gradients and optimizer state take {needed / GIB:.0f} GiB on each GPU"
        return {"error": error, "device": torch.cuda.get_device_name()}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        given = json.dumps({"cell": asdict(cell), "schedule": schedule, "limit": limit})
        try:
            launch([str(HERE / "worker.py"), given, str(file)], cell.processes, limit)
            return json.loads(file.read_text(encoding="utf-8"))
        except CellError as error:
            return {"error": str(error), "device": torch.cuda.get_device_name() if capacity else "CPU"}


def run_cells(cells: Sequence[Cell], file: Path, schedule: dict[str, int], limit: float) -> None:
    """Measure the cells that have no row in `file` yet; those with more processes than there are GPUs stay not run."""
    rows = read_rows(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = {Cell(**row["cell"]).key for row in rows}
    source = {
        "commit": commit(),
        "versions": {"ist": ist.__version__, **versions("torch", "transformers", "peft")},
        "schedule": schedule,
    }
    gpus = torch.cuda.device_count()
    kind = "cuda" if gpus else "cpu"
    left = [cell for cell in cells if cell.key not in done and not 0 < gpus < cell.processes]
    total = sum(expected_seconds(cell, schedule, kind) for cell in left)
    print(f"{len(left)} cells to measure, about {total:.0f} s", flush=True)
    timed: list[dict[str, Any]] = []
    for number, cell in enumerate(cells, 1):
        if cell.key in done:
            continue
        title = f"{number} of {len(cells)}: {cell.name}"
        if 0 < gpus < cell.processes:
            print(f"{title}: not run, there are {gpus} GPUs", flush=True)
            continue
        print(f"{title}: about {expected_seconds(cell, schedule, kind, timed):.0f} s", flush=True)
        start = time.monotonic()
        row = {**measure(cell, schedule, limit), "seconds": round(time.monotonic() - start, 1)}
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        timed.append({"cell": asdict(cell), **row, **source, "date": date})
        with file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(timed[-1]) + "\n")
        print(f"{title}: {row.get('error', 'measured')}, {row['seconds']:.0f} s", flush=True)
