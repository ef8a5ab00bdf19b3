"""From result lines to what is compared: the runs of each method at its best learning rate, by task and length."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ist.experiments.comparison import best_rate, figures_of, pair, tabulate
from ist.experiments.statistics import Difference, paired_difference

from .plan import final_loss, read_plan

__all__ = ["FIGURES", "Comparison", "compare", "interval", "load_lines", "read_folder"]

Line = Mapping[str, Any]
FIGURES: dict[str, dict[str, str]] = {
    "mawps": {
        "exact answers": "exact match, %",
        "answers loss": "loss of the answers, nats a token",
        "lowest validation loss": "lowest validation loss on the way, nats a token",
    },
    "sst2": {"sentiment": "accuracy, %", "words loss": "loss of the word, nats a token"},
    "commonsense": {
        "average": "mean accuracy of the four tests, %",
        "validation loss": "validation loss, nats a token",
    },
    "wikitext2": {"text loss": "test loss, nats a token"},
    "gsm8k": {"solutions loss": "loss of worked solutions, nats a token"},
}
"""What a task is judged by, the first one first."""
GENERATED = ("exact answers",)
"""Tests that say nothing where rows end with another token than the model's: answers went on after their end."""
AGAINST = ("LoRA", "random", "fixed, at random")
"""What every method is paired with."""


PLANS = ("main", "ablations", "focused", "focused-sets", "focused-criteria", "focused-init", "focused-depth")
PLANS += ("focused-upper", "focused-second", "focused-normalised", "focused-more")


@cache
def order() -> list[str]:
    """The methods of the main plan, then those of the other ones, in their order."""
    plans = [read_plan(Path(__file__).parent / "plans" / f"{name}.yaml") for name in PLANS]
    return list(dict.fromkeys(method for plan in plans for method in plan["methods"]))


@dataclass
class Comparison:
    """Trainings of one model and task that differ in the method alone."""

    model: str
    task: str
    base_steps: int
    epochs: int | None
    batch_size: int
    focused: bool = False
    """Whether it is of the plans of focused training, which have settings of their own."""
    rows_end: str = ""
    """The tokenizer's token at the end of rows, where the model's own is another one."""
    lines: list[Line] = field(default_factory=list)

    @property
    def group(self) -> tuple[str, bool, str]:
        """What comparisons of several tasks have in common that stand in one table."""
        return self.model, self.focused, self.rows_end

    @property
    def named(self) -> str:
        """The model, and what is unusual."""
        return f"{self.model}, rows that end with `{self.rows_end}`" if self.rows_end else self.model

    @property
    def length(self) -> str:
        """How long a training is."""
        steps = f"{self.base_steps} steps of {self.batch_size} rows"
        return f"{self.epochs} epochs, {steps}" if self.epochs else steps

    def methods(self, budget: str = "steps", ablations: bool | None = None) -> list[str]:
        """Those with results, the main plan's first, in its order; of both kinds where `ablations` is None."""
        lines = [line for line in self.lines if line["budget"] == budget]
        found = list(dict.fromkeys(x["method"] for x in lines if ablations in (None, bool(x["ablation"]))))
        return sorted(found, key=lambda method: order().index(method) if method in order() else len(order()))

    def runs(self, method: str, budget: str = "steps") -> list[Line]:
        """A method's trainings, by seed, at the rate with the lowest validation loss of those tried with one seed.

        At equal time the reference's trainings are those at equal steps.
        """
        budget = "steps" if method == AGAINST[0] else budget
        lines = [line for line in self.lines if line["method"] == method and line["budget"] == budget]
        if not lines:
            return []
        newest = max(lines, key=lambda line: line["date"])
        lines = [line for line in lines if same_setting(line, newest)]
        first = min(line["seed"] for line in lines)
        rate = best_rate({line["learning_rate"]: final_loss(line) for line in lines if line["seed"] == first})
        chosen = [line for line in lines if line["learning_rate"] == rate]
        return sorted({line["seed"]: line for line in chosen}.values(), key=lambda line: line["seed"])

    def tried(self, method: str) -> list[Line]:
        """The first seed at equal steps at every learning rate, the lowest one first."""
        lines = [line for line in self.lines if line["method"] == method and line["budget"] == "steps"]
        first = min((line["seed"] for line in lines), default=0)
        return sorted((x for x in lines if x["seed"] == first), key=lambda line: line["learning_rate"])

    def rates(self, method: str) -> list[float]:
        """All learning rates that were tried."""
        return sorted({line["learning_rate"] for line in self.lines if line["method"] == method})

    def table(self, methods: Sequence[str], budget: str = "steps") -> dict[str, dict[str, Any]]:
        """Means, deviations and paired differences, see `ist.experiments.comparison.tabulate`."""
        runs = [
            {"method": method, "seed": line["seed"], "budget": budget, "figures": figures(line)}
            for method in dict.fromkeys([*AGAINST, *methods])
            for line in self.runs(method, budget)
        ]
        against = {
            method: [other for other in AGAINST if other != method] for method in dict.fromkeys([*AGAINST, *methods])
        }
        return tabulate(runs, against)

    def difference(self, one: str, other: str, figure: str, budget: str = "steps") -> dict[str, Any] | None:
        """A method's figure minus another's, paired over the seeds that both have; None where there are none."""
        own, others = (
            {line["seed"]: figures(line)[figure] for line in self.runs(method, budget) if figure in figures(line)}
            for method in (one, other)
        )
        return pair(own, others) if own.keys() & others.keys() else None


