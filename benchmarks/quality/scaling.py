"""How alpha should follow the rank: the loss by the learning rate, of LoRA and of focused layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pages import markdown

from .plan import final_loss
from .verdict import TASKS

__all__ = ["PICTURE", "TEXT", "Curves", "draw_curves", "read_curves", "scaling_section"]

STUDY = "scaling"
"""Of the lines that count; their methods are `all layers`, and `PART, ALPHA` with the names below."""
REFERENCE = "all layers"
ALPHAS = {"kept": "kept", "sqrt": "raised by the square root", "linear": "raised like the rank"}
NATS = 0.003
"""How far above its own best a curve may be at LoRA's best rate."""
PICTURE = "alpha-scaling.png"
TEXT = f"![Validation loss by learning rate, of LoRA and of focused layers](../../docs/images/{PICTURE})"
Curve = dict[float, float]
"""Validation loss by learning rate."""


@dataclass(frozen=True)
class Curves:
    """The curves of one model, task and part of the layers."""

    model: str
    task: str
    part: str
    """Such as `half`."""
    reference: Curve
    """Of LoRA on all layers."""
    of_alpha: dict[str, Curve]
    """By the name in `ALPHAS`."""

    def best(self, curve: Curve) -> float:
        """The rate with the lowest loss."""
        return min(sorted(curve), key=curve.__getitem__)

    def loss_at_reference(self, alpha: str) -> float | None:
        """How far a curve at LoRA's best rate is above its own best, in nats; None where it was not tried there."""
        curve = self.of_alpha[alpha]
        rate = self.best(self.reference)
        return curve[rate] - min(curve.values()) if rate in curve else None


def read_curves(lines: Iterable[Mapping[str, Any]]) -> list[Curves]:
    """The curves of finished trainings of the first seed, where LoRA's is there too."""
    found: dict[tuple[str, str], dict[str, Curve]] = {}
    for line in lines:
        loss = final_loss(line)
        if line["study"] == STUDY and line["kind"] == "training" and line["seed"] == 0 and math.isfinite(loss):
            of_method = found.setdefault((line["model"], line["task"]), {})
            of_method.setdefault(line["method"], {})[line["learning_rate"]] = loss
    curves = []
    for (model, task), of_method in found.items():
        parts = dict.fromkeys(method.partition(", ")[0] for method in of_method if ", " in method)
        for part in parts if REFERENCE in of_method else ():
            own = {alpha: of_method[f"{part}, {alpha}"] for alpha in ALPHAS if f"{part}, {alpha}" in of_method}
            curves.append(Curves(model, task, part, of_method[REFERENCE], own))
    return curves


def scaling_section(lines: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A table with a row for each curve, and the figure."""
    curves = read_curves(lines)
    if not curves:
        return
    rows = []
    for each in curves:
        rows.append((each.model, each.task, "all", "–", rate_of(each, each.reference), lowest(each.reference), "–"))
        for alpha, curve in each.of_alpha.items():
            above = each.loss_at_reference(alpha)
            said = "–" if above is None else f"{above:+.4f}{'' if above <= NATS else ' (more than 0.003)'}"
            rows.append((each.model, each.task, each.part, ALPHAS[alpha], rate_of(each, curve), lowest(curve), said))
    header = ("model", "task", "layers", "alpha", "best rate", "loss there", "at LoRA's best rate, above that")
    yield markdown(header, dict.fromkeys(rows))
    yield TEXT


def lowest(curve: Curve) -> str:
    return f"{min(curve.values()):.4f}"


def rate_of(curves: Curves, curve: Curve) -> str:
    """The best rate, marked where it is at an edge of those tried."""
    rate = curves.best(curve)
    return f"{rate:.3g}{' (edge)' if len(curve) > 1 and rate in (min(curve), max(curve)) else ''}"


def draw_curves(file: Path, curves: Sequence[Curves]) -> None:
    """A panel for each task and part: the curves, and LoRA's best rate as a vertical line."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(1.4 + 2.9 * len(curves), 3.0), layout="constrained", dpi=160)
        FigureCanvasAgg(figure)
        for axes, each in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
            draw_panel(axes, each)
        figure.suptitle("Validation loss, one seed (dotted: LoRA's best rate)")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Software": None})


def draw_panel(axes: Any, curves: Curves) -> None:
    """LoRA in grey, the others in colour."""
    shown = {"LoRA, all layers": curves.reference, **{f"alpha {ALPHAS[a]}": c for a, c in curves.of_alpha.items()}}
    for label, curve in shown.items():
        rates = sorted(curve)
        colour = "0.5" if curve is curves.reference else None
        axes.plot(rates, [curve[rate] for rate in rates], marker="o", markersize=3, label=label, color=colour)
    axes.axvline(curves.best(curves.reference), color="0.7", linestyle=":", zorder=0)
    axes.set_xscale("log")
    rates = sorted({rate for curve in shown.values() for rate in curve})
    axes.set_xticks(rates, [f"{rate * 1e4:.3g}" for rate in rates])
    axes.set_xticks([], minor=True)
    task = TASKS[curves.task].partition(",")[0]
    axes.set_title(f"{task}, {curves.part} of the layers\n{curves.model}", loc="left", fontsize=8)
    axes.set_xlabel("learning rate, 1e-4")
    axes.set_ylabel("nats")
    axes.legend(fontsize=6, frameon=False)
