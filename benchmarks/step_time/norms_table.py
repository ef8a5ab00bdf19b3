"""What it saves to make the outputs of norms again instead of keeping them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from pages import markdown, source

__all__ = ["norms_table", "read_norms"]

FIGURE = "activation_gib"


def read_norms(folder: Path) -> dict[str, Any]:
    """The run in which the outputs of norms were always made again. Its times are not shown: see benchmarks/LOG.md."""
    return json.loads((folder / "norms-16x256-h200-d1bac2f1bd59.json").read_text(encoding="utf-8"))


def norms_table(kept: dict[str, Any], again: dict[str, Any], shown_as: Mapping[str, str]) -> str:
    """Activations of fused steps that keep the outputs of norms, and of another run in which they were made again.

    Each is beside PEFT's LoRA of its own run, with float32 adapters and dropout, without Liger, as the target has it.

    Args:
        kept: a result of `run.py`.
        again: that of the other run.
        shown_as: what pages call a case.
    """
    lines = []
    for name, shown in shown_as.items():
        both = [(run["rows"].get(name), run["rows"]["LoRA"]) for run in (kept, again)]
        if shown.endswith(("fused", "recomputed")) and all(row for row, _ in both):
            values = [(median(row[FIGURE]), median(row[FIGURE]) / median(lora[FIGURE])) for row, lora in both]
            lines.append((shown, *(cell for gib, part in values for cell in (f"{gib:.2f}", f"{part:.4f}"))))
    header = ("16 × 256 tokens", "norms kept, GiB", "÷ PEFT", "made again, GiB", "÷ PEFT")
    return f"{markdown(header, lines)}\n\nKept: {source(kept)}. Made again: {source(again)}."
