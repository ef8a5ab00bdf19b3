"""What a user gives as probe batches, as a stream of them of the size that was asked for."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from .probes import Batch, DatasetProbes, IterableProbes, ProbeStream, RecordedProbes
from .suppression import check_batch

__all__ = ["SizedProbes", "check_first", "probe_stream"]


def probe_stream(
    source: Iterable[Mapping[str, Any]] | ProbeStream | None,
    model: nn.Module,
    seed: int,
    rank: int = 0,
    num_ranks: int = 1,
    batch_size: int | None = None,
) -> ProbeStream:
    """The stream that `source` means: itself, a separate pass over its data, or the last batch where it is None.

    Args:
        source: a `ProbeStream` (which gives each process what it should have), a `DataLoader`, another iterable of
            batches, or None.
        model: whose training batches are recorded where there is no source.
        seed: of a separate pass.
        rank: of this process.
        num_ranks: processes that train together; each measures on a share of its own.
        batch_size: examples in a batch, where batches are drawn here; where they come ready-made with another number,
            a warning says so. None is what the source has.

    Raises:
        ValueError: the source cannot be iterated.
    """
    if isinstance(source, DataLoader) and is_drawable(source):
        size = batch_size or source.batch_size or 1
        return DatasetProbes(source.dataset, size, source.collate_fn, seed, rank, num_ranks)
    stream = ready_made(source, model, seed, rank, num_ranks)
    if batch_size is None or (isinstance(stream, DatasetProbes) and stream.wanted_size == batch_size):
        return stream
    return SizedProbes(stream, batch_size)


def check_first(source: Any) -> None:
    """Look at the first batch of a list of them, which costs nothing; other sources are read when it is time to.

    Raises:
        ValueError: it is nothing that the model's own loss could be computed for.
    """
    if not isinstance(source, (list, tuple)) or not source:
        return
    check_batch(source[0])
    ids = source[0].get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim < 2:
        raise ValueError(
            f"probe_batches holds rows (input_ids of shape {list(ids.shape)}), not batches: give "
            "DataLoader(rows, batch_size=4, collate_fn=…) with the training's collator."
        )


def ready_made(
    source: Iterable[Mapping[str, Any]] | ProbeStream | None, model: nn.Module, seed: int, rank: int, num_ranks: int
) -> ProbeStream:
    """The stream of a source whose batches have the size that they have."""
    if source is None:
        return RecordedProbes(model)
    if hasattr(source, "batch") and hasattr(source, "close"):
        return cast("ProbeStream", source)
    single = isinstance(source, (Mapping, str, bytes, Tensor))
    if single or not isinstance(source, Iterable):
        why = "is no list of batches" if single else "cannot be iterated"
        raise ValueError(
            f"probe_batches is a {type(source).__name__}, which {why}: give a DataLoader, a list of batches, "
            "or None to measure on the last training batch."
        )
    if is_shared_out(source):
        rank, num_ranks = 0, 1
    return IterableProbes(source, seed, rank, num_ranks)


def is_shared_out(source: Any) -> bool:
    """Whether a loader gives each process batches of its own, as Accelerate's do and those with their samplers."""
    samplers = (getattr(source, "sampler", None), getattr(source, "batch_sampler", None))
    return type(source).__module__.startswith("accelerate.") or any(
        isinstance(sampler, DistributedSampler) or type(sampler).__module__.startswith("accelerate.")
        for sampler in samplers
    )


OF_ALL_ROWS = (SequentialSampler, RandomSampler, DistributedSampler)
"""Samplers that leave no row out; another one may keep the rows of a validation back."""


def is_drawable(loader: DataLoader[Any]) -> bool:
    """Whether batches can be drawn from the dataset of a loader without touching the loader."""
    if type(loader.sampler) not in OF_ALL_ROWS:
        return False
    drawable = not isinstance(loader.dataset, IterableDataset) and hasattr(loader.dataset, "__len__")
    return drawable and loader.batch_size is not None and len(loader.dataset) > 0  # type: ignore[arg-type]


class SizedProbes:
    """Another stream's batches, with a word on the first one where it has not the size that was asked for.

    Args:
        stream: whose batches have the size that they have.
        num_examples: asked for.
    """

    def __init__(self, stream: ProbeStream, num_examples: int) -> None:
        self._stream = stream
        self._num_examples = num_examples
        self._checked = False

    def batch(self, index: int) -> Batch | None:
        """The stream's batch."""
        batch = self._stream.batch(index)
        if batch is not None and not self._checked:
            self._checked = True
            self._check(count_examples(batch))
        return batch

    def close(self) -> None:
        """Close the stream."""
        self._stream.close()

    def _check(self, found: int | None) -> None:
        if found not in (None, self._num_examples):
            warnings.warn(
                f"probe_batch_size={self._num_examples} has no effect on probe batches that come ready-made, and these "
                f"have {found} example(s): set probe_batch_size={found} if that is meant, or give a DataLoader over a "
                "dataset with a length (`IST`: a probe_dataset), from which batches of any size are drawn.",
                stacklevel=2,
            )


def count_examples(batch: Any) -> int | None:
    """The examples in a batch, by its first tensor; None where there is none."""
    if not isinstance(batch, Mapping):
        return len(batch) if isinstance(batch, (list, tuple)) else None
    sizes = (len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim)
    return next(sizes, None)
