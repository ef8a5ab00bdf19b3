"""Importance-aware Sparse Tuning for any training loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ._version import __version__
from .adapters.layers import parameters_outside
from .adapters.view import view_model
from .config import ISTConfig, check_loss_function, resolve_config
from .method.registry import (
    ImportanceUpdate,
    SelectorFactory,
    least_layers,
    make_selector,
    selector_factory,
    what_trains,
)
from .probing.measurement import Measurement
from .probing.probes import ProbeStream
from .probing.sources import check_first, probe_stream
from .probing.suppression import LossFunction, model_loss
from .runs.fingerprint import base_fingerprint
from .runs.history import History, check_history
from .runs.resume import STATE_FORMAT, check_same_run
from .runtime.distributed import current_ranks
from .step.announce import announce
from .step.finite import CHECK_INTERVAL, FiniteWeights
from .step.interrupted import close_earlier
from .step.parts import StepParts
from .step.steps import SparseSteps

__all__ = ["SparseTuner"]


class SparseTuner(SparseSteps):
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
            Of a `DataLoader` that reads all rows of a dataset, batches of `probe_batch_size` are drawn from it.
        selector: a name in `SELECTORS`, such as `ist` (the paper's), `random` or `lisa`; `fixed:` with the
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
        self.config = config = resolve_config(config, options, SparseTuner)
        check_history(history)
        check_loss_function(loss_function)
        factory = selector_factory(selector)
        self._view = view = view_model(model, layers, what_trains(factory), least_layers(factory))
        self.selector = make_selector(factory, self.config, [layer.name for layer in view.layers])
        self.ranks = ranks = current_ranks()
        """The processes that train together."""
        self._base = base_fingerprint(view.model, view.sharded)
        identity = self._identity()
        ranks.check_same("what is trained", {**identity.pop("config"), **identity})
        self.history: History | None = None
        self.last_update: ImportanceUpdate | None = None
        """The latest turn of the importance loop."""
        # These may refuse, and nothing is hooked before the last of them has passed.
        super().__init__(view, StepParts(view, self.config))
        if loss_function is None:
            check_first(probe_batches)
        probes = probe_stream(probe_batches, view.model, config.seed, ranks.rank, ranks.size, config.probe_batch_size)
        close_earlier(view.layers)
        self._measurement = Measurement(view, probes, self.config, loss_function or model_loss, ranks)
        outside = parameters_outside(view.model, view.layers).values()
        trained = [*(weight for layer in view.layers for weight in layer.parameters), *outside]
        self._weights = FiniteWeights(view.model, trained, ranks)
        self._open()
        if ranks.is_main:
            announce(view.model, view.layers, self.selector, self.num_fused, self.not_fused)
        if history is not None:
            self.record_to(history)

    @property
    def probe_seconds(self) -> float:
        """Time spent in the importance loop."""
        return self._measurement.seconds

    @property
    def probe_share(self) -> float:
        """The importance loop's share of the time of all steps so far, from `begin_step` to the end of `end_step`."""
        return self._measurement.seconds / self.step_seconds if self.step_seconds else 0.0

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

    def _choose(self) -> tuple[int, ...]:
        """The layers that the selector has the next step train, the same on every rank.

        Raises:
            ValueError: on every rank, where the processes do not train the same step or layers.
        """
        if self._weights.unchecked:
            self.check_weights()
        active = self.selector.choose(self.num_steps)
        self.ranks.check_same("the layers of the next step", {"step": self.num_steps + 1, "active": list(active)})
        return active

    def _started(self, active: tuple[int, ...]) -> None:
        """Write a step that begins to the history."""
        if self.history:
            self.history.write("step", step=self.num_steps + 1, active=list(active))

    def _learn(self) -> ImportanceUpdate | None:
        """Measure and learn, if it is time to, and write it to the history."""
        if self.num_steps % CHECK_INTERVAL == 0:
            self.check_weights()
        update = self.selector.learn(self.num_steps, self._measure)
        if update is not None:
            self.last_update = update
            if self.history:
                self.history.write("importance", step=self.num_steps, **dataclasses.asdict(update))
        return update

    def check_weights(self) -> None:
        """Make sure that the weights in training are finite. A collective.

        It is called before the first step, every ten steps and before importance is measured; call it before you save.

        Raises:
            NotFiniteError: on every rank, a ValueError, where NaN or infinite numbers are among them.
        """
        self._weights.check(self.num_steps)

    def check_adapters(self) -> None:
        """Make sure that the step trains the adapters that it began with; call it where a micro-batch ends. `step` does
        so where a block begins, and `IST` always.

        Raises:
            ValueError: others are active; the step is given up.
        """
        if self.active_layers is not None:
            self._parts.check_adapters()

    def close(self) -> None:
        """Leave the model as PEFT made it. The tuner's state can still be saved; for more steps make another tuner."""
        super().close()
        self._measurement.close()

    def __enter__(self) -> SparseTuner:
        return self

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
        saved = state.get("last_update")
        self.last_update = saved and ImportanceUpdate.from_state_dict(saved)

    def _measure(self, candidates: Sequence[tuple[int, ...]]) -> Tensor | None:
        """Losses of candidate sets, as `Measurement` gives them."""
        self.check_weights()
        with self._parts.activation.measuring():
            return self._measurement(candidates)

    def _identity(self) -> dict[str, Any]:
        """What all processes of a run and a resumed run have in common, as plain JSON values."""
        return {
            "config": dataclasses.asdict(self.config),
            "layers": [layer.name for layer in self._view.layers],
            "selector_type": type(self.selector).__name__,
            "num_processes": self.ranks.size,
            "base_fingerprint": self._base,
        }
