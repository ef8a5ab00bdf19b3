"""What a plan file says: its keys, what it extends, and the settings that all methods of a task share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["TRAINING", "read_plan", "select", "settings"]

TRAINING: dict[str, Any] = {
    "steps": 250,
    "epochs": None,  # in the place of steps
    "batch_size": 32,
    "max_length": 256,
    "train_rows": 20000,
    "validation_rows": 512,
    "test_rows": 500,  # of each test set
    "rank": 32,
    "alpha": 64,
    "dropout": 0.05,
    "modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
    "weight_decay": 0.0,
    "warmup": 0.1,
    "clip": 1.0,
    "points": 5,  # validation losses after the one before the first step
}
"""What all methods share, where a plan says nothing else."""
KEYS = {"extends", "study", "tasks", "methods", "rates", "more_rates", "seeds", "budgets", "time_shares"}
KEYS |= {"training", "importance"}


def read_plan(file: str | Path) -> dict[str, Any]:
    """A plan from YAML or JSON, with what it `extends` under it.

    Raises:
        ValueError: a key is unknown, or what a plan needs is missing.
    """
    import yaml

    own = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    if unknown := set(own) - KEYS:
        raise ValueError(f"{file} has {', '.join(sorted(unknown))}: a plan has some of {', '.join(sorted(KEYS))}.")
    base = read_plan(Path(file).parent / own.pop("extends")) if "extends" in own else {}
    plan = {**base, **own, "training": {**base.get("training", {}), **own.get("training", {})}}
    if missing := {"tasks", "methods"} - set(plan):
        raise ValueError(f"{file} lacks {' and '.join(sorted(missing))}.")
    if isinstance(plan["tasks"], list):
        plan["tasks"] = {task: {} for task in plan["tasks"]}
    for name, method in plan["methods"].items():
        if method.get("rate_of", name) not in plan["methods"]:
            raise ValueError(f"{file}: {name} takes the learning rate of {method['rate_of']}, which is no method here.")
    return plan


def settings(plan: Mapping[str, Any], task: str, method: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the trainings of a task are made with.

    Raises:
        ValueError: a setting is unknown.
    """
    merged = {
        **TRAINING,
        **plan.get("training", {}),
        **(plan["tasks"][task] or {}),
        **(method or {}).get("training", {}),
    }
    if unknown := set(merged) - set(TRAINING):
        raise ValueError(
            f"training settings {', '.join(sorted(unknown))} are unknown: there are {', '.join(TRAINING)}."
        )
    return merged


def select(
    plan: dict[str, Any], tasks: Sequence[str] | None, methods: Sequence[str] | None, without: Sequence[str] = ()
) -> dict[str, Any]:
    """A plan with some of its tasks and methods alone; the other methods are under `left_out`, since learning rates and
    equal times may be theirs.

    Args:
        plan: as `read_plan` gives it.
        tasks: that stay; None is all.
        methods: that stay; None is all.
        without: methods that do not, of those that there are.

    Raises:
        ValueError: one of them is not in the plan.
    """
    every = {**plan.get("left_out", {}), **plan["methods"]}
    for kind, wanted in (("tasks", tasks), ("methods", methods)):
        if unknown := [name for name in wanted or () if name not in plan[kind]]:
            raise ValueError(f"The plan has no {', '.join(unknown)}: its {kind} are {', '.join(plan[kind])}.")
        if wanted:
            plan = {**plan, kind: {name: plan[kind][name] for name in plan[kind] if name in wanted}}
    kept = {name: method for name, method in plan["methods"].items() if name not in without}
    others = {name: method for name, method in every.items() if name not in kept}
    return {**plan, "methods": kept, "left_out": others}
