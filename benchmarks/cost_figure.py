"""Draw docs/images/cost.png from the JSON files: what a step's memory consists of, and how long a step takes."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from pages import load_results, write_section  # noqa: E402
from summary import load_table, step_time  # noqa: E402

memory = load_table("memory")
PICTURE = HERE.parent / "docs" / "images" / "cost.png"
BARS = ("Full", "LoRA", "LoRA + IST, PEFT's forward", "LoRA + IST", "LoRA + IST, frozen layers recomputed")
COLORS = {"weights": "0.75", "activations": "tab:blue", "gradients": "tab:green", "moments": "tab:orange"}
CASES = (
    "LoRA",
    "IST, PEFT's forward",
    "IST",
    "IST, frozen layers recomputed",
    "floor",
    "LoRA, Liger",
    "IST, Liger",
    "IST, Liger, frozen layers recomputed",
    "floor, Liger",
)


def stacked(parts: dict[str, float]) -> dict[str, float]:
    """Parts that add up to the total: what is not there at the peak is taken from the activations."""
    shown = {name: parts[name] for name in COLORS}
    shown["activations"] = max(0.0, shown["activations"] + min(0.0, parts["other"]))
    return {**shown, "other": max(0.0, parts["total"] - sum(shown.values()))}


def draw_memory(axes: Any, rows: dict[tuple[str, str, str], dict[str, Any]], model: str, attention: str) -> None:
    """A bar for each method, as figure 1 (left) of the paper."""
    names = [name for name in BARS if "steps" in rows.get((model, name, attention), {})]
    bars = [stacked(memory.split(rows[model, name, attention])) for name in names]
    base = [0.0] * len(bars)
    for part in (*COLORS, "other"):
        heights = [bar[part] for bar in bars]
        axes.bar(range(len(bars)), heights, bottom=base, color=COLORS.get(part, "0.4"), label=part, width=0.7)
        base = [low + height for low, height in zip(base, heights, strict=True)]
    for place, total in enumerate(base):
        axes.text(place, total, f"{total:.1f}", ha="center", va="bottom")
    axes.set_xticks(range(len(names)), [textwrap.fill(name, 13) for name in names])
    axes.set(title=f"{memory.MODELS.get(model, model)}, 1 × 1024 tokens, {attention} attention", ylabel="GiB")
    axes.set_ylim(0, 1.08 * max(base, default=1))
    axes.legend(frameon=False)


def draw_times(axes: Any, result: dict[str, Any]) -> None:
    """A bar for each case of a run."""
    rows = result["rows"]
    names = [name for name in CASES if step_time.middle(rows.get(name), "step_ms")]
    times = [step_time.middle(rows[name], "step_ms") for name in names]
    colors = ["0.75" if name.startswith("floor") else "0.5" if name.startswith("LoRA") else "tab:red" for name in names]
    axes.barh(range(len(names)), times, color=colors)
    for place, (name, value) in enumerate(zip(names, times, strict=True)):
        held = step_time.middle(rows[name], "activation_gib")
        axes.text(value, place, f" {value:.0f} ms, {held:.1f} GiB", va="center")
    axes.set_yticks(range(len(names)), [name.replace("floor", "frozen base") for name in names])
    axes.invert_yaxis()
    config = result["config"]
    title = f"A step and its activations, {config['rows']} × {config['tokens']} tokens"
    axes.set(title=title, xlabel="ms", xlim=(0, 1.35 * max(times, default=1)))


def draw(file: Path, rows: dict[tuple[str, str, str], dict[str, Any]], result: dict[str, Any], model: str) -> None:
    """Both panels into one picture."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 4.5), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2)
        draw_memory(left, rows, model, "eager")
        draw_times(right, result)
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Software": None})


def main() -> None:
    rows = memory.merge(load_results(HERE / "memory" / "results"))
    timed = [
        result
        for result in load_results(HERE / "step_time" / "results", "step_time")
        if result["config"]["rows"] * result["config"]["tokens"] >= 4096 and "IST" in result["rows"]
    ]
    if not timed or not any(key[0] == "7b" for key in rows):
        write_section("figure", [])
        return
    draw(PICTURE, rows, timed[-1], "7b")
    write_section("figure", ["![Memory in parts, and the time of a step](images/cost.png)"])


if __name__ == "__main__":
    main()
