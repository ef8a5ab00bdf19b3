"""Sets of options by name, and the names that options had before."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from .checks import plain

__all__ = ["PRESETS", "RENAMED", "current_names", "settle_options"]

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "policy": "uniform",
        "candidate_set": "unsuppressed",
        "score_step": "additive",
        "rounding": "half_up",
        "suppression": "response",
        "probe_batch_size": None,
    },
    "authors": {
        "policy": "proportional",
        "candidate_set": "suppressed",
        "score_step": "sigmoid_gradient",
        "rounding": "truncate",
        "suppression": "scaling",
        "probe_batch_size": 16,
    },
}
"""Where the authors' code departs from their paper, each departure is an option; a preset names a set of options."""

RENAMED = {"damping": "suppression", "price": "cost_exponent"}
"""Options: the old name, accepted until version 0.2, and the present one."""
RENAMED_PRESETS = {"reference": "authors"}


def current_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options under their present names, as in the states and histories that earlier versions wrote.

    Raises:
        ValueError: an option is given under both of its names.
    """
    if both := [old for old, new in RENAMED.items() if old in options and new in options]:
        raise ValueError(f"{both[0]} is the old name of {RENAMED[both[0]]}, and both are given: leave {both[0]} out.")
    current = {RENAMED.get(name, name): value for name, value in options.items()}
    preset = current.get("preset")
    if isinstance(preset, str):
        current["preset"] = RENAMED_PRESETS.get(preset, preset)
    return current


def settle_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of a configuration under their present names, with what the preset says of those not given.

    An option of a preset that is None is one that is not given. Numbers of NumPy become Python's own.
    """
    current = {name: plain(value) for name, value in current_names(options).items()}
    warn_of_old_names(options, current)
    preset = current.get("preset", "paper")
    for name, value in PRESETS.get(preset, {}).items() if isinstance(preset, str) else ():
        if current.get(name) is None:
            current[name] = value
    return current


def warn_of_old_names(options: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """One warning for all old names among some options."""
    said = [f"{old} is now {RENAMED[old]}" for old in options if old in RENAMED]
    if "preset" in options and options["preset"] != current["preset"]:
        said.append(f"preset={options['preset']!r} is now preset={current['preset']!r}")
    if said:
        # From here past the constructor to the line that gave the names.
        warnings.warn(f"{'; '.join(said)}: the old names work until version 0.2.", FutureWarning, stacklevel=4)