def same_setting(line: Line, other: Line) -> bool:
    """Whether two trainings differ in nothing but learning rate and seed."""
    return all(line[name] == other[name] for name in ("options", "setting", "steps"))


def figures(line: Line) -> dict[str, float]:
    """What a training is judged by."""
    loss = final_loss(line)
    after = {"loss": loss, "lowest validation loss": lowest_loss(line)} if loss == loss else {}
    tests = {
        name: {figure: value for figure, value in test.items() if value is not None}
        for name, test in line.get("test", {}).items()
        if not (line.get("rows_end") and name in GENERATED)
    }
    return figures_of({"after": after}, {"tasks": tests})


def lowest_loss(line: Line) -> float:
    """The lowest of the validation losses that were measured during a training."""
    return min(point[2] for point in line["curve"] if point[2] is not None)


def load_lines(folder: Path) -> list[Line]:
    """The lines of all result files, each training once, with the name of its file; not those of the quick plan, and
    not those of the curves of `scaling.py`, whose learning rates are finer than what is compared.

    What was timed more than once has all its times in `times`; the first one counts.
    """
    lines: dict[tuple[str, ...], Line] = {}
    for line in read_folder(folder):
        if line["study"] == "scaling":
            continue
        key = (line["model"], line["id"], line.get("rows_end", ""))
        known = lines.get(key, {"error": ""})
        if "error" in known:
            known = lines[key] = {**line, "times": []}
        if "step_seconds" in line:
            known["times"].append(line["step_seconds"])
    return list(lines.values())


def read_folder(folder: Path) -> Iterator[dict[str, Any]]:
    """Every line of a folder's files, with the name of its file; not those of the quick plan."""
    for file in sorted(folder.glob("*.jsonl")):
        for text in file.read_text(encoding="utf-8").splitlines():
            line = {**json.loads(text), "file": file.name}
            if line["study"] != "quick":
                yield line


def compare(lines: Iterable[Line]) -> list[Comparison]:
    """The comparisons that finished trainings make, in the order of `FIGURES`, the short ones first."""
    found: dict[Any, Comparison] = {}
    for line in lines:
        if line["kind"] == "training" and "error" not in line:
            key = (line["model"], line["task"], line["base_steps"], line["epochs"], line["setting"]["batch_size"])
            key = (*key, line["study"] == "focused", line.get("rows_end", ""))
            found.setdefault(key, Comparison(*key)).lines.append(line)
    order = list(FIGURES)
    return sorted(
        found.values(), key=lambda c: (order.index(c.task), bool(c.epochs), c.base_steps, c.focused, c.rows_end)
    )


def interval(values: Sequence[float]) -> Difference:
    """The mean with its 95% interval by Student's t."""
    return paired_difference(values, [0.0] * len(values))
