"""A Trainer and the `IST` among its callbacks: brought together before a training, parted when it ends in any way.

A callback is never given its Trainer, nor told of an exception. So the first `IST` that is made wraps `Trainer.train`,
once: while a Trainer trains it can be asked for (`current_trainer`), and its `IST` is closed afterwards, also after
Ctrl-C and where a traceback keeps the Trainer alive. Trainers without an `IST` train as they do without the wrapper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..runtime.sharding import DEEPSPEED, check_saves, is_sharded
from ..runtime.wrappers import is_ddp
from .finite import checked_weights

__all__ = [
    "check_alone",
    "check_arguments",
    "check_backend_of",
    "current_checkpoint",
    "current_trainer",
    "forget_evaluation",
    "move_to_front",
    "no_trainer",
    "skip_steps",
    "watch_trainings",
]

WRAPPED = "_ist_closes"
"""Marks a `train` that closes the `IST` of its Trainer."""
in_training: ContextVar[Any] = ContextVar("in_training", default=None)
"""The Trainer whose `train` runs, in this thread."""
resumes_from: ContextVar[Path | None] = ContextVar("resumes_from", default=None)
"""The checkpoint that this `train` was told to resume from."""


def watch_trainings(kind: type[Any]) -> None:
    """Have every Trainer close its callbacks of a kind when its training ends.

    Args:
        kind: of callbacks, with methods `close` and `check_weights`.
    """
    if not hasattr(Trainer.train, WRAPPED):
        Trainer.train = closing(Trainer.train, kind)  # type: ignore[method-assign]


def closing(train: Callable[..., Any], kind: type[Any]) -> Callable[..., Any]:
    """`Trainer.train`, which closes the Trainer's callbacks of a kind after it."""

    @functools.wraps(train)
    def train_and_close(self: Any, *args: Any, **kwargs: Any) -> Any:
        callbacks = self.callback_handler.callbacks
        if not any(isinstance(callback, kind) for callback in callbacks):
            return train(self, *args, **kwargs)
        forget_evaluation(self)

        def check() -> None:
            for callback in callbacks:
                if isinstance(callback, kind):
                    callback.check_weights()

        checkpoint = resumes_from.set(resumed_checkpoint(self, args, kwargs))  # It may raise.
        token = in_training.set(self)
        try:
            with checked_weights(self, check):
                return train(self, *args, **kwargs)
        finally:
            in_training.reset(token)
            resumes_from.reset(checkpoint)
            for callback in list(callbacks):
                if isinstance(callback, kind):
                    callback.close()

    setattr(train_and_close, WRAPPED, True)
    return train_and_close


def current_trainer(callback: TrainerCallback) -> Any:
    """The Trainer that trains with a callback, or None where its `train` does not call transformers' own."""
    trainer = in_training.get()
    return trainer if trainer is not None and callback in trainer.callback_handler.callbacks else None


def current_checkpoint(callback: TrainerCallback) -> Path | None:
    """The checkpoint, wherever it lies, that the Trainer of a callback resumes from; None where nothing says so."""
    return resumes_from.get() if current_trainer(callback) is not None else None


