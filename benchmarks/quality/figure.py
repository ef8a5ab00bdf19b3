"""Draw from the result files, with intervals over paired seeds, by how much each method differs from LoRA: those of the
paper's plans in docs/images/quality.png, sets of half of the layers in docs/images/focused.png. And the curves of
docs/images/alpha-scaling.png where there are some.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from pages import write_section  # noqa: E402
from quality.cells import percent  # noqa: E402
from quality.figures import FIGURES, Comparison, compare, load_lines, read_folder  # noqa: E402
from quality.scaling import PICTURE as SCALING  # noqa: E402
from quality.scaling import draw_curves, read_curves  # noqa: E402
from quality.table import RESULTS, SUMMARY_PAGE  # noqa: E402
from quality.verdict import IN_EPOCHS, METRICS, TASKS, most_trained, short_list  # noqa: E402

PICTURE = SUMMARY_PAGE.parent / "images" / "quality.png"
TEXT = "![By how much each method differs from LoRA on five tasks, with 95% intervals](images/quality.png)"
FOCUSED = SUMMARY_PAGE.parent / "images" / "focused.png"
FOCUSED_PAGE = SUMMARY_PAGE.parent / "focused.md"
FOCUSED_TEXT = (
    "![By how much training half of the layers differs from LoRA on four tasks, with 95% intervals](images/focused.png)"
)
HALVES = {
    "focused half": ("focused, half", "LoRA"),
    "focused half, equal time": ("focused, half", "LoRA, time of half"),
    "above the lowest eighth": ("above an eighth, half", "LoRA"),
    "above the lowest eighth, equal time": ("above an eighth, half", "LoRA, time above an eighth"),
    "even half": ("even, half", "LoRA"),
    "random half that stays": ("random fixed, half", "LoRA"),
    "most important half anywhere": ("top, half", "LoRA"),
    "paper's rule, half of the layers": ("IST, half", "LoRA"),
}
"""What is shown of half of the layers, and of what it is the difference."""
PAIRS = 3
"""A difference over fewer seeds has an interval that would hide the others."""
Panel = tuple[str, str, dict[str, Mapping[str, Any]]]


def panels(comparisons: Sequence[Comparison]) -> Iterator[Panel]:
    """Task, metric, and each method's paired difference to LoRA: the trainings of a task that have most results."""
    for task, comparison in largest([each for each in comparisons if not each.focused]).items():
        metric, title = next(iter(FIGURES[task].items()))
        methods = [method for method in comparison.methods(ablations=False) if method != "LoRA"]
        cells = comparison.table(methods).get(metric, {})
        found = {
            method: cell["differences"]["LoRA"]
            for method in methods
            if (cell := cells.get(method)) and "LoRA" in cell["differences"]
        }
        found = {method: each for method, each in found.items() if each["num_pairs"] >= PAIRS}
        if found:
            yield task, title, found


def halves(comparisons: Sequence[Comparison]) -> Iterator[Panel]:
    """The same of `HALVES`, of the model that has the most focused trainings."""
    for task, comparison in largest([each for each in short_list(comparisons) if each.focused]).items():
        found = {name: comparison.difference(one, other, METRICS[task]) for name, (one, other) in HALVES.items()}
        shown: dict[str, Mapping[str, Any]] = {
            name: each for name, each in found.items() if each and each["num_pairs"] >= PAIRS
        }
        if shown:
            yield task, FIGURES[task][METRICS[task]], shown


def largest(comparisons: Sequence[Comparison]) -> dict[str, Comparison]:
    """Of each task the comparison of the most trainings, in the length that teaches something."""
    found = most_trained([each for each in comparisons if bool(each.epochs) == (each.task in IN_EPOCHS)])
    return {task: found[task] for task in TASKS if task in found}


def draw(file: Path, shown: Sequence[Panel], against: str) -> None:
    """One row of panels, a task each; in each a point with its interval for every method."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    methods = list(dict.fromkeys(method for _, _, found in shown for method in found))
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(1.4 + 2.1 * len(shown), 1.1 + 0.28 * len(methods)), layout="constrained", dpi=160)
        FigureCanvasAgg(figure)
        row = figure.subplots(1, len(shown), squeeze=False, sharey=True)[0]
        for axes, (task, title, found) in zip(row, shown, strict=True):
            draw_differences(axes, task, title, found, methods)
        figure.suptitle(f"Difference to LoRA {against} (green: better, red: worse, grey: no significant difference)")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Software": None})


def draw_differences(
    axes: Any, task: str, title: str, differences: Mapping[str, Mapping[str, Any]], methods: Sequence[str]
) -> None:
    """One panel: losses in nats, shares in points."""
    scale = 100 if percent(title) else 1
    for place, method in enumerate(methods):
        if method in differences:
            low, mean, high = (scale * differences[method][name] for name in ("low", "mean", "high"))
            better = (mean > 0) == percent(title)
            colour = "0.5" if low <= 0 <= high else "tab:green" if better else "tab:red"
            axes.errorbar(mean, place, xerr=[[mean - low], [high - mean]], fmt="o", color=colour, capsize=3)
    axes.axvline(0, color="0.7", linewidth=1, zorder=0)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.locator_params(axis="x", nbins=4)
    axes.set_title(TASKS[task].partition(",")[0], loc="left", fontsize=10)
    axes.set_xlabel("points" if percent(title) else "nats")


def main() -> None:
    comparisons = compare(load_lines(RESULTS))
    shown, of_halves = [*panels(comparisons)], [*halves(comparisons)]
    if shown:
        draw(PICTURE, shown, "at equal steps")
    if of_halves:
        draw(FOCUSED, of_halves, "at equal steps, or where it says so at equal time")
    if curves := read_curves(read_folder(RESULTS)):
        draw_curves(PICTURE.parent / SCALING, curves)
    write_section("quality figure", [TEXT] if shown else [], SUMMARY_PAGE)
    write_section("focused figure", [FOCUSED_TEXT] if of_halves else [], FOCUSED_PAGE)


if __name__ == "__main__":
    main()
