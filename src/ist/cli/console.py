"""The console of every command: what is printed is neither rich's markup nor a terminal's escape."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.segment import Segment

from .printable import printable

__all__ = ["PlainConsole"]


class PlainConsole(Console):
    """Names and texts come out as they are: no markup in them, and their control characters shown.

    Colours and the moving line are segments' styles and controls, which stay.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, **options})

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render anything that rich can, a table's cells and a status line included."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))
