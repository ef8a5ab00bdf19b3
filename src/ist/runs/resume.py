"""What a resumed run has to have in common with the run that it resumes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import current_names
from .damage import is_count, shown

__all__ = ["COURSE", "STATE_FORMAT", "changed_course", "check_same_run"]

STATE_FORMAT = 1
"""Of `SparseTuner.state_dict`; it changes when a new version could not read an old state."""

COURSE = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_steps", "num_train_epochs"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "seed", "data_seed", "full_determinism"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm"),
    *("bf16", "fp16", "label_smoothing_factor", "gradient_checkpointing", "train_sampling_strategy"),
    "train_dataset",
)
"""The Trainer's arguments that a training's course depends on, the data as `data_fingerprint` has them. The Trainer
takes other ones on a resume without a word."""


SAME_TRAINING = {"recompute": ("none", "norms", "frozen", "all"), "optimizer_state": ("keep", "offload")}
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


def check_shape(saved: Any) -> None:
    """Make sure that a saved state, which a stranger may have written, has the fields and types of one.

    Raises:
        ValueError: it has not, or it is of another format.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"The saved state of IST is {shown(saved)}, and no mapping: the checkpoint is damaged.")
    if saved.get("format") != STATE_FORMAT:
        raise ValueError(
            f"The saved state has format {shown(saved.get('format'))}, and this version reads {STATE_FORMAT}."
        )
    update = saved.get("last_update")
    parts = {
        "layers": is_list_of(saved.get("layers"), str),
        "config": isinstance(saved.get("config"), Mapping),
        "selector": isinstance(saved.get("selector"), Mapping) and is_selector_state(saved["selector"]),
        "selector_type": isinstance(saved.get("selector_type"), str),
        "batched_trusted": saved.get("batched_trusted") in (None, True, False),
        "num_steps": is_count(saved.get("num_steps")),
        "num_probes": is_count(saved.get("num_probes")),
        "num_processes": is_count(saved.get("num_processes", 1)),
        "last_update": update is None or (isinstance(update, Mapping) and is_update(update)),
    }
    if damaged := [name for name, whole in parts.items() if not whole]:
        raise ValueError(
            f"The saved state of IST has no usable {', '.join(damaged)}: the checkpoint is damaged, resume from an "
            "earlier one."
        )


def is_list_of(value: Any, *types: type) -> bool:
    """Whether a value is a list of items of these types."""
    return isinstance(value, (list, tuple)) and all(isinstance(item, types) for item in value)


def is_selector_state(state: Mapping[str, Any]) -> bool:
    """Whether scores are numbers, in the states of selectors that have some."""
    return is_list_of(state.get("importance", []), float) and is_count(state.get("num_updates", 0))


def is_update(update: Mapping[str, Any]) -> bool:
    """Whether a saved importance update has the fields of one."""
    numbers = all(is_list_of(update.get(name), float, int, type(None)) for name in ("losses", "rewards", "importance"))
    candidates = update.get("candidates")
    sets = is_list_of(candidates, list, tuple) and all(is_list_of(one, int) for one in candidates or ())
    return numbers and sets and isinstance(update.get("skipped"), (str, type(None)))


def check_same_run(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compare a saved state of `SparseTuner` with that of the tuner which is to take it up.

    Raises:
        ValueError: the state is of another format, model, number of processes, selector or configuration; the message
            says which.
    """
    check_shape(saved)
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
            f"The run began with {ranks[0]} processes and would resume with {ranks[1]}, which see other batches and "
            f"other probes: resume with {ranks[0]}, or begin a new run from the saved adapter."
        )
    if saved["selector_type"] != current["selector_type"]:
        raise ValueError(
            f"The run began with {saved['selector_type']} and would resume with {current['selector_type']}: give the "
            "former selector, or begin a new run from the saved adapter."
        )
    if lost := [name for name in current.get("selector") or () if name not in saved["selector"]]:
        raise ValueError(
            f"The saved state of IST has no usable {', '.join(lost)}: the checkpoint is damaged, resume from an "
            "earlier one."
        )
    config = {"suppression": "response", **current_names(saved["config"])}  # It was no option at first.
    changed = [
        f"{name} was {value!r} and is {current['config'].get(name)!r}"
        for name, value in config.items()
        if current["config"].get(name) != value
        and not all(one in SAME_TRAINING.get(name, ()) for one in (value, current["config"].get(name)))
    ]
    if changed:
        raise ValueError(
            f"The run began with other hyperparameters ({'; '.join(changed)}), so it cannot be resumed exactly: give "
            "the former values, or begin a new run from the saved adapter."
        )