def resumed_checkpoint(trainer: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Path | None:
    """The checkpoint that the arguments of `Trainer.train` name, as the Trainer reads them."""
    given = kwargs.get("resume_from_checkpoint", args[0] if args else None)
    if given is True:
        folder = trainer.args.output_dir
        given = get_last_checkpoint(folder) if folder and Path(folder).is_dir() else None
    return Path(given) if given else None


def no_trainer() -> None:
    """What is not attached to a Trainer has none."""


def check_alone(callbacks: Sequence[TrainerCallback], kind: type[Any]) -> None:
    """Raise ValueError where several callbacks would choose layers."""
    num = sum(isinstance(callback, kind) for callback in callbacks)
    if num > 1:
        raise ValueError(
            f"The Trainer has {num} {kind.__name__} callbacks, each of which would freeze the others' layers: give one."
        )


def check_arguments(args: TrainingArguments) -> None:
    """Raise ValueError where the arguments ask for a backend under which no layer can be frozen."""
    if args.deepspeed or getattr(args, "deepspeed_plugin", None):
        raise ValueError(DEEPSPEED)
    if args.n_gpu > 1:
        raise ValueError(
            f"The Trainer would spread the model over {args.n_gpu} GPUs by nn.DataParallel, whose replicas cannot "
            "be frozen apart: start one process for each GPU with `accelerate launch` or `torchrun`, or show the "
            "Trainer one GPU, as in CUDA_VISIBLE_DEVICES=0."
        )


def move_to_front(callback: TrainerCallback, callbacks: list[TrainerCallback]) -> None:
    """Have a callback come before the reporters (TensorBoard, W&B, trackio), which the Trainer puts before users'.

    Those between the new place and the old one move up by one, so that a loop over the list misses nobody.
    """
    callbacks.remove(callback)
    callbacks.insert(0, callback)


def skip_steps(trainer: Any) -> Callable[[], object]:
    """Have a Trainer that has done all its steps do none.

    It looks at the number of steps after a step only, so that a run which is resumed at its end trains one too many.

    Returns:
        What undoes it.
    """

    def run_no_epoch(*_: Any, resume_from_checkpoint: str | None = None, **__: Any) -> None:
        """Nothing is left to train; what draws at random afterwards draws as it would have then."""
        if resume_from_checkpoint is not None:
            trainer._load_rng_state(resume_from_checkpoint)

    vars(trainer)["_run_epoch"] = run_no_epoch
    return lambda: vars(trainer).pop("_run_epoch", None)


def forget_evaluation(trainer: Any) -> None:
    """Let a training prepare its model by itself, whatever was evaluated before it.

    `evaluate()` and `predict()` mark the bare model as prepared. Training then never wraps it in
    DistributedDataParallel, and each process trains an adapter of its own. A model that FSDP shards is wrapped by the
    evaluation already, and one that a training has wrapped stays wrapped.
    """
    model: Any = trainer.model
    if model is None or not is_distributed(trainer) or is_sharded(model) or is_parallel(model):
        return
    vars(model).pop("_is_accelerate_prepared", None)
    prepared = trainer.accelerator._models
    prepared[:] = [other for other in prepared if other is not model]


def check_backend_of(trainer: Any) -> None:
    """Raise ValueError where the model is not wrapped as the launcher asked: ranks would train apart, in silence; or is
    wrapped so that its adapter cannot be saved.
    """
    wrapped: Any = trainer.model_wrapped
    check_saves(wrapped)
    if backend(trainer) == "FSDP" and not is_sharded(wrapped):
        found, wanted = "not sharded", "fully sharded (FSDP)"
    elif is_distributed(trainer) and not (is_sharded(wrapped) or is_parallel(wrapped)):
        found, wanted = "not wrapped", "wrapped in DistributedDataParallel"
    else:
        return
    raise ValueError(
        f"The launcher asks for a model that is {wanted}, and it is {found}: each of the "
        f"{trainer.accelerator.num_processes} processes would train an adapter of its own. Make a new model and "
        "Trainer for this training, and let nothing but this Trainer prepare the model."
    )


def backend(trainer: Any) -> str:
    """Accelerate's name of the distributed backend, such as `MULTI_GPU` (DDP), `FSDP` or `NO`."""
    kind = trainer.accelerator.distributed_type
    return str(getattr(kind, "value", kind))


def is_distributed(trainer: Any) -> bool:
    """Whether several processes train a copy of the model each, or were to."""
    return backend(trainer).startswith("MULTI_")


def is_parallel(model: Any) -> bool:
    """Whether a model averages its gradients over the ranks: in DDP's wrapper, or by the layout of its parameters."""
    return is_ddp(model) or any(hasattr(parameter, "device_mesh") for parameter in model.parameters())
