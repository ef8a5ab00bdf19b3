"""Make the tables of the runs of `ist train`, from their JSON files alone: in the README, and in this folder."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from ist.experiments.report import draw_report
from ist.runs.history import HISTORY_FILE

HERE = Path(__file__).parent
RESULTS = HERE / "results"
ROOT = HERE.parents[1]
BEGIN = "<!-- quickstart: made by `make tables` from benchmarks/train/results/quickstart-cpu.json -->"
END = "<!-- end of quickstart -->"
COLUMNS = ("run", "method", "steps", "loss before", "after", "answers before", "after", "s", "GiB", "device", "commit")


def quickstart_table(result: dict[str, Any]) -> str:
    """The figures before and after, and where they come from."""
    before, after = result["before"], result["after"]
    rows = [
        ("exact match on 100 held-out problems", f"{before['accuracy']:.0%}", f"{after['accuracy']:.0%}"),
        ("validation loss, nats a token", f"{before['loss']:.2f}", f"{after['loss']:.2f}"),
    ]
    lines = ["| | before | after |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in rows)]
    lines += [
        "",
        f"{result['num_steps']} steps in {result['train_seconds'] / 60:.1f} minutes, "
        f"{result['peak_memory_bytes'] / 2**30:.1f} GiB at the peak, on {result['device']} "
        f"(torch {result['versions']['torch']}, commit {result['commit']}).",
    ]
    return "\n".join(lines)


def all_runs(results: list[dict[str, Any]]) -> str:
    """A row for each run."""
    lines = [
        "# Runs of `ist train`",
        "",
        "Made by `make tables` from `results/*.json`, which hold the flags. One run each, one seed: leads, not",
        "results. Validation loss in nats a token, right answers to held-out problems. Compare only runs of one task",
        "on one device and commit.",
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    for result in results:
        before, after = result["before"], result["after"]
        answers = [f"{figures['accuracy']:.0%}" if "accuracy" in figures else "–" for figures in (before, after)]
        cells = [
            result["name"],
            result["method"],
            str(result["num_steps"]),
            f"{before['loss']:.3f}",
            f"{after['loss']:.3f}",
            *answers,
            f"{result['train_seconds']:.0f}",
            f"{result['peak_memory_bytes'] / 2**30:.2f}",
            result["device"],
            result["commit"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the README's table and picture, and the table of all runs."""
    results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(RESULTS.glob("*.json"))]
    (HERE / "README.md").write_text(all_runs(results), encoding="utf-8")
    quickstart = next(result for result in results if result["name"] == "quickstart-cpu")
    readme = ROOT / "README.md"
    head, rest = readme.read_text(encoding="utf-8").split(BEGIN)
    tail = rest.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n{quickstart_table(quickstart)}\n{END}{tail}", encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(RESULTS / "quickstart-cpu.jsonl", Path(folder) / HISTORY_FILE)
        shutil.copy(draw_report(folder), ROOT / "docs" / "images" / "importance.png")


if __name__ == "__main__":
    main()
