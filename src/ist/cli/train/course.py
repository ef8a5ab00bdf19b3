"""What a resumed run of `ist train` has to have in common with the run that it resumes, whatever its method.

`IST` compares its own options, the Trainer's arguments and the training data. This compares the method, the adapter and
the validation data, and where no `IST` takes part (`--method peft`, `full`) the Trainer's arguments and the data too.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from ...runs.fingerprint import base_fingerprint, data_fingerprint
from ...runs.resume import COURSE, changed_course
from .arguments import RunArguments
from .methods import METHODS

__all__ = ["RunCourse", "adapter_settings", "check_course", "check_method"]

logger = logging.getLogger(__name__)

NOT_SETTINGS = (
    *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version", "runtime_config"),
    *("rank_pattern", "total_step", "tinit", "tfinal"),
)
"""What an adapter's configuration holds beside its settings: its origin, and AdaLoRA's ranks and schedule, which follow
from the training."""
WAY_OUT = "give the former flags, or begin a new run from the saved adapter with --model_name_or_path"


class RunCourse(TrainerCallback, ExportableState):
    """Carries in each checkpoint what a resume compares.

    Args:
        values: see `describe`.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = dict(values)

    @classmethod
    def of(cls, run: RunArguments, trainer: Any, checkpoint: Path | None) -> RunCourse:
        """The callback of a run that is about to begin, or to resume from a checkpoint.

        Raises:
            ValueError: the checkpoint is of a run with another adapter or base.
        """
        values = describe(run, trainer)
        if checkpoint is not None:
            check_course(saved_values(checkpoint), values)
        return cls(values)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Have the next checkpoint hold the values of now."""
        state.stateful_callbacks[type(self).__name__] = self.state()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {"args": {"values": self.values}, "attributes": {}}


def describe(run: RunArguments, trainer: Any) -> dict[str, Any]:
    """What the course of a training depends on, as plain JSON values; what `IST` compares is left to it."""
    values: dict[str, Any] = {
        "method": run.ist.method,
        "adapter": adapter_settings(trainer.model),
        "validation": data_fingerprint(trainer.eval_dataset) if trainer.eval_dataset is not None else None,
    }
    if run.selector is None:
        given = trainer.args.to_dict()
        values["course"] = {name: given[name] for name in COURSE if name in given}
        values["course"]["train_dataset"] = data_fingerprint(trainer.train_dataset)
        values["base"] = base_fingerprint(trainer.model)
    return json.loads(json.dumps(values, default=str))


def adapter_settings(model: Any) -> dict[str, Any]:
    """The settings of a model's adapters; empty without one."""
    configs: Any = getattr(model, "peft_config", {})
    settings: dict[str, Any] = {}
    for config in configs.values():
        for name, value in config.to_dict().items():
            if name not in NOT_SETTINGS:
                settings[name] = sorted(value) if isinstance(value, (set, frozenset)) else value
    return settings


def saved_values(checkpoint: Path) -> Mapping[str, Any]:
    """What a checkpoint says of its run; empty where it was written without this callback."""
    try:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        values = state["stateful_callbacks"][RunCourse.__name__]["args"]["values"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return values if isinstance(values, Mapping) else {}


def check_method(checkpoint: Path | None, method: str) -> None:
    """Raise ValueError where a checkpoint is of a run with another method; before a method looks for its own files."""
    began = saved_values(checkpoint).get("method") if checkpoint else None
    if began in METHODS and began != method:
        raise ValueError(f"The run began with --method {began} and would resume with --method {method}: {WAY_OUT}.")


def check_course(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Compare a run with the one that it resumes.

    What makes another training is refused; a warning names what a user may mean to change, such as the learning rate.

    Raises:
        ValueError: the adapter or the frozen weights are others.
    """
    if changed := changes(saved.get("adapter"), current["adapter"]):
        raise ValueError(f"The run began with another adapter ({'; '.join(changed)}): {WAY_OUT}.")
    if None not in (saved.get("base"), current.get("base")) and saved["base"] != current["base"]:
        raise ValueError("The frozen weights are not those that the run began with: load the same model and revision.")
    course = saved.get("course")
    if isinstance(course, Mapping) and (changed := changed_course(course, current.get("course") or {})):
        logger.warning(
            "The run began with other arguments (%s): it resumes with the new ones, and not as it would have "
            "continued.",
            "; ".join(changed),
        )
    if "validation" in saved and saved["validation"] != current["validation"]:
        logger.warning(
            "The run began with other validation data (%s, now %s): losses from before and after the resume do not "
            "compare.",
            saved["validation"] or "none",
            current["validation"] or "none",
        )


def changes(saved: Any, current: Mapping[str, Any]) -> list[str]:
    """In words: which settings are not those of before; none that only one of the two has."""
    if not isinstance(saved, Mapping):
        return []
    return [
        f"{name} was {saved[name]!r} and is {current[name]!r}"
        for name in current
        if name in saved and saved[name] != current[name]
    ]
