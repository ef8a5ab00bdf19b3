"""Which commit a benchmark ran."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

__all__ = ["commit"]


def commit() -> str:
    """The commit of the checkout, marked where code differs from it; `COMMIT` names it where there is no checkout."""
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    described = git("describe", "--always", "--abbrev=12").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", ":(top)*.py", ":(top)pyproject.toml").returncode
    return f"{described}{'-dirty' if changed else ''}" if described else "unknown"


def git(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What git says about this checkout."""
    return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
