"""`IST`, the callback that brings Importance-aware Sparse Tuning to the Trainers of transformers and TRL."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import transformers
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ..config import ISTConfig, check_loss_function, check_stack_names, resolve_config
from ..method.registry import SelectorFactory, selector_factory
from ..probing.suppression import LossFunction
from ..runs.checkpoints import write_manifest
from ..runs.fingerprint import data_fingerprint
from ..runs.resume import COURSE
from ..tuner import SparseTuner
from .attachment import (
    check_alone,
    check_arguments,
    check_backend_of,
    current_checkpoint,
    current_trainer,
    move_to_front,
    no_trainer,
    skip_steps,
    watch_trainings,
)
from .finite import logs_at
from .losses import trained_loss, warn_of_other_loss
from .probe_data import OF_A_STREAM, check_probe, check_probe_dataset, make_probes
from .resume import checkpoint_folder, resume, run_history, saved_states
from .summary import summarize, warn_of_no_update, warn_of_uniform_choice

__all__ = ["IST"]


class IST(TrainerCallback, ExportableState):
    """Importance-aware Sparse Tuning in one line, algorithm 1 of the paper.

    ::

        trainer = Trainer(model=peft_model, args=args, train_dataset=data, callbacks=[IST()])
        trainer.train()

    Probe batches are drawn from the training set by a loader of their own; a dataset that can only be iterated is
    measured on the batch trained on last. The state travels with the Trainer's checkpoints, and a run that resumes
    from one continues exactly. What was chosen and learned is written to `ist_history.jsonl` in the output folder, and
    its summary reaches the Trainer's reporters as `ist/…`. What is saved is a plain PEFT adapter. When the training
    ends in any way, Ctrl-C included, the model is as PEFT made it.

    `attach` binds the callback to its Trainer. `Trainer.train` does it by itself; call it for a subclass whose `train`
    does not call transformers' own. Without it `ist/…` reaches the log and the history, but not the reporters, and the
    loss is the model's own.

    Args:
        config: hyperparameters; or give them as keywords.
        selector: a name in `SELECTORS`, such as `ist` (the paper's), `random` or `lisa`; `fixed:` with the
            layers, as in `fixed:0,3,5`; or a function `(config, number of layers) -> Selector`.
        layers: the stack of blocks to choose from, where the model has several: see `discover_layers`.
        loss_function: `(model, batch) -> loss` in nats for the importance loop. If None it is the loss that is trained:
            the Trainer's own, where `compute_loss` is overridden, or `compute_loss_func` or label smoothing is set;
            else `model(**batch).loss`.
        probe_dataset: a map-style dataset to measure on, prepared as the training set is; the training set if None.
        options: fields of `ISTConfig`, such as `num_active_layers=8`. The `seed` of the choices is one of them, and not
            the Trainer's: give `seed=args.seed` where trainings of several seeds are compared.

    Raises:
        ValueError: an option is unknown or not allowed; and, when training begins, the model does not fit.
    """

    def __init__(
        self,
        config: ISTConfig | None = None,
        *,
        selector: str | SelectorFactory = "ist",
        layers: str | Sequence[str] | None = None,
        loss_function: LossFunction | None = None,
        probe_dataset: Any = None,
        **options: Any,
    ) -> None:
        self.config = resolve_config(config, options, IST)
        self.tuner: SparseTuner | None = None
        """The tuner of the current training, or of the last one."""
        self._selector = selector
        selector_factory(selector)
        check_loss_function(loss_function)
        check_probe_dataset(probe_dataset)
        if layers is not None:
            check_stack_names(layers)
        self._layers = layers
        self._loss_function = loss_function
        self._probe_dataset = probe_dataset
        self._lost_arguments: list[str] = []
        self._course: dict[str, Any] = {}
        self._global_step = 0
        self._trainer: Callable[[], Any] = no_trainer
        """Gives the Trainer that this callback is attached to, while it lives."""
        self._undo_skip: Callable[[], object] = no_trainer
        self._compared = False
        """Whether the measured loss was compared with the trained one, which is done early in a run."""
        watch_trainings(IST)

    def attach(self, trainer: Any) -> IST:
        """Bind this callback to a Trainer: before its reporters, and to the loss that it computes.

        Args:
            trainer: transformers' `Trainer` or a subclass; the callback is added where it is not one of its callbacks.

        Returns:
            This callback.

        Raises:
            ValueError: it is no Trainer, or it has another `IST`.
        """
        callbacks = getattr(getattr(trainer, "callback_handler", None), "callbacks", None)
        if not isinstance(callbacks, list):
            raise ValueError(f"{type(trainer).__name__} has no callbacks: give a Trainer of transformers or TRL.")
        if self not in callbacks:
            trainer.add_callback(self)
        check_alone(callbacks, IST)
        move_to_front(self, callbacks)
        self._trainer = weakref.ref(trainer)
        return self

    # The Trainer calls these in the order in which they stand here.

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach to the model, and take up the checkpoint's state on a resume."""
        self.close()
        trainer = current_trainer(self) or self._trainer()
        if self._lost_arguments:
            raise ValueError(
                f"restore_callback_states_from_checkpoint=True rebuilt IST without {', '.join(self._lost_arguments)}, "
                "which no checkpoint can hold: leave that flag off, IST restores its state without it."
            )
        check_arguments(args)
        if trainer is not None:
            self.attach(trainer)
            check_backend_of(trainer)
            if state.global_step >= state.max_steps:
                control.should_training_stop = True
                self._undo_skip = skip_steps(trainer)
        loss_function = self._loss_function or (trained_loss(trainer) if trainer is not None else None)
        batch_size = self.config.probe_batch_size or state.train_batch_size or args.train_batch_size
        interval = self.config.update_interval
        measures = self._selector == "ist" and state.global_step // interval < state.max_steps // interval
        probes = make_probes(kwargs["train_dataloader"], self._probe_dataset, batch_size, self.config.seed, measures)
        if measures and probes is None and loss_function is not self._loss_function:
            raise ValueError(OF_A_STREAM)
        tuner = SparseTuner(
            kwargs["model"],
            self.config,
            probe_batches=probes,
            selector=self._selector,
            layers=self._layers,
            loss_function=loss_function,
        )
        try:
            tuner.attach_optimizer(kwargs["optimizer"])
            given = args.to_dict()
            self._course = {name: given[name] for name in COURSE if name in given}
            rows = data_fingerprint(getattr(kwargs["train_dataloader"], "dataset", None))
            if rows is not None:
                self._course["train_dataset"] = rows
            checkpoint = current_checkpoint(self) or checkpoint_folder(args, state)
            resume(tuner, checkpoint, state, type(self).__name__, self._course)
            if measures and self._loss_function is None:
                check_probe(probes, tuner, loss_function)
            if tuner.ranks.is_main:
                tuner.record_to(run_history(tuner, args, state, trainer), transformers=transformers.__version__)
        except Exception:
            tuner.close()
            raise
        self.tuner, self._compared = tuner, state.global_step > 0
        tuner.check_length(state.max_steps)
        warn_of_no_update(tuner, self._selector, state.max_steps)
        # The Trainer's next save expects an entry, which a checkpoint of a run without IST lacks.
        saved_states(state).setdefault(type(self).__name__, self.state())

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the layers of this optimizer step."""
        if self.tuner and not self.tuner.closed:
            self.tuner.begin_step()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make sure that the micro-batch has trained the adapter that the step began with."""
        if self.tuner:
            self.tuner.check_adapters()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """So has the last one; and leave the optimizer nothing of frozen layers."""
        if self.tuner:
            self.tuner.check_adapters()
            self.tuner.before_optimizer_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let AdaLoRA allocate its ranks, which the Trainer does not."""
        if self.tuner:
            self.tuner.after_optimizer_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure and learn where it is time to."""
        self._global_step = state.global_step
        if self.tuner and not self.tuner.closed:
            self.tuner.end_step(kwargs.get("optimizer"))
        if logs_at(state, args):
            self.check_weights()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the weights at the end of the training at the latest."""
        self.check_weights()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the checksum manifest when every rank has written its files, so that damage is found at a resume."""
        if self.tuner:
            self.tuner.ranks.wait()
            if self.tuner.ranks.is_main and (folder := checkpoint_folder(args, state, self._trainer())).is_dir():
                write_manifest(folder)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add `ist/…` to what the reporters are about to log."""
        if self.tuner is None or logs is None:
            return
        if self.tuner.history:
            own = ("event", "step")
            numbers = {name: v for name, v in logs.items() if isinstance(v, (int, float)) and name not in own}
            self.tuner.history.write("log", step=state.global_step, **numbers)
        if "loss" in logs:
            if not self._compared and self._loss_function is None and (update := self.tuner.last_update):
                self._compared = True
                warn_of_other_loss(update, logs["loss"])
            summary = summarize(self.tuner)
            logs.update(summary)
            if state.log_history:
                state.log_history[-1].update(summary)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as PEFT made it."""
        if self.tuner:
            warn_of_uniform_choice(self.tuner)
        self.close()

    def check_weights(self) -> None:
        """Raise ValueError, on every rank, where the weights in training are not finite."""
        if self.tuner and not self.tuner.closed:
            self.tuner.check_weights()

    def close(self) -> None:
        """Leave the model as PEFT made it. The Trainer does not say when a training ends with an exception: between
        forwards its weights and flags are then as PEFT made them all the same, and this (or the next training) takes
        the hooks off.
        """
        self._undo_skip()
        self._undo_skip = no_trainer
        if self.tuner:
            self.tuner.close()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of this callback, as plain JSON values."""
        arguments: dict[str, Any] = {field: getattr(self.config, field) for field in self.config.__dataclass_fields__}
        given = {"loss_function": self._loss_function, "probe_dataset": self._probe_dataset}
        lost = [name for name, value in given.items() if value is not None]
        if isinstance(self._selector, str):
            arguments["selector"] = self._selector
        else:
            lost.append("selector")
        named = self._layers is None or isinstance(self._layers, str)
        arguments["layers"] = self._layers if named else list(self._layers or ())
        return {
            "args": arguments,
            "attributes": {"_lost_arguments": lost},
            "tuner": self.tuner.state_dict() if self.tuner else None,
            "course": self._course,
            # The Trainer counts steps that a GradScaler skipped; the tuner does not.
            "global_step": self._global_step,
        }
