"""How a picture comes to its file."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.figure import Figure

from ...runs.files import write_whole

__all__ = ["save_figure"]


def save_figure(figure: Figure, file: Path) -> None:
    """Write a figure, of the kind that the file's ending names (`.png`, `.svg`), whole or not at all."""
    picture = io.BytesIO()
    figure.savefig(picture, format=file.suffix.removeprefix("."))
    write_whole(file, picture.getvalue())
