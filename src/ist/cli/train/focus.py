"""`ist train --method focused`: the measurement before there are adapters, and the configuration that it gives."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from trl import SFTTrainer

from ...adapters.outline import weightless
from ...focusing import Focus, find_focus, gradient_init
from ...runs.files import FOCUS_FILE, read_object, write_json
from ...runtime.distributed import Ranks
from ...runtime.randomness import keyed_generator
from ..display import Display
from .arguments import RunArguments
from .methods import FOCUSED
from .numbers import parse_focus

__all__ = ["Look", "focus_adapter", "start_adapter"]

RESUMES = "put it back, or train afresh without --resume_from_checkpoint."
NUM_BATCHES = 4
"""Training batches that a look at the data reads, over all processes."""


@dataclass(frozen=True)
class Look:
    """What a look at the data needs."""

    run: RunArguments
    model: Any
    """The base model."""
    tokenizer: Any
    rows: Any
    """The training rows as loaded."""
    ranks: Ranks


def focus_adapter(
    look: Look, peft_config: Any, folder: Path, resumed: bool, display: Display
) -> tuple[Any, dict[str, Any], list[Any] | None]:
    """The configuration that puts adapters on the layers that matter, what `focus.json` holds of it, and the batches
    that `start_adapter` takes; None where the adapters start at random, or resume.

    A resumed run takes the scores that it began with and measures nothing.

    Args:
        look: the model and the data.
        peft_config: the adapter of all layers.
        folder: of the run.
        resumed: whether the run resumes from a checkpoint.
        display: shows what was chosen.

    Raises:
        ValueError: the model has an adapter already, the folder of a resumed run lacks `focus.json`, or an option does
            not fit the model or the adapter.
    """
    run, model = look.run, look.model
    check_adapter(run, peft_config)
    spread, criterion = FOCUSED[run.ist.method] or run.ist.focus_spread, run.ist.focus_criterion
    num_layers, rank = parse_focus(run.ist.num_focused_layers, run.ist.focused_rank)
    options: dict[str, Any] = {
        "num_layers": num_layers,
        "rank": rank,
        "criterion": criterion,
        "spread": spread,
        "min_depth": run.ist.focus_min_depth,
        "layers": run.ist.layers,
        "seed": run.training.seed,
    }
    file = folder / FOCUS_FILE
    batches: list[Any] = []
    if resumed:
        options["scores"] = saved_scores(file, spread)
        found = find_focus(model, peft_config, **options)
    else:
        with display.waiting("importance of the layers"):
            if spread != "even" or run.ist.focus_init == "gradient":
                to_device(model, run)
                batches = list(probe_batches(look))
            found = find_focus(model, peft_config, batches, num_batches=NUM_BATCHES, **options)
    told = {
        **describe(found),
        "criterion": None if found.scores is None else criterion,
        "spread": spread,
        "init": run.ist.focus_init,
    }
    if resumed:
        seconds = read_object(file, RESUMES).get("seconds")
        told["seconds"] = seconds if isinstance(seconds, (int, float)) else None
    elif look.ranks.is_main:
        write_json(file, told)
    display.focused(told)
    return found.config, told, batches if run.ist.focus_init == "gradient" and not resumed else None


def check_adapter(run: RunArguments, peft_config: Any) -> None:
    """Raise ValueError where the model has an adapter already, or the new one has no `A` to start from the gradient."""
    if peft_config is None:
        raise ValueError(
            f"--method {run.ist.method} chooses layers before there are adapters, and the model given is an adapter: "
            "give its base, or train it further with --method peft."
        )
    kind = peft_config.peft_type
    if run.ist.focus_init == "gradient" and str(getattr(kind, "value", kind)) != "LORA":
        raise ValueError(
            f"--focus_init gradient sets A of LoRA, which --adapter {run.ist.adapter} lacks: leave it out, or take "
            "--adapter lora or dora."
        )


def start_adapter(model: Any, batches: list[Any] | None, run: RunArguments, display: Display) -> None:
    """With `--focus_init gradient`, start the new adapters from the gradient of these batches."""
    if batches is not None:
        with display.waiting("start of the adapters"):
            gradient_init(model, batches, num_batches=NUM_BATCHES, layers=run.ist.layers, seed=run.training.seed)


def saved_scores(file: Path, spread: str) -> list[float] | None:
    """The scores that the run began with.

    Raises:
        ValueError: the file is missing or damaged.
    """
    try:
        scores = read_object(file, RESUMES)["scores"]
        if spread == "even":
            return None
        return [float(score) for score in scores]
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise ValueError(
            f"{file} cannot be read ({type(error).__name__}), and a focused run resumes with the layers that it holds: "
            f"{RESUMES}"
        ) from error


def describe(found: Focus) -> dict[str, Any]:
    """A focus in JSON's types."""
    return {
        "layers": list(found.layers),
        "names": list(found.names),
        "scores": None if found.scores is None else list(found.scores),
        "ranks": found.ranks,
        "num_parameters": found.num_parameters,
        "num_parameters_before": found.num_parameters_before,
        "seconds": found.seconds,
    }


def probe_batches(look: Look) -> Iterator[Any]:
    """Random rows of the training set, prepared as TRL prepares them; each process has a share of its own.

    The trainer that prepares them has a model without weights, so nothing happens to the real one.
    """
    ranks, args = look.ranks, copy.deepcopy(look.run.training)
    args.report_to = []
    args.eval_strategy = "no"  # type: ignore[assignment]
    size = args.per_device_train_batch_size
    share = max(1, NUM_BATCHES // ranks.size)
    stub = weightless(look.model)
    for name in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(stub, name):
            setattr(stub, name, False)
    num = size * share * ranks.size
    trainer = Preparation(
        model=stub,  # type: ignore[arg-type]
        args=args,
        train_dataset=sample(look.rows, num * (8 if args.packing else 1), args.seed),
        processing_class=look.tokenizer,
    )
    prepared: Any = trainer.train_dataset
    own = prepared.select(range(ranks.rank, len(prepared), ranks.size)) if hasattr(prepared, "select") else prepared
    for batch in DataLoader(own, batch_size=size, collate_fn=trainer.data_collator):  # type: ignore[arg-type]
        if "labels" not in batch or (batch["labels"] != -100).any():  # else max_length has cut off all its answers
            yield batch


class Preparation(SFTTrainer):
    """TRL's trainer for what it makes of rows; its model has no weights that could go to a device."""

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        pass


def sample(rows: Any, num: int, seed: int) -> Any:
    """`num` random rows, or the first ones of rows that can only be iterated."""
    if not hasattr(rows, "__len__"):
        return rows.take(num)
    order = torch.randperm(len(rows), generator=keyed_generator(seed, "focus", 0))[:num]
    return rows.select(sorted(order.tolist()))


def to_device(model: Any, run: RunArguments) -> None:
    """Bring the model to where it will train, as the Trainer does later; FSDP shards it from where it is."""
    shards = run.training.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"  # of accelerate launch
    if getattr(model, "hf_device_map", None) or getattr(model, "is_quantized", False) or shards:
        return
    model.to(run.training.device)
