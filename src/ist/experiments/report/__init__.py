"""Pictures of a run, or of several side by side, from their histories alone."""

from __future__ import annotations

from .lines import draw_side_by_side
from .pictures import draw_report

__all__ = ["draw_report", "draw_side_by_side"]
