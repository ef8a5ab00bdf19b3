"""Optimizer steps of which each trains a few layers: where one begins and ends, whatever the accumulation."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer

from ..adapters.layers import Layer
from ..adapters.view import ModelView
from ..method.selectors.base import ImportanceUpdate
from ..runtime.sharding import DEEPSPEED, is_deepspeed
from .announce import warn_of_missing_parameters
from .interrupted import GAVE_UP, MANY_STEPS, NOT_BEGUN, NOT_ENDED, open_steps
from .parts import StepParts

__all__ = ["SparseSteps"]


class SparseSteps:
    """Begins and ends the steps of a model. What a step trains, and what is learned after it, a subclass says.

    Args:
        view: the model in training.
        parts: what a step does to it, not yet on the model.
    """

    def __init__(self, view: ModelView, parts: StepParts) -> None:
        self._view, self._parts = view, parts
        self.num_steps = 0
        """Optimizer steps done."""
        self.step_seconds = 0.0
        """Time from `begin_step` to the end of `end_step`, of all steps so far."""
        self.closed = False
        """Whether `close` was called."""
        self._step_start: float | None = None
        self._optimizer: Any = None
        self._num_begun = 0
        """Steps begun since one was ended."""
        self._in_block = False
        """Whether a `step` block is being run."""
        self._waiting = self._ended = self._warned = False
        """Whether the step ends as soon as the optimizer has stepped; whether it has; whether `NOT_BEGUN` was shown."""

    def _choose(self) -> tuple[int, ...]:
        """The layers that the next step trains, in ascending order."""
        raise NotImplementedError

    def _started(self, active: tuple[int, ...]) -> None:
        """A new step has begun, which trains the layers `active`."""

    def _learn(self) -> ImportanceUpdate | None:
        """A step is over, and counts."""

    def _open(self) -> None:
        """Put the parts on the model."""
        self._parts.open(self._updated, self._abandon)
        open_steps.add(self)

    @property
    def model(self) -> nn.Module:
        """The model, inside of DistributedDataParallel and `torch.compile`."""
        return self._view.model

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers to choose from, in the order of the depth."""
        return self._view.layers

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self._view.device

    @property
    def active_layers(self) -> tuple[int, ...] | None:
        """The layers that the current step trains; None between steps, when the model is as PEFT made it."""
        return self._parts.activation.active

    @property
    def num_fused(self) -> int:
        """How many adapter modules are fused (`ist.step.fused`)."""
        return self._parts.activation.num_fused

    @property
    def not_fused(self) -> Mapping[str, int]:
        """How many adapter modules compute as PEFT has them, by reason."""
        return self._parts.activation.not_fused

    @property
    def reduced_bytes(self) -> tuple[int, int]:
        """Bytes of gradients that DistributedDataParallel averaged so far, and those of training every layer; zeros
        without it, and where it has a communication hook of the user's.
        """
        reduced = self._parts.tied_outputs.reduced
        return reduced.num_bytes, reduced.num_bytes_all

    def attach_optimizer(self, optimizer: Any) -> None:
        """Get to know the optimizer before the first step; `end_step` does it at the latest.

        Warns once of layers that the optimizer can never train. Several optimizers may take turns or share a step:
        those that are not given are found when they first step. LoRA-FA's is helped past frozen layers.

        Args:
            optimizer: made from all trainable parameters; it may be wrapped, as Accelerate does.

        Raises:
            ValueError: it is DeepSpeed's, or its state cannot be offloaded.
        """
        self._parts.skipped.optimizer = optimizer
        while hasattr(optimizer, "optimizer") and not is_deepspeed(optimizer):
            optimizer = optimizer.optimizer
        if is_deepspeed(optimizer):
            raise ValueError(DEEPSPEED)
        if optimizer is self._optimizer:
            return
        if not hasattr(optimizer, "param_groups"):
            raise ValueError(
                f"A {type(optimizer).__name__} has no groups of parameters: give an optimizer made from the trainable "
                "parameters, as torch.optim.AdamW(p for p in model.parameters() if p.requires_grad) is."
            )
        is_new = self._parts.attach(optimizer)
        self._optimizer = optimizer
        if is_new:
            warn_of_missing_parameters(optimizer, self.layers)

    def check_length(self, num_steps: int) -> None:
        """Warn where a training of `num_steps` optimizer steps does not fit, as AdaLoRA's schedule may not."""
        self._parts.check_length(num_steps)

    @contextmanager
    def step(self, optimizer: Any) -> Iterator[tuple[int, ...]]:
        """A block around the forwards and backwards of an optimizer step, or of a part of one.

        ::

            for number, batch in enumerate(loader, 1):
                with tuner.step(optimizer):
                    (model(**batch).loss / 4).backward()
                    if number % 4 == 0:
                        optimizer.step()
                        optimizer.zero_grad()

        The block never steps the optimizer. It sees when you do, in the block or after it, and ends the tuner's step
        there; a block without an optimizer's step continues with the same layers. So it is right with Accelerate's
        `accumulate`, with `no_sync`, and with a GradScaler, whose skipped steps are no steps. An exception in the block
        leaves the model as PEFT made it, and the next block begins the same step again.

        Args:
            optimizer: of PyTorch's kind, made from all trainable parameters; it may be wrapped, as Accelerate does.

        Yields:
            Indices of the active layers in ascending order.

        Raises:
            ValueError: in a block of its own, after `close`, or with an optimizer whose steps cannot be seen.
        """
        if self._in_block:
            raise ValueError("tuner.step() inside of tuner.step(): the blocks of two micro-batches follow each other.")
        self._check_open()
        self.attach_optimizer(optimizer)
        if not isinstance(self._optimizer, Optimizer):
            raise ValueError(
                f"A {type(self._optimizer).__name__} does not say when it steps: give an optimizer of torch.optim's "
                "kind, or call tuner.begin_step() and tuner.end_step() around each optimizer step."
            )
        self._parts.continues()
        active = self.active_layers
        if active is None:
            active = self.begin_step()
        self._in_block, self._waiting = True, False
        self._parts.interruption.inside = True
        try:
            yield active
        except BaseException:
            self._in_block = False
            self._parts.give_up()
            raise
        self._in_block = False
        if self.active_layers is not None:
            self._end_if_updated()
        self._parts.interruption.inside = not self._waiting  # Outside of blocks nothing is computed.

    def begin_step(self) -> tuple[int, ...]:
        """Choose the layers of the next optimizer step and freeze the adapters of all others.

        Returns:
            Indices of the active layers in ascending order.

        Raises:
            ValueError: on every rank, where the processes do not train the same step or layers; the tuner is closed.
        """
        self._check_open()
        self._num_begun += 1
        if self._num_begun == MANY_STEPS:
            warnings.warn(NOT_ENDED, stacklevel=2)
        continues = self.active_layers is not None
        if not continues:
            self._step_start = time.perf_counter()
        active = self._choose()
        self._parts.begin(active, self.num_steps)
        self._waiting = self._ended = False
        if not continues:
            self._started(active)
        return active

    def before_optimizer_step(self) -> None:
        """Drop gradients that reached frozen layers past their adapters' forward. Every optimizer of torch does it at
        its step by itself; call this before the step of any other. `IST` always calls it.
        """
        self._parts.before_update()

    def after_optimizer_step(self) -> None:
        """Let AdaLoRA allocate its ranks. Needed for it alone, while the gradients are still there: after
        `optimizer.step()` and before `optimizer.zero_grad()`; `IST` always calls it.
        """
        self._parts.after_update(self.num_steps)

    def end_step(self, optimizer: Any = None) -> ImportanceUpdate | None:
        """End a step that the optimizer has made; every `update_interval` steps, measure and learn.

        Where it has made none since `begin_step` (a micro-batch, a GradScaler or a loop that skips), the step continues
        with the same layers, and ends as soon as it does. Skips that nothing shows count as steps: within an
        optimizer's own `step`; of one without PyTorch's hooks, until a call of its class's `step` was seen.

        Args:
            optimizer: see `attach_optimizer`; needed at the first call, and where another one takes its place.

        Returns:
            What was measured and learned; None where it was not time to, or the step continues.

        Raises:
            ValueError: the tuner is closed.
        """
        self._check_open()
        self._num_begun = 0
        last = self._optimizer
        if optimizer is not None:
            self.attach_optimizer(optimizer)
        if self.active_layers is None:
            takes_turns = last is not None and last is not self._optimizer  # The other one has ended the step.
            if not (self._ended or self._in_block or self._warned or takes_turns):
                self._warned = True
                warnings.warn(NOT_BEGUN, stacklevel=2)
            return None
        return self._end_if_updated() if self._parts.boundary.knows(self._optimizer) else self._finish()

    def close(self) -> None:
        """Leave the model as PEFT made it. The tuner's state can still be saved; for more steps make another tuner."""
        self.closed = True
        open_steps.discard(self)
        self._optimizer = None
        self._parts.close()

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _updated(self) -> None:
        """The optimizer has stepped, and its gradients are still there."""
        if self._in_block or self._waiting:
            self._parts.after_update(self.num_steps)
        if self._waiting:
            self._finish()
            self._ended = True

    def _abandon(self) -> None:
        """The training that began the step is over, and another one runs."""
        if not self._in_block:
            self._waiting = False
            self._parts.give_up()
            warnings.warn(GAVE_UP, stacklevel=2)

    def _end_if_updated(self) -> ImportanceUpdate | None:
        """End the step if the optimizer has stepped since it began; else when it does."""
        if self._parts.boundary.updated:
            return self._finish()
        self._waiting = True
        return None

    def _finish(self) -> ImportanceUpdate | None:
        """End the step, which counts; measure and learn if it is time to."""
        self._waiting = False
        self._num_begun = 0
        self._parts.end()
        self.num_steps += 1
        update = self._learn()
        if self._step_start is not None:
            self.step_seconds += time.perf_counter() - self._step_start
            self._step_start = None
        return update

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("This tuner is closed, the model as PEFT made it: make another SparseTuner to continue.")
