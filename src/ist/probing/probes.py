"""Batches for the importance loop that leave the training run as it is.

A probe batch comes from a stream of its own, and what is drawn while it is made or used comes from a generator of its
own, so that a run with probes trains on the same batches with the same dropout as a run without.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from ..runtime.collation import private_state, readers_of, reading
from ..runtime.hooks import WeakHook
from ..runtime.randomness import keyed_generator, keyed_seed, private_randomness

__all__ = [
    "DatasetProbes",
    "IterableProbes",
    "ProbeStream",
    "RecordedProbes",
    "with_own_iteration",
]

Batch = Mapping[str, Any]

NOT_MODEL_INPUTS = ("num_items_in_batch", "fused_lm_head")
"""Arguments of a trainer's own loss, which would turn the mean of a probe batch into something else."""


class ProbeStream(Protocol):
    """Where probe batches come from."""

    def batch(self, index: int) -> Batch | None:
        """The `index`-th probe batch of the run, from 0; the same one after a resume. None if there is none."""
        ...

    def close(self) -> None:
        """Leave the model as it was found."""
        ...


class DatasetProbes:
    """Probe batches drawn from a map-style dataset: whole epochs in a separate shuffled order.

    Several processes take turns in that order, so that two with batches of 4 draw what one draws with batches of 8.

    Args:
        dataset: has a length and gives an example for an index.
        batch_size: examples in a batch, of each process.
        collate: makes a batch of a list of examples. It may be the training's own: it is left as it was.
        seed: of the order and of the collator's own generators, the same in every process.
        rank: of this process.
        num_ranks: processes that train together.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        collate: Callable[[list[Any]], Batch],
        seed: int,
        rank: int = 0,
        num_ranks: int = 1,
    ) -> None:
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or len(dataset) == 0:
            raise ValueError(
                f"Probe batches cannot be drawn from a {type(dataset).__name__} that is empty or can only be iterated: "
                "give a dataset with a length above 0 and examples by index."
            )
        self._dataset = dataset
        self._rank, self._num_ranks = rank, num_ranks
        self.wanted_size = batch_size
        """Examples in a batch, where the dataset has as many."""
        self._batch_size = min(batch_size, max(1, len(dataset) // num_ranks))
        self._collate = collate
        self._seed = seed

    def batch(self, index: int) -> Batch:
        """The `index`-th batch; batches of one epoch share no example, on any rank (given one for each)."""
        num_examples = len(self._dataset)
        epoch, position = divmod(index, max(1, num_examples // (self._batch_size * self._num_ranks)))
        order = torch.randperm(num_examples, generator=keyed_generator(self._seed, "probe order", epoch))
        start = (position * self._num_ranks + self._rank) * self._batch_size % num_examples
        chosen = order[start : start + self._batch_size].tolist()
        fetch_many = getattr(self._dataset, "__getitems__", None)
        key = keyed_seed(self._seed, "probe collation", index * self._num_ranks + self._rank)
        with private_state(self._collate, key, (reading(self._dataset),)):
            examples = fetch_many(chosen) if fetch_many else [self._dataset[i] for i in chosen]
            return self._collate(examples)

    def close(self) -> None:
        """Nothing to undo."""


class IterableProbes:
    """Probe batches taken from any iterable of batches, again and again from its start.

    Args:
        batches: such as a `DataLoader`; it must start afresh each time it is iterated. It may be the training's own.
        seed: for what the iterable draws from the global generators, which are put back afterwards.
        rank: of this process, which takes every `num_ranks`-th batch; 0 where the iterable gives each process its own.
        num_ranks: processes that share the iterable's batches.

    Raises:
        ValueError: it can be iterated only once, or measuring would advance a generator that training may use.
    """

    def __init__(self, batches: Iterable[Batch], seed: int, rank: int = 0, num_ranks: int = 1) -> None:
        if isinstance(batches, Iterator):
            raise ValueError(
                f"probe_batches is a one-way iterator ({type(batches).__name__}) that runs dry: give something that "
                "can be iterated again, such as a DataLoader or a list of batches."
            )
        if isinstance(batches, DataLoader):
            batches = private_loader(batches)
        self._batches = batches
        self._collate, self._readers = getattr(batches, "collate_fn", None), readers_of(batches)
        self._seed = seed
        self._rank, self._num_ranks = rank, num_ranks
        self._iterator: Iterator[Batch] = iter(())
        self._epoch = -1
        self._next_index = 0

    def batch(self, index: int) -> Batch | None:
        """The `index`-th batch; going back starts from the beginning."""
        index = index * self._num_ranks + self._rank
        if index < self._next_index:
            self._iterator, self._epoch, self._next_index = iter(()), -1, 0
        batch = None
        while self._next_index <= index:
            batch = self._advance()
            if batch is None:
                return None
        return batch

    def _advance(self) -> Batch | None:
        # Each batch is made under a key of its own, so that a resumed run makes the same ones.
        seed = keyed_seed(self._seed, "probe batch", self._next_index)
        with private_randomness(seed), private_state(self._collate, seed, self._readers):
            batch = next(self._iterator, None)
        if batch is None:
            self._epoch += 1
            seed = keyed_seed(self._seed, "probe epoch", self._epoch)
            with private_randomness(seed), private_state(self._collate, seed, self._readers):
                self._iterator = iter(self._batches)
                batch = next(self._iterator, None)
        self._next_index += 1
        return batch

    def close(self) -> None:
        """Let workers of a loader end."""
        self._iterator = iter(())


def private_loader(loader: DataLoader[Any]) -> DataLoader[Any]:
    """The same loader with workers of its own: iterating it does not reset an iteration that training is in.

    Raises:
        ValueError: the loader draws its order from a generator of its own.
    """
    if loader.generator is not None:
        raise ValueError(
            "probe_batches is a DataLoader with a generator, which measuring would advance: give one without; its "
            "order then depends on IST's seed alone."
        )
    return with_own_iteration(loader)


def with_own_iteration(loader: DataLoader[Any]) -> DataLoader[Any]:
    """A copy of a loader whose iteration is none of training: it does not reset one that training is in, and
    Accelerate, which ends its accumulation with the loader that began last, does not hear of it.
    """
    private: Any = copy.copy(loader)
    private._iterator = None
    if hasattr(private, "gradient_state"):
        private.begin = private.end = nothing
    return private


def nothing() -> None:
    """In the place of telling Accelerate that an iteration begins or ends."""


class RecordedProbes:
    """The last batch that the model was trained on, for data that can be read only once (streams).

    Args:
        model: its forward is watched until `close`, and at most as long as this object lives.
    """

    def __init__(self, model: nn.Module) -> None:
        self._batch: Batch | None = None
        handle = model.register_forward_pre_hook(WeakHook(self._record), with_kwargs=True)
        self._stop = weakref.finalize(self, handle.remove)

    def _record(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model.training and torch.is_grad_enabled() and not args:
            self._batch = {name: value for name, value in kwargs.items() if name not in NOT_MODEL_INPUTS}

    def batch(self, index: int) -> Batch | None:
        """The last training batch, whatever the index."""
        return self._batch

    def close(self) -> None:
        """Stop watching and let go of the batch."""
        self._stop()
        self._batch = None
