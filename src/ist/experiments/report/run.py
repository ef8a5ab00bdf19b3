"""A run's history as its picture needs it, checked to be one."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...runs.damage import shown
from ...runs.history import read_history
from .axes import LARGEST

__all__ = ["RunHistory", "read_run"]

MAX_LAYERS = 1024
"""No model has more, and no picture shows more apart."""


@dataclass(frozen=True)
class RunHistory:
    """What a history holds."""

    num_layers: int
    interval: int
    """Steps between two updates."""
    steps: Sequence[Mapping[str, Any]]
    """At least one, each with `active` layers below `num_layers`."""
    updates: Sequence[Mapping[str, Any]]
    """Each with a score for each layer as `importance`, and with `losses`."""
    logs: Sequence[Mapping[str, Any]]
    """What the training framework logged."""


def read_run(file: Path) -> RunHistory:
    """Read a history and make sure that its lines fit together.

    Raises:
        ValueError: they do not; the message names the file.
    """
    kinds: dict[str, list[dict[str, Any]]] = {"run": [], "step": [], "importance": [], "log": []}
    for event in read_history(file):
        kinds.get(event["event"], []).append(event)
    if not kinds["step"]:
        raise ValueError(f"The history {file} has no steps: let the run do at least one.")
    num_layers = layers_of(kinds["run"], file)
    for event in (*kinds["step"], *kinds["importance"], *kinds["log"]):
        if fault := find_fault(event, num_layers):
            raise ValueError(f"The history {file} has {fault}: it is damaged, or of two runs.")
    for kind in ("step", "importance"):
        if later := falling([event["step"] for event in kinds[kind]]):
            raise ValueError(
                f"The history {file} has step {later[1]} after step {later[0]} of {kind!r}: it is damaged, or of two "
                "runs."
            )
    interval = kinds["run"][0].get("config", {}).get("update_interval")
    interval = interval if isinstance(interval, int) and 0 < interval < 1 << 31 else 1
    return RunHistory(num_layers, interval, kinds["step"], kinds["importance"], kinds["log"])


def falling(steps: Sequence[int]) -> tuple[int, int] | None:
    """The first two steps of which the later is not above the former, or None."""
    return next((pair for pair in itertools.pairwise(steps) if pair[1] <= pair[0]), None)


def layers_of(runs: Sequence[Mapping[str, Any]], file: Path) -> int:
    """How many layers the runs of a history name."""
    names = next((run["layers"] for run in runs if "layers" in run), None)
    if names is None:
        raise ValueError(f"The history {file} lacks the line of its run, which names the layers: it is damaged.")
    if not 0 < len(names) <= MAX_LAYERS:
        raise ValueError(f"The history {file} names {len(names)} layers: 1 to {MAX_LAYERS} are drawn.")
    return len(names)


def find_fault(event: Mapping[str, Any], num_layers: int) -> str | None:
    """What a line lacks, or does not share with the others, in words, or None."""
    kind = event["event"]
    if large := next((n for n, v in event.items() if isinstance(v, int | float) and abs(v) > LARGEST), None):
        return f"a line {kind!r} whose {shown(large)} is {event[large]!r}, which no training reaches"
    needed = {"step": ("active",), "importance": ("importance", "losses"), "log": ()}[kind]
    if missing := next((name for name in ("step", *needed) if name not in event), None):
        return f"a line {kind!r} without {missing!r}"
    if kind == "step" and max(event["active"], default=0) >= num_layers:
        return f"step {event['step']} of layer {max(event['active'])}, and its run has {num_layers} layers"
    if kind == "importance":
        scores = event["importance"]
        if len(scores) != num_layers:
            return f"{len(scores)} scores at step {event['step']}, and its run has {num_layers} layers"
        if None in scores:
            return f"scores at step {event['step']} that are not numbers"
        if max(map(abs, [*scores, *filter(None, event["losses"])])) > LARGEST:
            return f"scores or losses at step {event['step']} that no training reaches"
    return None
