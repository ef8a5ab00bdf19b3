"""Draw docs/images/quality.png from the result files: by how much each method differs from LoRA, over paired seeds."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from pages import write_section  # noqa: E402
from quality.figures import FIGURES, Comparison, compare, load_lines  # noqa: E402
from quality.table import PAGE, RESULTS  # noqa: E402

PICTURE = PAGE.parent / "images" / "quality.png"
BUDGETS = {"steps": "equal steps", "seconds": "equal time"}
TEXT = "![By how much each method's loss differs from LoRA's, with 95% intervals](images/quality.png)"


def panels(comparisons: Sequence[Comparison]) -> Iterator[tuple[str, str, dict[str, Mapping[str, Any]]]]:
    """Title, what is compared, and each method's paired difference to LoRA, by the loss that a task is judged by."""
    for comparison in comparisons:
        figure, title = [*FIGURES[comparison.task].items()][-1]
        for budget, at in BUDGETS.items():
            methods = [method for method in comparison.methods(budget, ablations=False) if method != "LoRA"]
            cells = comparison.table(methods, budget).get(figure, {})
            found = {
                method: cells[method]["differences"]["LoRA"]
                for method in methods
                if "LoRA" in cells.get(method, {}).get("differences", {})
            }
            found = {method: each for method, each in found.items() if each["low"] is not None}
            if found:
                yield f"{comparison.task}, {comparison.length}, {at}", title, found


def draw(file: Path, shown: Sequence[tuple[str, str, Mapping[str, Mapping[str, Any]]]]) -> None:
    """A panel for each comparison, a point with its interval for each method."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6 * len(shown), 3.2), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        for axes, (name, title, differences) in zip(
            figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True
        ):
            means = [each["mean"] for each in differences.values()]
            errors = [
                [each["mean"] - each["low"] for each in differences.values()],
                [each["high"] - each["mean"] for each in differences.values()],
            ]
            axes.errorbar(means, range(len(means)), xerr=errors, fmt="o", color="tab:red", capsize=3)
            axes.axvline(0, color="0.5", linewidth=1)
            axes.set_yticks(range(len(means)), differences.keys())
            axes.invert_yaxis()
            axes.set(title=name, xlabel=f"{title}: minus LoRA, mean and 95% interval")
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Software": None})


def main() -> None:
    shown = [*panels(compare(load_lines(RESULTS)))]
    if shown:
        draw(PICTURE, shown)
    write_section("quality figure", [TEXT] if shown else [], PAGE)


if __name__ == "__main__":
    main()
