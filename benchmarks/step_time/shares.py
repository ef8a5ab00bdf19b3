"""What a step of a focused training takes, to LoRA's on all layers: `rho` of equal time."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from .cases import PARTS, UPPER

__all__ = ["LORA", "time_shares"]

LORA = ("LoRA, Liger, no dropout", "LoRA in our step, Liger, no dropout")
"""The faster of these is what a focused step is compared with."""
FOCUSED = "focused {}, Liger, no dropout"


def time_shares(result: Mapping[str, Any]) -> dict[str, float]:
    """By the name of the part of the layers; only what was measured.

    Args:
        result: of `run.py` with the group `focused`.
    """
    found = {name: median(row["step_ms"]) for name, row in result["rows"].items() if row.get("step_ms")}
    lora = min((found[name] for name in LORA if name in found), default=None)
    if lora is None:
        return {}
    parts = {part: found.get(FOCUSED.format(part)) for part in (*PARTS, *UPPER)}
    return {part: round(value / lora, 3) for part, value in parts.items() if value is not None}
