"""Which commit a benchmark ran."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

__all__ = ["commit"]


def commit() -> str:
    """The commit of the checkout, marked where files differ from it; `COMMIT` names it where there is no checkout."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() or "unknown"
