"""Where the tests note what they saw of each engine: the table in the texts is made from it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

FOLDER = "IST_MATRIX"
"""Environment variable: the folder for the notes. Without it none are taken."""


def note(engine: str, option: str, processes: int, outcome: str, test: str) -> None:
    """Note the outcome of one case: `right`, or what was seen instead."""
    if folder := os.environ.get(FOLDER):
        fields = {"engine": engine, "option": option, "processes": processes, "outcome": outcome, "test": test}
        name = re.sub(r"\W+", "-", f"{engine} {option} {processes}")
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name}.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
