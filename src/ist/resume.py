"""What a resumed run has to have in common with the run that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["STATE_FORMAT", "check_same_run"]

STATE_FORMAT = 1
"""Of `SparseTuner.state_dict`; it changes when a new version could not read an old state."""


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compare a saved state of `SparseTuner` with that of the tuner which is to take it up.

    Raises:
        ValueError: the state is of another format, model, selector or configuration; the message says which.
    """
    if saved.get("format") != STATE_FORMAT:
        raise ValueError(f"The saved state has format {saved.get('format')!r}, and this version reads {STATE_FORMAT}.")
    then, now = list(saved["layers"]), list(current["layers"])
    if then != now:
        differing = next(((a, b) for a, b in zip(then, now, strict=False) if a != b), (then[0], now[0]))
        raise ValueError(
            f"The saved state is of {len(then)} layers, {differing[0]} among them, and this model has {len(now)}, with "
            f"{differing[1]} in that place: resume with the model and the adapter that the run began with."
        )
    if saved["selector_type"] != current["selector_type"]:
        raise ValueError(
            f"The run began with {saved['selector_type']} and would go on with {current['selector_type']}: give the "
            "former selector, or begin a new run from the saved adapter."
        )
    config = {"damping": "response", **saved["config"]}  # Before it was an option, responses were damped.
    changed = [
        f"{name} was {value!r} and is {current['config'].get(name)!r}"
        for name, value in config.items()
        if current["config"].get(name) != value
    ]
    if changed:
        raise ValueError(
            f"The run began with other hyperparameters ({'; '.join(changed)}), so it cannot be resumed exactly: give "
            "the former values, or begin a new run from the saved adapter."
        )
