"""The losses of candidate sets on the next probe batch, the same on every rank, without a trace in the training."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from logging import getLogger
from typing import Any

import torch
from torch import Tensor

from ..adapters.view import ModelView
from ..config import ISTConfig
from ..runtime.distributed import Ranks
from ..runtime.modes import to_device
from ..runtime.randomness import keyed_seed, private_randomness
from .batched import BatchedLosses
from .probes import ProbeStream
from .repeats import with_own_batch
from .suppression import LossFunction, agreed, candidate_losses, model_loss
from .watch import LearningWatch

__all__ = ["Measurement"]

logger = getLogger(__name__)


class Measurement:
    """Measures candidate sets for a selector; what fails skips the update, is reported once, and training continues.

    The mean over ranks is taken of the losses, before they become rewards: two ranks with batches of 4 then learn what
    one rank learns from a batch of 8. The mean of the rewards `exp(−L)` would be another number.

    Args:
        view: the model in training and its layers.
        probes: gives this rank's share of the probe batches.
        config: hyperparameters.
        loss_function: `(model, batch) -> loss`, a scalar in nats.
        ranks: the processes that train together.
    """

    def __init__(
        self,
        view: ModelView,
        probes: ProbeStream,
        config: ISTConfig,
        loss_function: LossFunction,
        ranks: Ranks,
    ) -> None:
        self.num_probes = 0
        """Probe batches measured so far on each rank."""
        self.seconds = 0.0
        """Time spent."""
        self.watch = LearningWatch(config.mu)
        """Says where nothing is learned."""
        self._view = view
        self._probes = probes
        self._config = config
        self._ranks = ranks
        # Ranks that hold parts of the weights have to do the same forwards, and the same number of them.
        batched = loss_function is model_loss and not view.sharded
        self._one_by_one = partial(
            candidate_losses,
            view.model,
            view.layers,
            beta=config.beta,
            loss_function=with_own_batch(loss_function),
            suppression=config.suppression,
        )
        self._batched = BatchedLosses(view, config.beta, self._one_by_one) if batched else None
        self._warned: set[str] = set()

    def __call__(self, candidates: Sequence[tuple[int, ...]]) -> Tensor | None:
        """Losses in nats, float64 of shape `[N_c]` on the CPU; None where nothing could be measured."""
        with self._clock(self._view.device):
            return self._measure(candidates)

    def _measure(self, candidates: Sequence[tuple[int, ...]]) -> Tensor | None:
        ranks = self._ranks
        ranks.check_same("the candidate layers", [self.num_probes, [list(candidate) for candidate in candidates]])
        device = self._view.device
        key = self.num_probes * ranks.size + ranks.rank
        with private_randomness(keyed_seed(self._config.seed, "probe", key), device):
            batch = self._next_batch()
            if not ranks.all(batch is not None) or batch is None:
                self._warn_no_batch()
                self.num_probes += 1  # The next update measures other rows than those that could not be read.
                return None
            losses = agreed(lambda: self._losses(candidates, to_device(batch, device)), ranks)
        self.num_probes += 1
        if not ranks.all(losses is not None):
            return None
        if losses is None:
            return None
        losses = torch.tensor(ranks.mean(losses.tolist()), dtype=torch.float64)
        if (said := self.watch.see(losses)) and ranks.is_main:
            logger.warning(said)
        return losses

    @property
    def batched_trusted(self) -> bool | None:
        """Whether all sets of an update are measured in one forward; None while that has not been tried."""
        return None if self._batched is None else self._batched.trusted

    def resume(self, num_probes: int, batched_trusted: bool | None) -> None:
        """Continue after so many probes, in the way that was found right then: another one would round otherwise."""
        self.num_probes = num_probes
        if num_probes:
            self.watch.resume()
        if self._batched is not None:
            self._batched.trusted = batched_trusted

    @contextmanager
    def _clock(self, device: torch.device) -> Iterator[None]:
        """Count the time of what is done within, and not that of the training step which a GPU may be at still."""
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - start
            return
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record(torch.cuda.current_stream(device))
        yield
        end.record(torch.cuda.current_stream(device))
        end.synchronize()
        self.seconds += begin.elapsed_time(end) / 1e3

    def close(self) -> None:
        """Let go of the probe batches."""
        self._probes.close()

    def _next_batch(self) -> Mapping[str, Any] | None:
        try:
            return self._probes.batch(self.num_probes)
        except Exception as error:  # Whatever a user's dataset or collator raises, or workers that were killed.
            self._warn(
                "batch",
                f"No probe batch could be read ({shorten(error)}), so this importance update is skipped; training "
                "continues. Further ones will be skipped without a word.",
            )
            return None

    def _losses(self, candidates: Sequence[tuple[int, ...]], batch: Mapping[str, Any]) -> Tensor | None:
        try:
            if self._batched is not None:
                return self._batched(candidates, batch, self.num_probes)
            return self._one_by_one(candidates, batch)
        except torch.OutOfMemoryError:
            if self._view.sharded and self._ranks.size > 1:
                raise  # The other ranks wait in this forward for this one's part of the weights.
        self._warn(
            "memory",
            "The GPU ran out of memory in a probe, so this importance update is skipped; training continues. Further "
            "ones will be skipped without a word: set probe_batch_size to less than the training's batch size.",
        )
        torch.cuda.empty_cache()
        return None

    def _warn_no_batch(self) -> None:
        if "batch" not in self._warned:
            self._warn(
                "batch",
                "There is no batch to measure the layers' importance on, so the choice stays as it is: give "
                "probe_batches with at least one batch, or call the model with keyword arguments.",
            )

    def _warn(self, kind: str, message: str) -> None:
        """Say something once."""
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(message, stacklevel=6)


def shorten(error: Exception) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
