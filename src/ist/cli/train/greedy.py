"""`ist train --method greedy`: the search before the training, on rows of the training set alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset

from ...adapters.whole_layers import layers_to_train
from ...experiments.greedy import count_trainings, greedy_layers
from ...runs.damage import is_count
from ...runs.files import read_object, write_json
from ...runtime.collation import private_state
from ...runtime.randomness import keyed_generator, keyed_seed
from ..display import Display
from .arguments import RunArguments

__all__ = ["GREEDY_FILE", "search_layers"]

GREEDY_FILE = "ist_greedy.json"
MAX_HELD_OUT = 128
"""Rows of the training set that judge the trials; at most a fifth of it."""


def search_layers(run: RunArguments, trainer: Any, folder: Path, resumed: bool, display: Display) -> dict[str, Any]:
    """Find the set that the run then trains; a resumed run takes the one that it began with.

    Returns:
        What `ist_greedy.json` in the run's folder holds: `layers` in the order of their addition, `losses`, `trials`,
        and the cost as `num_trainings`, `num_steps` and `seconds`.
    """
    file = folder / GREEDY_FILE
    if resumed and file.is_file():
        return read_search(file)
    args = run.training
    train, held_out = search_batches(
        trainer.train_dataset, trainer.data_collator, args.per_device_train_batch_size, run.ist.greedy_steps, args.seed
    )
    layers = layers_to_train(trainer.model, run.ist.layers, "either")
    most = count_trainings(len(layers), run.ist_config.layer_counts(len(layers)).active)
    display.console.print(
        f"greedy search: up to {most} trainings of {run.ist.greedy_steps} steps come first", soft_wrap=True
    )
    with display.waiting("greedy search"):
        found = greedy_layers(
            trainer.model,
            run.ist_config,
            train_batches=train,
            validation_batches=held_out,
            num_steps=run.ist.greedy_steps,
            learning_rate=args.learning_rate,
            weight_decay=args.weight_decay,
            min_gain=run.ist.greedy_min_gain,
            layers=run.ist.layers,
            autocast=torch.bfloat16 if args.bf16 else None,
        )
    result = {
        "layers": list(found.layers),
        "losses": list(found.losses),
        "trials": [{"layers": list(layers), "loss": loss} for layers, loss in found.trials],
        "num_trainings": len(found.trials),
        "num_steps": found.num_steps,
        "seconds": found.seconds,
    }
    write_json(file, result)
    display.searched(result)
    return result


def read_search(file: Path) -> dict[str, Any]:
    """What the search of a run found that is resumed.

    Raises:
        ValueError: its file is damaged.
    """
    way_out = "train afresh without --resume_from_checkpoint."
    found = read_object(file, way_out)
    layers, counts = found.get("layers"), [found.get(name) for name in ("num_trainings", "num_steps")]
    whole = isinstance(layers, list) and layers and all(map(is_count, [*layers, *counts]))
    if not (whole and isinstance(found.get("seconds"), (int, float))):
        raise ValueError(f"{file} is damaged (it is not what a search writes): {way_out}")
    return found


def search_batches(
    dataset: Any, collate: Any, batch_size: int, num_steps: int, seed: int
) -> tuple[list[Any], list[Any]]:
    """Batches to train the trials on, and others to judge them by, both of the training set.

    Raises:
        ValueError: the training set can only be iterated, or has fewer than two rows.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__") or len(dataset) < 2:
        raise ValueError("--method greedy needs a training set of at least 2 rows that can be read by their numbers.")
    order = torch.randperm(len(dataset), generator=keyed_generator(seed, "greedy", 0)).tolist()
    num_held_out = max(1, min(MAX_HELD_OUT, len(order) // 5))
    rows = order[num_held_out:][: num_steps * batch_size]

    def batches(indices: list[int]) -> list[Any]:
        chunks = (indices[start : start + batch_size] for start in range(0, len(indices), batch_size))
        return [collate([dataset[index] for index in chunk]) for chunk in chunks]

    with private_state(collate, keyed_seed(seed, "greedy collation", 0)):
        return batches(rows), batches(order[:num_held_out])
