"""From a plan to its trainings: each a mapping of plain values with an id that says all that it depends on.

A plan that is run again and again comes to the same ids, so that what is in the result files is not run again. Some
trainings wait for others: the further seeds of a method for its best learning rate, a fixed set by importance for the
importance, a training at equal time for the speeds. Expanding is repeated as lines come in.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ist.config import ISTConfig
from ist.experiments.comparison import best_rate
from ist.runs.scores import extreme_layers

from .settings import TRAINING, read_plan, select, settings

__all__ = ["TRAINING", "WHOLE", "Expansion", "expand", "final_loss", "read_plan", "select", "settings"]

Training = dict[str, Any]
Lines = Mapping[str, Mapping[str, Any]]
"""Results by id."""

IMPORTANCE = {"steps": 100, "learning_rate": 1e-3, "seed": 1000}
"""The short LoRA training whose layers are suppressed one by one: its seed is none of those compared."""
SPEED_STEPS, SPEED_WARM = 60, 20
"""Steps of a training that is timed with nothing beside it, and how many of them are not counted."""
REFERENCE = "LoRA"
"""The method whose time the others get at equal time."""
WHOLE = ("lisa", "full")
"""Selectors that train the model's own weights."""
FIRST_NAMES = {"suppression": "damping", "cost_exponent": "price"}
FIRST_PRESETS = {"authors": "reference"}
"""What options were called when the first results were made."""


@dataclass
class Expansion:
    """What a plan comes to, with the results that there are."""

    trainings: list[Training] = field(default_factory=list)
    """In the order in which they are to be run."""
    waiting: list[str] = field(default_factory=list)
    """What cannot be said yet, and why."""


def expand(plan: Mapping[str, Any], lines: Lines, num_rows: Mapping[str, int]) -> Expansion:
    """All trainings of a plan that can be said now.

    Args:
        plan: as `read_plan` gives it.
        lines: results so far, by id.
        num_rows: training rows of each task, by which epochs become steps.
    """
    expansion = Expansion()
    for task in plan["tasks"]:
        of_task = TaskPlan(plan, task, lines, num_rows.get(task, 0), expansion)
        for name, method in plan["methods"].items():
            of_task.add(name, method)
    seen: set[str] = set()
    unique = [t for t in expansion.trainings if t["id"] not in seen and not seen.add(t["id"])]
    expansion.trainings = sorted(unique, key=lambda training: round_of(training, plan))
    return expansion


def round_of(training: Training, plan: Mapping[str, Any]) -> int:
    """The seeds of a plan are its rounds, over all tasks and methods: what a call leaves undone is then whole seeds,
    and learning rates and measurements, which others wait for, are of the first round.
    """
    seeds = list(plan.get("seeds", [0]))
    return seeds.index(training["seed"]) if training["kind"] == "training" and training["seed"] in seeds else 0


