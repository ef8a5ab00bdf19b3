"""Whether the targets of cost are met, and how methods compare, from the JSON files alone: `make bench-summary`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from pages import load_results, markdown, write_section  # noqa: E402

Rows = dict[str, Any]
RESULTS = HERE / "step_time" / "results"


def load_table(folder: str) -> Any:
    """The module that makes the tables of a folder; several have one of that name."""
    spec = importlib.util.spec_from_file_location(f"{folder}_table", HERE / folder / "table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


step_time = load_table("step_time")
quality = load_table("quality")


@dataclass(frozen=True)
class Target:
    """A figure that a result holds, and the most that it may be."""

    name: str
    limit: float
    figure: Callable[[dict[str, Any]], float | None]
    """None where the result is another shape's or lacks a row."""
    form: str = ".2f"


@dataclass(frozen=True)
class Finding:
    """What became of a target."""

    target: Target
    figure: float | None
    file: str = "–"
    commit: str = "–"
    device: str = "–"

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return "not measured"
        return "met" if self.figure <= self.target.limit else "not met"

    def cells(self) -> tuple[str, ...]:
        """Name, figure, target, verdict, and where the figure comes from."""
        form = self.target.form
        figure = "–" if self.figure is None else format(self.figure, form)
        if self.verdict == "not met" and figure == format(self.target.limit, form):  # So that it can be seen.
            figure = f"{self.figure:.4f}"
        return self.target.name, figure, f"≤ {self.target.limit:{form}}", self.verdict, self.file, self.commit


def rows_of(result: dict[str, Any], shape: str) -> Rows:
    """The rows of a run of the 7B shape with so many rows × tokens; none of another run."""
    config = result["config"]
    right = result["kind"] == "step_time" and config["size"] == "7b" and not config.get("layers")
    return result["rows"] if right and f"{config['rows']} × {config['tokens']}" == shape else {}


def against(shape: str, name: str, value: str, floor: bool = False) -> Callable[[dict[str, Any]], float | None]:
    """A row's ratio to PEFT's LoRA of its run, or to the frozen base (lower bound) of its run and kernels."""

    def figure(result: dict[str, Any]) -> float | None:
        rows = rows_of(result, shape)
        row = rows.get(name)
        return step_time.ratio(row, step_time.partner(rows, row, floor), value) if row else None

    return figure


def between(shape: str, name: str, other: str, value: str) -> Callable[[dict[str, Any]], float | None]:
    """The ratio of two named rows of one run."""

    def figure(result: dict[str, Any]) -> float | None:
        rows = rows_of(result, shape)
        return step_time.ratio(rows.get(name), rows.get(other), value)

    return figure


def loop_share(shape: str, name: str) -> Callable[[dict[str, Any]], float | None]:
    """The importance loop's part of a step."""
    return lambda result: step_time.share(rows_of(result, shape).get(name))


def own_work(layers: int, gpu: bool) -> Callable[[dict[str, Any]], float | None]:
    """Milliseconds of the library's own work in a step."""

    def figure(result: dict[str, Any]) -> float | None:
        work = result.get("own_work", {})
        right = work.get("layers") == layers and result["device"].startswith("CPU") != gpu
        return work["step_ms"] if right else None

    return figure


