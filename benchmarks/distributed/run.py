"""Measure steps of LoRA, sampled and focused training on the GPUs of one node, or on CPU processes.

python benchmarks/distributed/run.py node --sizes 13b 70b --processes 1 2 4 8
python benchmarks/distributed/run.py cpu --sizes tiny --processes 1 2 4 --tokens 32

Each cell is a training in processes of its own, which this program starts, and adds one line to `results/NAME.jsonl`.
Cells that have a line there are skipped, so a run that was cut off is continued by the same command. `make tables` puts
the results into the pages.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from grid import ENGINES, METHODS, plan  # noqa: E402
from measuring import read_rows, run_cells  # noqa: E402

from harness import SHAPES  # noqa: E402


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the result")
    parser.add_argument("--sizes", choices=SHAPES, nargs="+", default=["13b", "70b"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--engines", choices=[name for name in ENGINES if name != "none"], nargs="+")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--rows", type=int, default=2, help="of each process, for weak scaling")
    parser.add_argument("--total-rows", type=int, default=8, help="of all processes, for strong scaling; 0: none")
    parser.add_argument("--tokens", type=int, default=512, help="of a row")
    parser.add_argument("--late", type=float, default=5.0, help="seconds by which one rank is late to measure; 0: no")
    parser.add_argument("--interval", type=int, default=10, help="steps between two measurements")
    parser.add_argument("--rounds", type=int, default=2, help="of so many steps, which are timed")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a cell")
    parser.add_argument("--again", action="store_true", help="measure cells again that have failed")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    given = parser.parse_args(arguments)
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
    file = given.results / f"{given.name}.jsonl"
    if given.again and file.exists():
        kept = [json.dumps(row) + "\n" for row in read_rows(file) if "error" not in row]
        file.write_text("".join(kept), encoding="utf-8")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # So that the workers are ended too.
    run_cells(cells, file, {"interval": given.interval, "rounds": given.rounds}, given.limit)
    print(file)


if __name__ == "__main__":
    main()
