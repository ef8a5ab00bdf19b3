"""What a benchmark ran: its commit and the versions of packages."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path

__all__ = ["commit", "installed", "versions"]


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


def versions(*packages: str) -> dict[str, str]:
    """The versions of packages and of Python."""
    return {**{package: installed(package) for package in packages}, "python": platform.python_version()}


def installed(package: str) -> str:
    """The version of a package."""
    try:
        return version_of(package)
    except PackageNotFoundError:
        return "not installed"
