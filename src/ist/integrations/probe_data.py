"""Where a Trainer's probe batches come from, and whether they can be measured on: told before the training begins."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from itertools import islice
from typing import Any

import torch
from torch.utils.data import IterableDataset
from transformers import default_data_collator

from ..probing.probes import DatasetProbes, IterableProbes, ProbeStream
from ..probing.suppression import LossFunction, UnsuppressedError, agreed, check_scalar, model_loss, suppress
from ..runtime.distributed import current_ranks
from ..runtime.modes import evaluation_mode, to_device
from ..runtime.randomness import keyed_seed, private_randomness
from ..tuner import SparseTuner

__all__ = ["OF_A_STREAM", "check_probe", "check_probe_dataset", "make_probes"]

WITHOUT = 'selector="random" measures nothing.'
OF_A_STREAM = (
    "Data without rows by index is measured on the last training batch as the model was given it, and this Trainer "
    "computes its loss from more than that: give IST a probe_dataset with rows by index, or loss_function=lambda "
    f"model, batch: … of the model's inputs; {WITHOUT}"
)
OWN_LOSS = f"Pass IST(loss_function=lambda model, batch: …) which returns the trained loss; {WITHOUT}"


def make_probes(
    loader: Any, probe_dataset: Any, batch_size: int, seed: int, try_first: bool = True
) -> ProbeStream | None:
    """A stream of its own over the probe dataset or the training set.

    Args:
        loader: the Trainer's, or a user's own: anything that can be iterated.
        probe_dataset: a map-style dataset, or None for the training set.
        batch_size: examples in a batch, of each process.
        seed: of the order.
        try_first: whether a batch of the training set is drawn, to see that it can be.

    Returns:
        The stream; None where the training set cannot be drawn from by index, so that the last training batch is
        measured on.

    Raises:
        ValueError: the probe dataset is not prepared as the training set is.
    """
    training = getattr(loader, "dataset", None)
    collate = getattr(loader, "collate_fn", None) or default_data_collator
    ranks = current_ranks()
    if probe_dataset is not None:
        dataset = with_columns_of(training, probe_dataset)
        if length(dataset) == 0:
            return IterableProbes((), seed)
        return DatasetProbes(dataset, batch_size, collate, seed, ranks.rank, ranks.size)
    if isinstance(training, IterableDataset) or not hasattr(training, "__getitem__") or not length(training):
        return None
    stream = DatasetProbes(training, batch_size, collate, seed, ranks.rank, ranks.size)
    return stream if not try_first or ranks.all(can_draw(stream, seed)) else None


def check_probe_dataset(dataset: Any) -> None:
    """Raise ValueError unless rows can be drawn by index from what was given as a probe dataset; None is allowed."""
    if dataset is None:
        return
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping) and not (dataset and all(isinstance(key, int) for key in dataset)):
        raise ValueError(
            f"probe_dataset is a {kind} of {', '.join(map(str, islice(dataset, 5))) or 'nothing'}: give one dataset, "
            "such as one of its splits, prepared as the training set is, or None for the training set."
        )
    if isinstance(dataset, str) or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"probe_dataset is a {kind}: give a map-style dataset, prepared as the training set is, or None for the "
            "training set."
        )


def length(dataset: Any) -> int | None:
    """How many rows a dataset has; None where it does not say."""
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def can_draw(stream: DatasetProbes, seed: int) -> bool:
    """Whether batches of the training set can be made by index; a sampler of the user's may give it other keys."""
    try:
        with private_randomness(keyed_seed(seed, "probe trial", 0)):
            stream.batch(0)
    except OSError:  # It may be there the next time.
        return True
    except Exception as error:
        warnings.warn(
            f"No probe batch can be drawn from the training set ({describe(error)}), so importance is measured on the "
            "last training batch: give a probe_dataset with rows by index to measure on rows of their own.",
            stacklevel=2,
        )
        return False
    return True


def with_columns_of(training: Any, probes: Any) -> Any:
    """The probe dataset with the columns that the Trainer has left the training set, where both have columns.

    Raises:
        ValueError: it has none of them.
    """
    kept, found = columns_of(training), columns_of(probes)
    if kept and found and not set(found) & set(kept):
        raise ValueError(
            f"probe_dataset has the columns {', '.join(found)}, and none of those that the Trainer made of the "
            f"training set ({', '.join(kept)}): give rows that are prepared in the same way, such as a part of "
            "trainer.train_dataset, or None to measure on the training set."
        )
    if not kept or not found or not hasattr(probes, "remove_columns"):
        return probes
    return probes.remove_columns([name for name in found if name not in kept])


def columns_of(dataset: Any) -> list[str]:
    """The names of what the rows of a dataset have; none where that is not known without reading it."""
    if isinstance(dataset, (list, tuple)):
        return [str(name) for name in dataset[0]] if dataset and isinstance(dataset[0], Mapping) else []
    form = getattr(dataset, "format", None)
    if isinstance(form, Mapping) and form.get("type") == "custom":
        return []  # Of `set_transform`: rows have other names than the columns.
    names = getattr(dataset, "column_names", None)
    return list(names) if isinstance(names, list) else []


def check_probe(stream: ProbeStream | None, tuner: SparseTuner, loss_function: LossFunction | None) -> None:
    """Compute the loss of one probe batch before the training, where that is no collective.

    Nothing is reported of a batch that cannot be read: it costs that update alone.

    Raises:
        ValueError: no loss comes of such a batch, a layer cannot be suppressed, or the weights in training are not
            finite.
    """
    tuner.check_weights()
    if stream is None or tuner._view.sharded:
        return
    device, seed = tuner._view.device, keyed_seed(tuner.config.seed, "probe trial", 0)
    with private_randomness(seed, device), torch.no_grad(), evaluation_mode(tuner.model):
        try:
            batch = stream.batch(0)
        except Exception:
            batch = None
        # A trainer's own loss may gather its metrics over the ranks: all compute it, or none.
        if not current_ranks().all(batch is not None):
            return
        agreed(lambda: compute_loss(tuner, batch, loss_function), current_ranks())


def compute_loss(tuner: SparseTuner, batch: Any, loss_function: LossFunction | None) -> None:
    """Compute the loss of a probe batch, as far as the memory allows.

    Raises:
        ValueError: no loss comes of it, or a layer cannot be suppressed.
    """
    try:
        # Suppressed, so that it is seen before the training where a layer cannot be.
        with suppress(tuner.layers, (), tuner.config.beta, tuner.config.suppression):
            check_scalar((loss_function or model_loss)(tuner.model, to_device(batch, tuner._view.device)))
    except torch.OutOfMemoryError:
        return
    except UnsuppressedError:
        raise
    except Exception as error:
        if isinstance(error, ValueError) and "loss_function" in str(error):
            raise ValueError(f"{error} Or choose without measuring: {WITHOUT}") from error
        names = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            f"Importance cannot be measured on a probe batch ({names}), {describe(error)}. {OWN_LOSS}"
        ) from error


def describe(error: Exception) -> str:
    """An error in one line, with its kind."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
