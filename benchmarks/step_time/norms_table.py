"""What it saves and costs to make the outputs of norms again, and what of a step is the GPU's own work."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median
from typing import Any

from pages import markdown, source

__all__ = ["AGAIN", "busy_table", "norms_table"]

AGAIN = ", norms recomputed"
"""At the end of the name of a case in which they are made again."""


def norms_table(result: dict[str, Any], shown_as: Mapping[str, str]) -> str:
    """Time and activations of fused steps that keep the outputs of norms, and of the same steps that do not.

    Activations are beside PEFT's LoRA, as the target has it.

    Args:
        result: of `run.py` with the groups `lora`, `focused` and `focused-norms`.
        shown_as: what pages call a case.
    """
    rows = result["rows"]
    lora = median(rows["LoRA"]["activation_gib"])
    lines = []
    for name, shown in shown_as.items():
        if name + AGAIN in rows:
            both = rows[name], rows[name + AGAIN]
            times = [f"{median(row['step_ms']):.0f}" for row in both]
            kept = [f"{gib:.2f} ({gib / lora:.3f})" for gib in (median(row["activation_gib"]) for row in both)]
            lines.append((shown, *times, *kept))
    header = ("16 × 256 tokens", "kept, ms", "made again, ms", "kept, GiB (÷ LoRA)", "made again, GiB (÷ LoRA)")
    base = "÷ LoRA is to PEFT's on all layers, with float32 adapters and dropout, without Liger."
    return f"{markdown(header, lines)}\n\n{source(result)}. {base}"


def busy_table(result: dict[str, Any], shown_as: Mapping[str, str]) -> str:
    """What a step takes, and for how much of it the GPU has work.

    Args:
        result: of `busy.py`.
        shown_as: what pages call a case.
    """
    lines = [
        (shown_as[name], f"{row['step_ms']:.0f}", f"{row['busy_ms']:.0f}", f"{row['kernels']:.0f}")
        for name, row in result["rows"].items()
        if name in shown_as and "busy_ms" in row
    ]
    config = result["config"]
    header = (f"{config['rows']} × {config['tokens']} tokens", "ms a step", "GPU busy, ms", "kernels")
    return f"{markdown(header, lines)}\n\n{source(result)}."
