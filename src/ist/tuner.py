"""Importance-aware Sparse Tuning for any training loop."""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._version import __version__
from .activation import LayerActivation
from .adalora import RankAllocation, find_adalora
from .config import Damping, ISTConfig, resolve_config
from .history import History
from .layers import Layer, discover_layers, parameters_outside
from .lora_fa import IdlePairs, is_lora_fa
from .probes import ProbeStream, private_randomness, probe_stream, to_device
from .resume import STATE_FORMAT, check_same_run
from .sampling import keyed_seed
from .selectors import ImportanceUpdate, SelectorFactory, selector_factory
from .suppression import LossFunction, candidate_losses, model_loss

__all__ = ["SparseTuner"]

logger = logging.getLogger(__name__)


class SparseTuner:
    """Trains the adapters of a few chosen layers at each optimizer step, and learns which layers matter.

    ::

        tuner = SparseTuner(model, num_active_layers=8, probe_batches=loader)
        for batch in loader:
            tuner.begin_step()                  # choose and activate
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tuner.end_step(optimizer)           # every update_interval steps: measure and learn
        tuner.close()                           # the model is as PEFT made it

    A step is an optimizer step: with gradient accumulation `begin_step` comes before the first backward of a step and
    `end_step` after the optimizer's. Make the optimizer from all trainable parameters; which of them a step moves is
    this class's matter. Also a context manager, which closes itself.

    Args:
        model: a model with adapters.
        config: hyperparameters; or give them as keywords.
        probe_batches: where the importance loop takes its batches from: anything that can be iterated more than once,
            such as a `DataLoader`, or a `ProbeStream`. None takes the batch that the model was trained on last.
        selector: `ist` (the paper's chooser), `random`, or a function `(config, number of layers) -> Selector`.
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
        check_one_process()
        self.model = model
        self.layers = discover_layers(model, layers)
        self.selector = selector_factory(selector)(self.config, len(self.layers))
        self.history: History | None = None
        self.num_steps = 0
        """Optimizer steps done."""
        self.last_update: ImportanceUpdate | None = None
        """The latest turn of the importance loop."""
        self.probe_seconds = 0.0
        """Time spent in the importance loop."""
        self._loss_function = loss_function or model_loss
        self._num_probes = 0
        self._optimizer: Any = None
        self._idle_pairs: IdlePairs | None = None
        self._warned_no_batch = False
        self._warned_not_allocated = False
        self._probes = probe_stream(probe_batches, model, self.config.seed)
        adalora = find_adalora(model)
        self._activation = LayerActivation(self.layers, readers=() if adalora is None else (adalora,))
        self._announce()
        if history is not None:
            self.record_to(history)
        self.rank_allocation = None if adalora is None else RankAllocation(adalora)
        """AdaLoRA's, or None for other methods."""

    @property
    def active_layers(self) -> tuple[int, ...] | None:
        """The layers that the current step trains; None between steps, when the model is as PEFT made it."""
        return self._activation.active

    def record_to(self, history: History, **versions: str) -> None:
        """From now on write steps and updates to `history`, after a line that says what is being run.

        Args:
            history: where to write.
            versions: of the packages to name beside this one and torch.
        """
        self.history = history
        history.write(
            "run",
            step=self.num_steps,
            layers=[layer.name for layer in self.layers],
            config=dataclasses.asdict(self.config),
            versions={"ist": __version__, "torch": torch.__version__, **versions},
        )

    def attach_optimizer(self, optimizer: Any) -> None:
        """Get to know the optimizer before the first step; `end_step` does it at the latest.

        Warns of layers that the optimizer can never train. LoRA-FA's is helped past idle layers, which it needs before
        its first step; other optimizers are left alone.

        Args:
            optimizer: made from all trainable parameters; it may be wrapped, as Accelerate does.
        """
        while hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer
        if optimizer is self._optimizer:
            return
        self._optimizer = optimizer
        warn_of_missing_parameters(optimizer, self.layers)
        if self._idle_pairs:
            self._idle_pairs.close()
        self._idle_pairs = IdlePairs(optimizer, self._idle_parameters) if is_lora_fa(optimizer) else None

    def begin_step(self) -> tuple[int, ...]:
        """Choose the layers of the next optimizer step and freeze the adapters of all others.

        Returns:
            Indices of the active layers in ascending order.
        """
        active = self.selector.choose(self.num_steps)
        self._activation.activate(active)
        if self.rank_allocation:
            self.rank_allocation.begin_step(self.num_steps)
        if self.history:
            self.history.write("step", step=self.num_steps + 1, active=list(active))
        return active

    def before_optimizer_step(self) -> None:
        """Drop gradients of idle layers. Needed between backward and optimizer step only where a loss of your own
        reaches the adapters' weights past their forward, as a penalty on them does; `IST` always calls it.
        """
        self._activation.drop_idle_gradients()

    def after_optimizer_step(self) -> None:
        """Let AdaLoRA allocate its ranks. Needed for it alone, while the gradients are still there: after
        `optimizer.step()` and before `optimizer.zero_grad()`; `IST` always calls it.
        """
        if self.rank_allocation:
            self.rank_allocation.allocate(self.num_steps)

    def end_step(self, optimizer: Any = None) -> ImportanceUpdate | None:
        """Close an optimizer step; every `update_interval` steps, measure and learn.

        Args:
            optimizer: attached, if it is given and none is yet.

        Returns:
            What was measured and learned, or None where it was not time to.
        """
        if optimizer is not None and self._optimizer is None:
            self.attach_optimizer(optimizer)
        self._warn_if_not_allocated()
        self._activation.activate_all()
        self.num_steps += 1
        update = self.selector.learn(self.num_steps, self._measure)
        if update is not None:
            self.last_update = update
            if self.history:
                self.history.write("importance", step=self.num_steps, **dataclasses.asdict(update))
        return update

    def close(self) -> None:
        """Leave the model as PEFT made it. The tuner's state can still be saved."""
        if self.rank_allocation:
            self.rank_allocation.close()
        if self._idle_pairs:
            self._idle_pairs.close()
        self._activation.close()
        self._probes.close()

    def __enter__(self) -> SparseTuner:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on exactly, as plain JSON values.

        The generators need no state: each choice depends on the seed and the step alone.
        """
        return {
            "format": STATE_FORMAT,
            "config": dataclasses.asdict(self.config),
            "layers": [layer.name for layer in self.layers],
            "num_steps": self.num_steps,
            "num_probes": self._num_probes,
            "last_update": self.last_update and self.last_update.state_dict(),
            "selector_type": type(self.selector).__name__,
            "selector": self.selector.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `state_dict` returned.

        Raises:
            ValueError: the state is of another model or configuration; nothing has been changed then.
        """
        check_same_run(state, self.state_dict())
        self.selector.load_state_dict(dict(state["selector"]))
        self.num_steps = int(state["num_steps"])
        self._num_probes = int(state["num_probes"])
        saved_update = state.get("last_update")
        self.last_update = saved_update and ImportanceUpdate.from_state_dict(saved_update)

    def _measure(self, candidates: Sequence[tuple[int, ...]]) -> Tensor | None:
        """Losses of candidate sets on the next probe batch; training notices nothing of it."""
        start = time.perf_counter()
        device = next(self.model.parameters()).device
        with private_randomness(keyed_seed(self.config.seed, "probe", self._num_probes), device):
            batch = self._probes.batch(self._num_probes)
            if batch is None:
                self._warn_no_batch()
                return None
            losses = candidate_losses(
                self.model,
                self.layers,
                candidates,
                to_device(batch, device),
                self.config.beta,
                self._loss_function,
                cast("Damping", self.config.damping),
            )
        self._num_probes += 1
        self.probe_seconds += time.perf_counter() - start
        return losses

    def _idle_parameters(self) -> set[int]:
        """The ids of the parameters that the current step leaves alone."""
        active = self.active_layers
        idle = () if active is None else (layer for layer in self.layers if layer.index not in active)
        return {id(parameter) for layer in idle for parameter in layer.parameters}

    def _warn_no_batch(self) -> None:
        if not self._warned_no_batch:
            self._warned_no_batch = True
            warnings.warn(
                "There is no batch to measure the layers' importance on, so the choice stays as it is: give "
                "probe_batches with at least one batch, or call the model with keyword arguments.",
                stacklevel=4,
            )

    def _warn_if_not_allocated(self) -> None:
        if self.rank_allocation and not self.rank_allocation.done and not self._warned_not_allocated:
            self._warned_not_allocated = True
            warnings.warn(
                "AdaLoRA's ranks are not being allocated: call tuner.after_optimizer_step() after optimizer.step() and "
                "before optimizer.zero_grad().",
                stacklevel=3,
            )

    def _announce(self) -> None:
        """Say once what is chosen from and what trains besides."""
        active = len(self.selector.choose(0))
        logger.info("IST trains %d of %d layers a step (%s, …).", active, len(self.layers), self.layers[0].name)
        outside = parameters_outside(self.model, self.layers)
        if outside:
            count = sum(parameter.numel() for parameter in outside.values())
            names = list(outside)
            logger.warning(
                "%d parameters in %d tensors outside of the layers' adapters train at every step: %s%s.",
                count,
                len(outside),
                ", ".join(names[:3]),
                ", …" if len(names) > 3 else "",
            )


def warn_of_missing_parameters(optimizer: Any, layers: Sequence[Layer]) -> None:
    """Warn of layers that an optimizer can never train."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [layer.name for layer in layers if not all(id(p) in held for p in layer.parameters)]
    if missing:
        warnings.warn(
            f"The optimizer lacks adapter parameters of {len(missing)} layers ({missing[0]}, …), which are never "
            "trained: make it from all parameters that require a gradient, before the first begin_step().",
            stacklevel=4,
        )


def check_one_process() -> None:
    """Raise ValueError where several processes train together, which would each learn an importance of their own."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        world_size = torch.distributed.get_world_size()
        if world_size > 1:
            raise ValueError(
                f"{world_size} processes train together, and this version is for one: start a single process, with "
                "gradient_accumulation_steps for a larger batch."
            )