class TaskPlan:
    """The part of a plan that is one task's."""

    def __init__(self, plan: Mapping[str, Any], task: str, lines: Lines, num_rows: int, expansion: Expansion) -> None:
        self.plan, self.task, self.lines, self.num_rows, self.expansion = plan, task, lines, num_rows, expansion
        self.seeds: Sequence[int] = plan.get("seeds", [0])
        self.methods: dict[str, Any] = {**plan.get("left_out", {}), **plan["methods"]}
        """Also those that are not trained."""

    def add(self, name: str, method: Mapping[str, Any]) -> None:
        """All trainings of a method."""
        options = self.options(name, method)
        if options is None:
            return
        budgets = self.plan.get("budgets", ["steps"])
        owner = method.get("rate_of")
        if owner is None:
            self.expansion.trainings += (grid := self.grid(name, method, options))
        else:
            owner_options = self.options(owner, self.methods[owner])
            grid = [] if owner_options is None else self.grid(owner, self.methods[owner], owner_options)
        rate = chosen_rate(grid, self.lines)
        if rate is None:
            self.wait(name, "its learning rates are not all tried, or none worked")
        elif "steps" in budgets:
            self.expansion.trainings += [self.training(name, method, options, rate, seed) for seed in self.seeds]
        if "seconds" in budgets and name != REFERENCE:
            self.add_at_equal_time(name, method, options, rate)

    def add_at_equal_time(self, name: str, method: Mapping[str, Any], options: Any, rate: float | None) -> None:
        """As many steps as the method does in the time that the reference takes, both timed alone."""
        reference = self.methods.get(REFERENCE)
        if reference is None:
            raise ValueError(f"Equal time is the time of {REFERENCE}: the plan needs a method of this name.")
        own = self.training(name, method, options, 1e-4, 0, kind="speed")
        other = self.training(REFERENCE, reference, dict(reference), 1e-4, 0, kind="speed")
        self.expansion.trainings += [other, own]
        speeds = [self.lines.get(training["id"], {}).get("step_seconds") for training in (other, own)]
        if rate is None or not all(speeds):
            self.wait(f"{name} at equal time", "speeds or learning rates are missing")
            return
        base = self.num_steps(settings(self.plan, self.task, method))
        steps = max(1, round(base * speeds[0] / speeds[1]))
        self.expansion.trainings += [
            self.training(name, method, options, rate, seed, steps=steps, budget="seconds") for seed in self.seeds
        ]

    def grid(self, name: str, method: Mapping[str, Any], options: Mapping[str, Any]) -> list[Training]:
        """The first seed at every learning rate; where the best is at an edge so far, at one beyond it, up to
        `more_rates` of the plan.
        """
        rates = method.get("rates", self.plan.get("rates"))
        rates = rates.get(self.task) if isinstance(rates, Mapping) else rates
        if not rates:
            raise ValueError(f"{name} has no learning rates for {self.task}: give `rates`, for the plan or the method.")
        grid = [self.training(name, method, options, float(rate), self.seeds[0]) for rate in sorted(map(float, rates))]
        for _ in range(self.plan.get("more_rates", 0)):
            beyond = rate_beyond([training["learning_rate"] for training in grid], chosen_rate(grid, self.lines))
            if beyond is None:
                break
            grid.append(self.training(name, method, options, beyond, self.seeds[0]))
            grid.sort(key=lambda training: training["learning_rate"])
        return grid

    def options(self, name: str, method: Mapping[str, Any]) -> dict[str, Any] | None:
        """The method's options, a fixed set by importance with its layers; None while these are not known."""
        known = {"rates", "rate_of", "training", "time_share"}
        options = {key: value for key, value in method.items() if key not in known}
        form = str(options.get("selector", ""))
        if options.get("focus", {}).get("criterion") == "trained removal":
            scores = self.measured_importance(name)
            focus = {key: value for key, value in options["focus"].items() if key != "criterion"}
            return {**options, "focus": {**focus, "scores": scores}} if scores else None
        if form not in ("fixed:top", "fixed:bottom"):
            return options
        scores = self.measured_importance(name)
        if not scores:
            return None
        config = ISTConfig.from_options(num_active_layers=options.get("num_active_layers", 0.25))
        layers = extreme_layers(scores, config.layer_counts(len(scores)).active, most=form == "fixed:top")
        return {**options, "selector": f"fixed:{','.join(map(str, layers))}"}

    def measured_importance(self, name: str) -> list[float] | None:
        """By how much the loss rises without each layer, for a method; None while that is not measured."""
        source = self.importance()
        self.expansion.trainings.append(source)
        scores = self.lines.get(source["id"], {}).get("importance")
        if not scores:
            self.wait(name, "the importance of the layers is not measured")
        return scores or None

    def importance(self) -> Training:
        """The training that says which layers matter."""
        how = {**IMPORTANCE, **self.plan.get("importance", {})}
        return self.training(
            "importance",
            {},
            {"selector": "all"},
            how["learning_rate"],
            how["seed"],
            kind="importance",
            steps=how["steps"],
        )

    def training(
        self,
        name: str,
        method: Mapping[str, Any],
        options: Mapping[str, Any],
        rate: float,
        seed: int,
        *,
        kind: str = "training",
        steps: int | None = None,
        budget: str = "steps",
    ) -> Training:
        """One training, with its id."""
        setting = settings(self.plan, self.task, method)
        base = self.num_steps(setting)
        share = self.time_share(method)
        num = SPEED_STEPS if kind == "speed" else steps or max(1, round(base * (share or 1.0)))
        shared = {key: value for key, value in setting.items() if key not in ("steps", "epochs")}
        matters = {"kind": kind, "task": self.task, "options": dict(options), "setting": shared, "steps": num}
        code = code_of(matters)
        at = "" if budget == "steps" else ", equal time"
        return {
            "id": f"{self.task}/{kind}/{name}/lr {rate:g}/seed {seed}/{num} steps{at}/{code}",
            **matters,
            "study": self.plan.get("study", "main"),
            "method": name,
            "ablation": "rate_of" in method,
            "learning_rate": rate,
            "seed": seed,
            "base_steps": base,
            "epochs": setting["epochs"],
            "budget": budget,
            **({} if share is None else {"time_share": share}),
        }

    def time_share(self, method: Mapping[str, Any]) -> float | None:
        """The part of the steps that a method gets, so that it takes the time of another one; None for all steps.

        Raises:
            ValueError: the plan has no such share.
        """
        if "time_share" not in method:
            return None
        shares = self.plan.get("time_shares", {})
        if method["time_share"] not in shares:
            raise ValueError(f"time_share={method['time_share']!r}: the plan has {', '.join(shares) or 'none'}.")
        return float(shares[method["time_share"]])

    def num_steps(self, setting: Mapping[str, Any]) -> int:
        """Steps of a training at equal steps."""
        if not setting["epochs"]:
            return int(setting["steps"])
        rows = min(self.num_rows, setting["train_rows"])
        return math.ceil(setting["epochs"] * rows / setting["batch_size"])

    def wait(self, name: str, why: str) -> None:
        self.expansion.waiting.append(f"{self.task}, {name}: {why}")


