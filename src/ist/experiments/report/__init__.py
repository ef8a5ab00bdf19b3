"""Pictures of a run, from its history alone."""

from __future__ import annotations

from .pictures import draw_report

__all__ = ["draw_report"]