LONG, SHORT = "16 × 256", "1 × 1024"
SEVEN = "IST, Liger, seven modules, no dropout"
QUARTER = "focused quarter, Liger, no dropout"
AGAIN = f"{QUARTER}, norms recomputed"
BARE = "focused quarter, bfloat16 adapters, no dropout"
PLAIN = "LoRA, bfloat16 adapters, no dropout"
RECOMPUTED = "IST, Liger, frozen layers recomputed"
TARGETS: tuple[Target, ...] = (
    Target(f"step time, {LONG}, IST, to LoRA", 0.67, against(LONG, "IST", "step_ms")),
    Target(f"step time, {LONG}, IST with Liger, to LoRA", 0.49, against(LONG, "IST, Liger", "step_ms")),
    Target(f"step time, {SHORT}, IST, to LoRA", 0.62, against(SHORT, "IST", "step_ms")),
    Target(
        f"step time, {SHORT}, IST compiled by layer, to LoRA",
        0.52,
        against(SHORT, "IST, compiled by layer", "step_ms"),
    ),
    Target(f"activations, {LONG}, IST, to LoRA", 0.54, against(LONG, "IST", "activation_gib")),
    Target(f"activations, {LONG}, IST with Liger, to LoRA", 0.38, against(LONG, "IST, Liger", "activation_gib")),
    Target(
        f"activations, {LONG}, frozen layers recomputed, Liger, to LoRA",
        0.15,
        against(LONG, RECOMPUTED, "activation_gib"),
    ),
    Target(f"step time, {LONG}, frozen layers recomputed, Liger, to LoRA", 0.68, against(LONG, RECOMPUTED, "step_ms")),
    *(
        Target(f"importance loop's share, {shape}, {name}", 0.06, loop_share(shape, name), ".1%")
        for shape, name in (
            (LONG, "IST"),
            (LONG, "IST, Liger"),
            (SHORT, "IST"),
            (SHORT, "IST, probes of 256 tokens"),
            (SHORT, "IST, compiled by layer"),
            (SHORT, "IST, compiled by layer, probes of 256 tokens"),
        )
    ),
    *(
        Target(f"step time, {shape}, {name}, to the frozen base", 1.20, against(shape, name, "step_ms", floor=True))
        for shape, name in ((LONG, "IST"), (LONG, "IST, Liger"), (SHORT, "IST"), (SHORT, "IST, compiled by layer"))
    ),
    Target(f"step time, {LONG}, seven modules, no dropout, Liger, to LoRA", 0.48, against(LONG, SEVEN, "step_ms")),
    Target(
        f"activations, {LONG}, seven modules, no dropout, Liger, to LoRA", 0.40, against(LONG, SEVEN, "activation_gib")
    ),
    *(
        Target(f"{what}, {LONG}, focused quarter, Liger{how}, to {called}", limit, between(LONG, name, other, value))
        for what, how, name, called, other, value, limit in (
            ("step time", "", QUARTER, "LoRA with dropout, without Liger", "LoRA", "step_ms", 0.48),
            ("step time", "", QUARTER, "the frozen base", "floor, Liger, no dropout", "step_ms", 1.06),
            ("activations", "", QUARTER, "the same LoRA", "LoRA", "activation_gib", 0.36),
            ("activations", ", norms recomputed", AGAIN, "the same LoRA", "LoRA", "activation_gib", 0.36),
            ("activations", ", recomputed", f"{QUARTER}, recomputed", "the same LoRA", "LoRA", "activation_gib", 0.14),
        )
    ),
    *(
        Target(
            f"step time, {SHORT}, focused quarter{how}, to LoRA not compiled",
            limit,
            between(SHORT, name, PLAIN, "step_ms"),
        )
        for how, name, limit in (("", BARE, 0.50), (" compiled by layer", f"{BARE}, compiled by layer", 0.40))
    ),
    Target("the library's own work a step, 80 layers, ms, on a GPU", 1.0, own_work(80, gpu=True)),
    Target("the library's own work a step, 80 layers, ms, on a CPU", 1.0, own_work(80, gpu=False)),
)
"""LLaMA-7B shape, bfloat16, rank 32 on five modules, dropout 0.05, 8 of 32 layers, importance loop
included."""


def find(target: Target, results: Sequence[dict[str, Any]]) -> Finding:
    """The latest figure for a target."""
    for result in reversed(results):
        figure = target.figure(result)
        if figure is not None:
            return Finding(
                target, figure, result.get("file", f"{result['name']}.json"), result["commit"], result["device"]
            )
    return Finding(target, None)


def missed(findings: Sequence[Finding]) -> str:
    """How many targets are met, and the others."""
    others = [finding for finding in findings if finding.verdict != "met"]
    count = f"{len(findings) - len(others)} of {len(findings)} targets are met. The others:"
    return f"{count}\n\n{markdown(('what', 'measured', 'target'), (finding.cells()[:3] for finding in others))}"


def lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Aligned for a terminal."""
    return aligned([finding.cells() for finding in findings])


def aligned(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """The rows of a table with columns of one width."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def main() -> None:
    """Print the lines; with `--write`, put all into the page of step time, and those not met into docs/cost.md."""
    findings = [find(target, load_results(RESULTS)) for target in TARGETS]
    print("\n".join(lines(findings)))
    print("", *aligned([quality.SUMMARY_HEADER, *quality.quality_summary()]), sep="\n")
    if "--write" in sys.argv:
        header = ("what", "measured", "target", "", "file", "commit")
        write_section("targets", [markdown(header, (finding.cells() for finding in findings))], step_time.PAGE)
        write_section("missed", [missed(findings)])


if __name__ == "__main__":
    main()