def code_of(matters: Mapping[str, Any]) -> str:
    """The end of an id, 8 hexadecimal digits: a digest of all that a training depends on but rate and seed."""
    hashed = {**matters, "options": first_names(matters["options"])}
    return hashlib.blake2b(json.dumps(hashed, sort_keys=True).encode(), digest_size=4).hexdigest()


def first_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """A method's options as the first results name them, so that a renamed option does not change an id."""
    return {
        FIRST_NAMES.get(name, name): FIRST_PRESETS.get(value, value) if name == "preset" else value
        for name, value in options.items()
    }


def rate_beyond(rates: Sequence[float], best: float | None) -> float | None:
    """Half of the lowest rate or twice the highest, if that is the best so far; None where it is inside, or unknown."""
    if best is None or len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    return best / 2 if best == rates[0] else best * 2


def chosen_rate(grid: Sequence[Training], lines: Lines) -> float | None:
    """The rate of a grid with the lowest validation loss; None while one is not tried, or none has a loss."""
    found = [lines.get(training["id"]) for training in grid]
    if not grid or any(line is None for line in found):
        return None
    losses = {t["learning_rate"]: final_loss(line) for t, line in zip(grid, found, strict=True) if line}
    return best_rate(losses) if any(map(math.isfinite, losses.values())) else None


def final_loss(line: Mapping[str, Any]) -> float:
    """The validation loss after a training; not a number where it failed or diverged."""
    points: Sequence[Any] = line.get("curve") or [[0, 0, None]]
    return math.nan if points[-1][2] is None else float(points[-1][2])


def describe(trainings: Sequence[Training]) -> Iterator[str]:
    """A line for each task: how many trainings and steps."""
    for task in dict.fromkeys(training["task"] for training in trainings):
        own = [training for training in trainings if training["task"] == task]
        yield f"{task}: {len(own)} trainings, {sum(training['steps'] for training in own)} steps"
