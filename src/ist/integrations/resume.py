"""Take up the state that a Trainer's checkpoint holds of an `IST`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..runs.checkpoints import check_checkpoint
from ..runs.history import HISTORY_FILE, History
from ..runs.resume import changed_course
from ..tuner import SparseTuner

__all__ = ["checkpoint_folder", "resume", "run_history", "saved_states"]


def resume(tuner: SparseTuner, checkpoint: Path, state: TrainerState, name: str, course: Mapping[str, Any]) -> None:
    """Have a tuner continue from the checkpoint of the Trainer's step; at step 0 there is none.

    Args:
        tuner: of the training that begins.
        checkpoint: the folder that the Trainer resumes from, of which all but the state is the Trainer's to read.
        state: the Trainer's state, which holds those of its callbacks.
        name: of the callback among them.
        course: the arguments that decide how the training goes, as they are now.

    Raises:
        ValueError: the checkpoint is damaged, or of another run.
    """
    if state.global_step == 0:
        return
    if checkpoint.is_dir():
        check_checkpoint(checkpoint)
    own = saved_states(state).get(name) or {}
    saved = own.get("tuner")
    if not saved or own.get("global_step", saved.get("num_steps")) != state.global_step:
        warnings.warn(
            f"The checkpoint of step {state.global_step} holds no IST state of that step: the importance of the "
            "layers is learned anew from here.",
            stacklevel=3,
        )
        tuner.num_steps = state.global_step
        return
    tuner.load_state_dict(saved)
    if changed := changed_course(own.get("course") or {}, course):
        warnings.warn(
            f"The run began with other arguments ({'; '.join(changed)}): it resumes with the new ones, and not as "
            "it would have continued.",
            stacklevel=3,
        )


def run_history(tuner: SparseTuner, args: TrainingArguments, state: TrainerState, trainer: Any = None) -> History:
    """The history beside the run's checkpoints, up to the step that a tuner resumes from.

    A tuner counts no steps that a gradient scaler skipped; the Trainer, whose numbers are logged, counts them.
    """
    file = checkpoint_folder(args, state, trainer).parent / HISTORY_FILE
    if state.global_step == 0:
        return History(file)
    return History(file, resume_step=tuner.num_steps, resume_log_step=state.global_step)


def checkpoint_folder(args: TrainingArguments, state: TrainerState, trainer: Any = None) -> Path:
    """Where the Trainer keeps the checkpoint of this step; each trial of a hyperparameter search has its own folder."""
    of_trial = getattr(trainer, "_get_output_dir", None)
    folder = args.output_dir if of_trial is None else of_trial(getattr(trainer, "_trial", None))
    return Path(folder or ".") / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def saved_states(state: TrainerState) -> dict[str, Any]:
    """The states of callbacks in a Trainer's state, which its annotation calls a list of callbacks."""
    return cast("dict[str, Any]", state.stateful_callbacks)
