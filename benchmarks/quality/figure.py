"""Draw docs/images/quality.png from the result files: by how much each method differs from LoRA, over paired seeds."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from pages import write_section  # noqa: E402
from quality.cells import percent  # noqa: E402
from quality.figures import FIGURES, Comparison, compare, load_lines  # noqa: E402
from quality.table import PAGE, RESULTS  # noqa: E402

PICTURE = PAGE.parent / "images" / "quality.png"
TEXT = "![By how much each method differs from LoRA, with 95% intervals](images/quality.png)"
PAIRS = 3
"""A difference over fewer seeds has an interval that would hide the others."""
Panel = tuple[str, str, dict[str, Mapping[str, Any]]]


def panels(comparisons: Sequence[Comparison]) -> Iterator[Panel]:
    """Title, what is compared, and each method's paired difference to LoRA, by every figure of every comparison."""
    for comparison in comparisons:
        methods = [method for method in comparison.methods(ablations=False) if method != "LoRA"]
        table = comparison.table(methods)
        for figure, title in FIGURES[comparison.task].items():
            found = {
                method: cell["differences"]["LoRA"]
                for method in methods
                if (cell := table.get(figure, {}).get(method)) and "LoRA" in cell["differences"]
            }
            found = {method: each for method, each in found.items() if each["num_pairs"] >= PAIRS}
            if found:
                yield f"{comparison.task}, {comparison.length}", title, found


def draw(file: Path, shown: Sequence[Panel]) -> None:
    """A point with its interval for each method, a row of panels for each comparison."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        names = list(dict.fromkeys(name for name, _, _ in shown))
        width = max(sum(name == own for own, _, _ in shown) for name in names)
        figure = Figure(figsize=(4.2 * width, 2.8 * len(names)), layout="constrained", dpi=150)
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(names), width, squeeze=False)
        for row, name in zip(grid, names, strict=True):
            own = [(title, found) for each, title, found in shown if each == name]
            row[0].set_title(name, loc="left")
            for axes, (title, found) in zip(row, own, strict=False):
                draw_differences(axes, title, found)
                if axes is not row[0] and [*found] == [*own[0][1]]:
                    axes.set_yticklabels([])
            for axes in row[len(own) :]:
                axes.set_axis_off()
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, metadata={"Software": None})


def draw_differences(axes: Any, title: str, differences: Mapping[str, Mapping[str, Any]]) -> None:
    """One panel: losses in nats, shares in percent."""
    scale = 100 if percent(title) else 1
    means = [scale * each["mean"] for each in differences.values()]
    errors = [[scale * abs(each[end] - each["mean"]) for each in differences.values()] for end in ("low", "high")]
    axes.errorbar(means, range(len(means)), xerr=errors, fmt="o", color="tab:red", capsize=3)
    axes.axvline(0, color="0.5", linewidth=1)
    axes.set_yticks(range(len(means)), differences.keys())
    axes.invert_yaxis()
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel(title.replace(", ", ",\n") + ": minus LoRA")


def main() -> None:
    shown = [*panels(compare(load_lines(RESULTS)))]
    if shown:
        draw(PICTURE, shown)
    write_section("quality figure", [TEXT] if shown else [], PAGE)


if __name__ == "__main__":
    main()
