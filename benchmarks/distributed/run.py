"""Measure steps of LoRA, sampled and focused training on the GPUs of one node, or on CPU processes.

python benchmarks/distributed/run.py node --sizes 13b 70b --processes 1 2 4 8
python benchmarks/distributed/run.py cpu --sizes tiny --processes 1 2 4 --tokens 32

Each cell is a training in processes of its own, which this program starts, and adds one line to `results/NAME.jsonl`.
Cells that have a line there are skipped, so a run that was cut off is continued by the same command. The flags of more
cells follow after `--then`. `make tables` puts the results into the pages.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from grid import ENGINES, METHODS, plan  # noqa: E402
from measuring import Planned, read_rows, run_cells  # noqa: E402

from harness import SHAPES  # noqa: E402


def cells_of(arguments: Sequence[str], parser: argparse.ArgumentParser) -> list[Planned]:
    """Cells and their schedules of one group of flags."""
    given = parser.parse_args(arguments)
    schedule = {"interval": given.interval, "rounds": given.rounds, "warm_up": given.warm_up}
    cells = plan(
        given.sizes,
        given.processes,
        given.engines or ["ddp", "fsdp2"],
        given.methods,
        given.rows,
        given.total_rows,
        given.tokens,
        given.late,
    )
    return [(cell, schedule) for cell in cells if cell.late or not given.only_late]


def cell_flags() -> argparse.ArgumentParser:
    """What may stand again after each `--then`."""
    parser = argparse.ArgumentParser(prog="run.py, after --then", add_help=False)
    add = parser.add_argument
    add("--sizes", choices=SHAPES, nargs="+", default=["13b", "70b"])
    add("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    add("--engines", choices=[name for name in ENGINES if name != "none"], nargs="+")
    add("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    add("--rows", type=int, default=2, help="of each process, for weak scaling")
    add("--total-rows", type=int, default=8, help="of all processes, for strong scaling; 0: none")
    add("--tokens", type=int, default=512, help="of a row")
    add("--late", type=float, default=5.0, help="seconds by which one rank is late to measure; 0: no")
    add("--only-late", action="store_true", help="no cells but those with a late rank")
    add("--interval", type=int, default=10, help="steps between two measurements")
    add("--rounds", type=int, default=2, help="of so many steps, which are timed")
    add("--warm-up", type=int, default=1, help="rounds of so many steps before those")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    first, *others = split(sys.argv[1:] if arguments is None else arguments)
    flags = cell_flags()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[flags]
    )
    parser.add_argument("name", help="of the result")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a cell")
    parser.add_argument("--within", type=float, default=float("inf"), help="seconds for all; longer cells are not run")
    parser.add_argument(
        "--ahead",
        action=argparse.BooleanOptionalAction,
        help="start the next cell's processes before this one's run; without a word, on GPUs",
    )
    parser.add_argument("--again", action="store_true", help="measure cells again that have failed")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    given = parser.parse_args(first)
    planned = [*cells_of(first, parser), *(own for group in others for own in cells_of(group, flags))]
    unique: dict[Any, Planned] = {}
    for cell, schedule in planned:
        unique.setdefault(cell.key, (cell, schedule))
    file = given.results / f"{given.name}.jsonl"
    if given.again and file.exists():
        kept = [json.dumps(row) + "\n" for row in read_rows(file) if "error" not in row]
        file.write_text("".join(kept), encoding="utf-8")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # So that the workers are ended too.
    ahead = torch.cuda.is_available() if given.ahead is None else given.ahead
    run_cells([*unique.values()], file, given.limit, given.within, ahead)
    print(file)


def split(arguments: Sequence[str]) -> list[list[str]]:
    """The flags before the first `--then`, and those after each."""
    groups: list[list[str]] = [[]]
    for argument in arguments:
        if argument == "--then":
            groups.append([])
        else:
            groups[-1].append(argument)
    return groups


if __name__ == "__main__":
    main()
