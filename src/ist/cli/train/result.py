"""What `ist_result.json` says of a training: how the run was made, what its steps took, how they were computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from trl import SFTTrainer

from ...integrations.trainer import IST
from ...runtime.distributed import Ranks
from ..display import device_name
from .arguments import RunArguments

__all__ = ["Trained", "describe_run", "describe_steps", "ist_callback", "log_entries"]

LOGGED = ("step", "step_seconds", "loss", "eval_loss", "learning_rate", "grad_norm")
"""What the result keeps of the Trainer's log."""


@dataclass(frozen=True)
class Trained:
    """What a training took and left."""

    num_steps: int
    train_loss: float
    train_seconds: float
    step_seconds: float
    peak_memory_bytes: int
    log: list[dict[str, Any]]


def describe_run(run: RunArguments, arguments: Sequence[str], ranks: Ranks) -> dict[str, Any]:
    """What the result says of how the run was made."""
    return {
        "recipe": run.recipe,
        "arguments": list(arguments),
        "model": run.model.model_name_or_path,
        "method": run.ist.method,
        "adapter": run.ist.adapter,
        "device": device_name(),
        "num_processes": ranks.size,
        "versions": {name: version(name) for name in ("ist-peft", "torch", "transformers", "peft", "trl")},
    }


def describe_steps(trainer: SFTTrainer) -> dict[str, Any]:
    """What the result says of how the steps were computed; nothing where the Trainer trained alone."""
    callback = ist_callback(trainer)
    if not callback or not callback.tuner:
        return {}
    tuner = callback.tuner
    return {
        "fused": {"modules": tuner.num_fused, "others": dict(tuner.not_fused)},
        "probe_share": tuner.probe_share,
    }


def ist_callback(trainer: SFTTrainer) -> IST | None:
    """The callback that chooses layers, if there is one."""
    return next((callback for callback in trainer.callback_handler.callbacks if isinstance(callback, IST)), None)


def log_entries(trainer: SFTTrainer) -> list[dict[str, Any]]:
    """The Trainer's log of training and validation losses, from the first step on, resumes included."""
    losses = [entry for entry in trainer.state.log_history if entry["step"] and {"loss", "eval_loss"} & set(entry)]
    return [{name: entry[name] for name in LOGGED if name in entry} for entry in losses]
