"""Which commit of this library runs, where it runs from a checkout."""

from __future__ import annotations

import subprocess
from pathlib import Path

__all__ = ["commit"]


def commit() -> str | None:
    """The commit, marked where code differs from it; None for an installed library."""
    if git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None  # a checkout of something else, within which the library is installed
    described = git("describe", "--always", "--abbrev=12", "--exclude=*")
    changed = git("diff", "--quiet", "HEAD", "--", ":(top)*.py", ":(top)pyproject.toml") is None
    return described and f"{described}{'-dirty' if changed else ''}"


def git(*arguments: str) -> str | None:
    """What git says about the folder of this file; None where it fails or is not there."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
