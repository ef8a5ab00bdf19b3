"""Which cases of two runs differ, from their JSON files alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["compare_files", "compare_runs", "read_run"]

Run = dict[str, Any]
COLUMNS = ("adapters", "history", "losses")


def read_run(path: Path) -> Run:
    """Read the file of a run.

    Raises:
        ValueError: there is no such file, or it holds no cases.
    """
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): give a file that run.py wrote.") from error
    if not isinstance(run, dict) or not run.get("cases"):
        raise ValueError(f"{path} holds no cases: give a file that run.py wrote.")
    return run


def compare_runs(before: Run, after: Run) -> tuple[dict[str, list[str]], list[str]]:
    """Compare each case of two runs.

    Returns:
        For each case a word on its adapters, its history and its losses; and the names of the cases that differ. A case
        that is missing or was skipped in one run, or failed in any, differs.
    """
    names = list(dict.fromkeys([*before["cases"], *after["cases"]]))
    rows, different = {}, []
    for name in names:
        rows[name], equal = compare_case(before["cases"].get(name), after["cases"].get(name))
        if not equal:
            different.append(name)
    return rows, different


def compare_case(before: Run | None, after: Run | None) -> tuple[list[str], bool]:
    """A word for each column, and whether the case is equal in both runs."""
    words = [outcome(before), outcome(after)]
    if words == ["skipped", "skipped"]:
        return ["skipped in both"] * len(COLUMNS), True
    if before is None or after is None or words != ["trained", "trained"]:
        return [f"{words[0]} before, {words[1]} after"] * len(COLUMNS), False
    equal = [before[column] == after[column] for column in COLUMNS]
    row = ["equal" if same else "DIFFERENT" for same in equal]
    if not equal[-1]:
        row[-1] = f"DIFFERENT from step {first_difference(before['losses'], after['losses'])}"
    return row, all(equal)


def outcome(case: Run | None) -> str:
    """What became of a case in one run."""
    if case is None:
        return "missing"
    return next((word for word in ("skipped", "failed") if word in case), "trained")


def first_difference(before: list[float], after: list[float]) -> int:
    """The number of the first step whose losses differ, from 1; the step after the shorter list where that ends."""
    pairs = enumerate(zip(before, after, strict=False), start=1)
    return next((step for step, (old, new) in pairs if old != new), min(len(before), len(after)) + 1)


def compare_files(before: Path, after: Path) -> int:
    """Print a table of two runs.

    Returns:
        1 where any case differs, else 0.

    Raises:
        ValueError: a file is no run.
    """
    runs = read_run(before), read_run(after)
    rows, different = compare_runs(*runs)
    table = [["case", *COLUMNS], *([name, *row] for name, row in rows.items())]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print()
    for name in ("device", "versions"):
        if runs[0].get(name) != runs[1].get(name):
            print(f"The runs had different {name}, which can change rounding: {runs[0].get(name)}, {runs[1].get(name)}")
    commits = f"{runs[0].get('commit')} and {runs[1].get('commit')}"
    print(f"{commits}: {len(rows) - len(different)} of {len(rows)} cases are equal to the bit.")
    return 1 if different else 0
