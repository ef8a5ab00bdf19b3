"""Make the tables of several processes, all here and the main ones in docs/distributed.md.

The first comes from the notes that `make test-dist` leaves in `.matrix`, which are gathered into
`results/matrix.json` (`matrix-NAME.json` for other machines). The lines of run.py go to the full page and to
docs/from-one-card-to-a-node.md; `cost_table` is of results that an earlier form of run.py wrote.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from fitted import fit_table  # noqa: E402
from paper_tables import beyond_table, measured_memory_table, memory_table  # noqa: E402
from scaling import (  # noqa: E402
    cell_table,
    grid_table,
    load_rows,
    probe_table,
    rows_of_one_gpu,
    traffic_table,
)
from scaling_figure import draw  # noqa: E402
from strong_scaling import strong_table  # noqa: E402

from commit import commit  # noqa: E402
from pages import fill, source, write_section  # noqa: E402

ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "distributed.md"
FULL_PAGE = HERE / "README.md"
NODE_PAGE = ROOT / "docs" / "from-one-card-to-a-node.md"
PICTURE = ROOT / "docs" / "images" / "scaling.png"
GROUPS = ("DDP", "FSDP2", "FSDP1", "Trainer")
"""Backends; all other rows of the tests are launchers and what is refused."""
NOTES = ROOT / ".matrix"
MATRIX = HERE / "results" / "matrix.json"
MATRIX_MARKS = (
    "<!-- matrix: made by `make tables` from the notes of `make test-dist` -->",
    "<!-- end of matrix -->",
)
OVERVIEW_MARKS = (
    "<!-- overview: made by `make tables` from the notes of `make test-dist` -->",
    "<!-- end of overview -->",
)
KILL_MARKS = (
    "<!-- kills: made by `make tables` from the figures of `make test-nightly` -->",
    "<!-- end of kills -->",
)
COST_MARKS = (
    "<!-- cost: made by `make tables` from benchmarks/distributed/results -->",
    "<!-- end of cost -->",
)


def gather(notes: Path, file: Path, device: str = "CPU, gloo") -> None:
    """Put the notes of a test run into one file, with the commit and the versions that were tested."""
    rows = [json.loads(note.read_text(encoding="utf-8")) for note in sorted(notes.glob("*.json"))]
    result = {
        "commit": commit(),
        "device": device,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
        "rows": rows,
    }
    file.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def matrix_table(result: dict[str, Any]) -> str:
    """Backend × option: with how many processes each was trained, or that it was refused."""
    grid: dict[str, dict[str, dict[str, set[int]]]] = {}
    others: dict[tuple[str, str], dict[str, set[int]]] = {}
    for row in result["rows"]:
        engine = row["engine"].removesuffix(", on a GPU")
        setting = re.fullmatch(r"checkpointing (\S+), accumulation \d+", row["option"])
        cell = (
            grid.setdefault(engine, {}).setdefault(setting[1], {})
            if setting
            else others.setdefault((engine, row["option"]), {})
        )
        cell.setdefault(row["outcome"], set()).add(row["processes"])
    columns = [name for name in ("none", "non-reentrant", "reentrant") if any(name in cells for cells in grid.values())]
    lines = ["| backend | " + " | ".join(f"checkpointing: {name}" for name in columns) + " |"]
    lines.append("|---" * (1 + len(columns)) + "|")
    for engine, cells in grid.items():
        lines.append(f"| {engine} | {' | '.join(shown(cells.get(name, {})) for name in columns)} |")
    lines += ["", "Each with gradients of one batch and accumulated over two."]
    if others:
        lines += ["", "| what | how | outcome |", "|---|---|---|"]
        lines += [f"| {engine} | {option} | {shown(cell)} |" for (engine, option), cell in others.items()]
    return "\n".join([*lines, "", f"Tested: {source(result)}."])


def overview(results: list[dict[str, Any]]) -> str:
    """A row for each backend: the settings tried, and how many trainings were right on each device."""
    rows = [{**row, "device": result["device"]} for result in results for row in result["rows"]]
    devices = [*dict.fromkeys(row["device"] for row in rows)]
    lines = [f"| backend | settings | {' | '.join(devices)} |", "|---" * (2 + len(devices)) + "|"]
    for group in GROUPS:
        own = [row for row in rows if row["engine"].startswith(f"{group},") and row["outcome"] != "refused"]
        names = (row["engine"].removesuffix(", on a GPU").removeprefix(f"{group}, ") for row in own)
        cells = []
        for device in devices:
            here = [row for row in own if row["device"] == device]
            cells.append(f"{sum(row['outcome'] == 'right' for row in here)} of {len(here)}" if here else "–")
        lines.append(f"| {group} | {'; '.join(dict.fromkeys(names))} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"{source(result)}." for result in results)])


def shown(outcomes: dict[str, set[int]]) -> str:
    """A cell: the outcome and the numbers of processes that it was seen with."""
    parts = []
    for outcome, counts in outcomes.items():
        processes = f"{' and '.join(map(str, sorted(counts)))} process{'' if counts == {1} else 'es'}"
        parts.append(f"{'✓' if outcome == 'right' else outcome} ({processes})")
    return ", ".join(parts) or "–"


def gather_kills(folder: Path, results: Path) -> None:
    """Keep the figures of the kill tests, with the commit that was tested."""
    for file in sorted(folder.glob("kills-*.json")):
        result = {"commit": commit(), **json.loads(file.read_text(encoding="utf-8"))}
        (results / file.name).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def kill_table(results: list[dict[str, Any]]) -> str:
    """How many kills, what they hit, and what a resumed training then differed in."""
    header = (
        "processes", "kills", "after the last checkpoint", "left an unfinished checkpoint", "steps done again",
        "runs that ended otherwise",
    )  # fmt: skip
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for result in results:
        kills = [kill for run in result["runs"] for kill in run["kills"]]
        lost = [kill["steps_lost"] for kill in kills]
        otherwise = sum(1 for run in result["runs"] if run.get("differing") != [])
        cells = (
            str(result["processes"]),
            str(len(kills)),
            str(sum(1 for kill in kills if kill["aim"] == "after the last checkpoint")),
            str(sum(1 for kill in kills if kill["damaged"])),
            f"{sum(lost) / len(lost):.1f} on average, {max(lost)} at most",
            f"{otherwise} of {len(result['runs'])}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    first = results[0]
    setting = f"{first['steps']} steps, a checkpoint every {first['save_steps']}; CPU, commit {first['commit']}."
    return "\n".join([*lines, "", setting])


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def cost_table(result: dict[str, Any]) -> str:
    """Time, bytes and memory of a step."""
    header = ("processes", "backend", "method", "step", "step with probes", "gradients sent", "memory of each rank")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in result["rows"]:
        cells = (
            str(row["processes"]),
            {"none": "–", "ddp": "DDP", "fsdp2": "FSDP2"}[row["engine"]],
            {"lora": "LoRA", "ist": "LoRA + IST"}[row["method"]],
            f"{row['median_step_seconds'] * 1e3:.0f} ms",
            f"{row['mean_step_seconds'] * 1e3:.0f} ms" if row["method"] == "ist" else "–",
            megabytes(row["reduced_bytes_per_step"]) if row["processes"] > 1 else "–",
            ", ".join(megabytes(count) for count in row["peak_memory_bytes"]),
        )
        lines.append(f"| {' | '.join(cells)} |")
    config = result["config"]
    shape = config["model"]
    setting = (
        f"A Llama of {shape['num_hidden_layers']} layers, width {shape['hidden_size']}, {config['dtype']}, "
        f"LoRA of rank {config['lora']['r']}, {config['batch_size']} × {config['length']} tokens a process; medians of "
        f"{config['steps']} steps, {result['repeats']} repeats. {source(result)}."
    )
    return "\n".join([*lines, "", setting])


def write_node_page(results: Path) -> None:
    """Fill the sections of docs/from-one-card-to-a-node.md, and the table of all cells on the full page."""
    rows = load_rows(results)
    on_gpus = rows_of_one_gpu(rows)
    scaled = len({row.cell.processes for row in on_gpus if row.error is None}) > 1
    if scaled:
        draw(PICTURE, on_gpus)
    figure = "\n\n![Tokens/s of each GPU by number of GPUs](images/scaling.png)" if scaled else ""
    strong = strong_table(on_gpus)
    sections = {
        "memory on paper": (NODE_PAGE, memory_table()),
        "measured memory": (NODE_PAGE, measured_memory_table(on_gpus)),
        "traffic": (NODE_PAGE, traffic_table(on_gpus)),
        "scaling": (NODE_PAGE, "\n\n".join(filter(None, [grid_table(on_gpus), strong])) + figure),
        "probes": (NODE_PAGE, probe_table(on_gpus)),
        "fit": (NODE_PAGE, fit_table(on_gpus)),
        "beyond a node": (NODE_PAGE, beyond_table(on_gpus)),
        "cells": (FULL_PAGE, cell_table(rows)),
    }
    for name, (page, text) in sections.items():
        write_section(name, [text] if text else [], page)


def main() -> None:
    if NOTES.is_dir():
        gather(NOTES, MATRIX)
    page, full = PAGE.read_text(encoding="utf-8"), FULL_PAGE.read_text(encoding="utf-8")
    matrices = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(HERE.glob("results/matrix*.json"))]
    if matrices:
        page = fill(page, OVERVIEW_MARKS, overview(matrices))
        full = fill(full, MATRIX_MARKS, "\n\n".join(matrix_table(result) for result in matrices))
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((HERE / "results").glob("*.json"))]
    if (NOTES / "kills").is_dir():
        gather_kills(NOTES / "kills", HERE / "results")
    kills = [json.loads(file.read_text(encoding="utf-8")) for file in sorted((HERE / "results").glob("kills-*.json"))]
    if kills:
        full = fill(full, KILL_MARKS, kill_table(kills))
    costs = [cost_table(result) for result in results if result.get("name")]
    PAGE.write_text(page, encoding="utf-8")
    FULL_PAGE.write_text(fill(full, COST_MARKS, "\n\n".join(costs)), encoding="utf-8")
    write_node_page(HERE / "results")


if __name__ == "__main__":
    main()
