"""Importance-aware Sparse Tuning for any training loop."""

from __future__ import annotations

import dataclasses
import time
import warnings
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from ._version import __version__
from .adapters.layers import Layer
from .adapters.view import view_model
from .config import ISTConfig, resolve_config
from .method.registry import ImportanceUpdate, SelectorFactory, make_selector, selector_factory, what_trains
from .probing.measurement import Measurement
from .probing.probes import ProbeStream
from .probing.sources import probe_stream
from .probing.suppression import LossFunction, model_loss
from .runs.fingerprint import base_fingerprint
from .runs.history import History
from .runs.resume import STATE_FORMAT, check_same_run
from .runtime.distributed import current_ranks
from .runtime.sharding import DEEPSPEED, is_deepspeed
from .step.announce import announce, warn_of_missing_parameters
from .step.parts import StepParts

__all__ = ["SparseTuner"]

MANY_STEPS = 10
"""So many steps begun and none ended are no longer steps that a loop skips."""
open_tuners: weakref.WeakSet[SparseTuner] = weakref.WeakSet()
"""Those that were not closed, perhaps since their training ended with an exception."""


class SparseTuner:
    """Trains the adapters of a few chosen layers at each optimizer step, and learns which layers matter.

    With `selector="lisa"` and others it trains whole layers of a model without adapters.

    ::

        tuner = SparseTuner(model, num_active_layers=8, probe_batches=loader)
        for batch in loader:
            with tuner.step(optimizer):         # choose layers; every update_interval steps: measure and learn
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        tuner.close()                           # the model is as PEFT made it

    A step is an optimizer step, whatever the gradient accumulation: see `step`. `begin_step` and `end_step` lie beneath
    it. Where the forward runs under autocast, so should `step`, since it measures in the precision around it. Make the
    optimizer from all trainable parameters; the tuner decides which of them a step moves. Also a context manager, which
    closes itself.

    Args:
        model: a model with adapters, or without them for selectors that train whole layers.
        config: hyperparameters; or give them as keywords.
        probe_batches: where the importance loop takes its batches from: anything that can be iterated more than once,
            such as a `DataLoader`, or a `ProbeStream`. None takes the batch that the model was trained on last.
            Of a `DataLoader` over a dataset with a length, batches of `probe_batch_size` are drawn from the dataset.
        selector: a name in `SELECTORS`, such as `ist` (the paper's chooser), `random` or `lisa`; `fixed:` with the
            layers, as in `fixed:0,3,5`; or a function `(config, number of layers) -> Selector`.
        layers: the stack of blocks to choose from, where the model has several: see `discover_layers`.
        loss_function: `(model, batch) -> loss` in nats for the importance loop; `model(**batch).loss` if None.
        history: where steps and updates are written, or None.
        options: fields of `ISTConfig`.

    Raises:
        ValueError: the model, the configuration or an option does not fit; nothing has been changed then.
    """

    def __init__(
        self,
        model: nn.Module,
        config: ISTConfig | None = None,
        *,
        probe_batches: Iterable[Mapping[str, Any]] | ProbeStream | None = None,
        selector: str | SelectorFactory = "ist",
        layers: str | Sequence[str] | None = None,
        loss_function: LossFunction | None = None,
        history: History | None = None,
        **options: Any,
    ) -> None:
        self.config = resolve_config(config, options)
        factory = selector_factory(selector)
        self._view = view = view_model(model, layers, what_trains(factory))
        self.model, self.layers = view.model, view.layers
        self.selector = make_selector(factory, self.config, [layer.name for layer in self.layers])
        self.ranks = current_ranks()
        """The processes that train together."""
        self._base = base_fingerprint(self.model)
        identity = self._identity()
        self.ranks.check_same("what is trained", {**identity.pop("config"), **identity})
        self.history: History | None = None
        self.num_steps = 0
        """Optimizer steps done."""
        self.last_update: ImportanceUpdate | None = None
        """The latest turn of the importance loop."""
        self._step_seconds = 0.0
        self._step_start: float | None = None
        self._optimizer: Any = None
        # These two may refuse, and nothing is hooked before the second has passed.
        self._parts = StepParts(view, self.config)
        seed, ranks = self.config.seed, self.ranks
        probes = probe_stream(probe_batches, self.model, seed, ranks.rank, ranks.size, self.config.probe_batch_size)
        close_earlier_tuners(self.layers)
        self._measurement = Measurement(view, probes, self.config, loss_function or model_loss, ranks)
        self._parts.open(self._updated)
        if ranks.is_main:
            announce(self.model, self.layers, self.selector, self.num_fused, self.not_fused)
        if history is not None:
            self.record_to(history)
        self.closed = False
        """Whether `close` was called."""
        self._num_begun = 0
        """Steps begun since one was ended."""
        self._in_block = False
        """Whether a `step` block is being run."""
        self._waiting = False
        """Whether the step ends as soon as the optimizer has stepped."""
        open_tuners.add(self)

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
    def probe_seconds(self) -> float:
        """Time spent in the importance loop."""
        return self._measurement.seconds

    @property
    def probe_share(self) -> float:
        """The importance loop's share of the time of all steps so far, from `begin_step` to the end of `end_step`."""
        return self._measurement.seconds / self._step_seconds if self._step_seconds else 0.0

    @property
    def reduced_bytes(self) -> tuple[int, int]:
        """Bytes of gradients that DistributedDataParallel averaged so far, and those of training every layer; zeros
        without it, and where it has a communication hook of the user's.
        """
        reduced = self._parts.tied_outputs.reduced
        return reduced.num_bytes, reduced.num_bytes_all

    def record_to(self, history: History, **versions: str) -> None:
        """From now on write steps and updates to `history`, after a line that says what is being run.

        Args:
            history: where to write. Of several processes the first one writes.
            versions: of the packages to name beside this one and torch.
        """
        if not self.ranks.is_main:
            return
        self.history = history
        history.write(
            "run",
            step=self.num_steps,
            layers=[layer.name for layer in self.layers],
            config=dataclasses.asdict(self.config),
            fused={"modules": self.num_fused, "others": dict(self.not_fused)},
            versions={"ist": __version__, "torch": torch.__version__, **versions},
        )

    def attach_optimizer(self, optimizer: Any) -> None:
        """Get to know the optimizer before the first step; `end_step` does it at the latest.

        Warns of layers that the optimizer can never train. LoRA-FA's is helped past frozen layers, which it
        needs before its first step; other optimizers are left alone.

        Args:
            optimizer: made from all trainable parameters; it may be wrapped, as Accelerate does.

        Raises:
            ValueError: it is DeepSpeed's, or its state cannot be offloaded.
        """
        while hasattr(optimizer, "optimizer") and not is_deepspeed(optimizer):
            optimizer = optimizer.optimizer
        if is_deepspeed(optimizer):
            raise ValueError(DEEPSPEED)
        if optimizer is self._optimizer:
            return
        self._parts.attach(optimizer)
        self._optimizer = optimizer
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
        active = self.active_layers
        if active is None:
            active = self.begin_step()
        self._in_block, self._waiting = True, False
        try:
            yield active
        except BaseException:
            self._in_block = False
            self._parts.give_up()
            raise
        self._in_block = False
        self._end_if_updated()

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
            warnings.warn(
                f"begin_step was called {MANY_STEPS} times and end_step never in between, so the same layers train at "
                "every step and nothing is learned of the others: call end_step(optimizer) after optimizer.step().",
                stacklevel=2,
            )
        continues = self.active_layers is not None
        if not continues:
            self._step_start = time.perf_counter()
        active = self.selector.choose(self.num_steps)
        self.ranks.check_same("the layers of the next step", {"step": self.num_steps + 1, "active": list(active)})
        self._parts.begin(active, self.num_steps)
        self._waiting = False
        if self.history and not continues:
            self.history.write("step", step=self.num_steps + 1, active=list(active))
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
        """End an optimizer step; every `update_interval` steps, measure and learn.

        After a micro-batch without an optimizer's step nothing ends: the step continues with the same layers.

        Args:
            optimizer: attached, if it is given and none is yet.

        Returns:
            What was measured and learned, or None where it was not time to.

        Raises:
            ValueError: the tuner is closed.
        """
        self._check_open()
        self._num_begun = 0
        if optimizer is not None and self._optimizer is None:
            self.attach_optimizer(optimizer)
        if isinstance(self._optimizer, Optimizer):
            return self._end_if_updated()
        return self._finish()

    def _updated(self) -> None:
        """The optimizer has stepped, and its gradients are still there."""
        if self._in_block or self._waiting:
            self._parts.after_update(self.num_steps)
        if self._waiting:
            self._finish()

    def _end_if_updated(self) -> ImportanceUpdate | None:
        """End the step if the optimizer has stepped since it began; else when it does."""
        if self.active_layers is not None and not self._parts.boundary.updated:
            self._waiting = True
            return None
        return self._finish()

    def _finish(self) -> ImportanceUpdate | None:
        """End the step, which counts; measure and learn if it is time to."""
        self._waiting = False
        self._num_begun = 0
        self._parts.end()
        self.num_steps += 1
        update = self.selector.learn(self.num_steps, self._measure)
        if update is not None:
            self.last_update = update
            if self.history:
                self.history.write("importance", step=self.num_steps, **dataclasses.asdict(update))
        if self._step_start is not None:
            self._step_seconds += time.perf_counter() - self._step_start
            self._step_start = None
        return update

    def close(self) -> None:
        """Leave the model as PEFT made it. The tuner's state can still be saved; for more steps make another tuner."""
        self.closed = True
        open_tuners.discard(self)
        self._optimizer = None
        self._parts.close()
        self._measurement.close()

    def __enter__(self) -> SparseTuner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to continue exactly, as plain JSON values.

        The generators need no state: each choice depends on the seed and the step alone.
        """
        return {
            "format": STATE_FORMAT,
            **self._identity(),
            "num_steps": self.num_steps,
            "num_probes": self._measurement.num_probes,
            "batched_trusted": self._measurement.batched_trusted,
            "last_update": self.last_update and self.last_update.state_dict(),
            "selector": self.selector.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state that `state_dict` returned.

        Raises:
            ValueError: the state is of another model, configuration or number of processes; nothing has been changed
                then.
        """
        check_same_run(state, self.state_dict())
        self.selector.load_state_dict(dict(state["selector"]))
        self.num_steps = int(state["num_steps"])
        self._measurement.resume(int(state["num_probes"]), state.get("batched_trusted"))
        saved_update = state.get("last_update")
        self.last_update = saved_update and ImportanceUpdate.from_state_dict(saved_update)

    def _measure(self, candidates: Sequence[tuple[int, ...]]) -> Tensor | None:
        """Losses of candidate sets, as `Measurement` gives them."""
        with self._parts.activation.measuring():
            return self._measurement(candidates)

    def _identity(self) -> dict[str, Any]:
        """What all processes of a run and a resumed run have in common, as plain JSON values."""
        return {
            "config": dataclasses.asdict(self.config),
            "layers": [layer.name for layer in self.layers],
            "selector_type": type(self.selector).__name__,
            "num_processes": self.ranks.size,
            "base_fingerprint": self._base,
        }

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError(
                "This tuner is closed, and the model is as PEFT made it: make another SparseTuner to continue."
            )


def close_earlier_tuners(layers: Sequence[Layer]) -> None:
    """Close the tuners of the same layers, which would freeze them at their own steps."""
    blocks = {id(layer.module) for layer in layers}
    for tuner in list(open_tuners):
        if blocks & {id(layer.module) for layer in tuner.layers}:
            tuner.close()
