"""What a resumed run has to have in common with the run that it goes on from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["COURSE", "STATE_FORMAT", "changed_course", "check_same_run"]

STATE_FORMAT = 1
"""Of `SparseTuner.state_dict`; it changes when a new version could not read an old state."""

COURSE = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "full_determinism"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("bf16", "fp16", "label_smoothing_factor", "gradient_checkpointing", "train_sampling_strategy"),
)
"""The Trainer's arguments that a training's course depends on. It takes other ones on a resume without a word."""


SAME_TRAINING = {"recompute": ("none", "frozen", "all"), "optimizer_state": ("keep", "offload")}
"""Options whose values here train the same to the bit, so that a resume may change them."""


def changed_course(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """In words: which of the Trainer's arguments are not those that the run began with.

    Args:
        saved: `COURSE` as it was; arguments that it lacks are not compared.
        current: as it is.
    """
    return [
        f"{name} was {saved[name]!r} and is {current[name]!r}"
        for name in COURSE
        if name in saved and name in current and saved[name] != current[name]
    ]


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compare a saved state of `SparseTuner` with that of the tuner which is to take it up.

    Raises:
        ValueError: the state is of another format, model, number of processes, selector or configuration; the message
            says which.
    """
    if saved.get("format") != STATE_FORMAT:
        raise ValueError(f"The saved state has format {saved.get('format')!r}, and this version reads {STATE_FORMAT}.")
    then, now = list(saved["layers"]), list(current["layers"])
    if then != now:
        differing = next(((a, b) for a, b in zip(then, now, strict=False) if a != b), None)
        names = f", {differing[0]} in the place of {differing[1]}" if differing else ""
        raise ValueError(
            f"The saved state is of {len(then)} layers with adapters{names}, and this model has {len(now)}: resume "
            "with the model and the adapter that the run began with."
        )
    bases = saved.get("base_fingerprint"), current["base_fingerprint"]
    if None not in bases and bases[0] != bases[1]:
        raise ValueError(
            "The frozen weights under the adapter are not those that the run began with: load the same model and "
            "revision, and with PiSSA, OLoRA or another initialisation that changes them, the base that it saved."
        )
    ranks = saved.get("num_processes", current["num_processes"]), current["num_processes"]
    if ranks[0] != ranks[1]:
        raise ValueError(
            f"The run began with {ranks[0]} processes and would go on with {ranks[1]}, which see other batches and "
            f"other probes: resume with {ranks[0]}, or begin a new run from the saved adapter."
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
        and not {value, current["config"].get(name)} <= set(SAME_TRAINING.get(name, ()))
    ]
    if changed:
        raise ValueError(
            f"The run began with other hyperparameters ({'; '.join(changed)}), so it cannot be resumed exactly: give "
            "the former values, or begin a new run from the saved adapter."
        )
