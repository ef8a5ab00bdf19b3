"""What a training is about to do, in two lines: its data and its steps, its adapter and its learning rate."""

from __future__ import annotations

import math
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

__all__ = ["adapter_line", "data_line", "num_steps"]

SAMPLE = 1000
"""Training rows whose tokens are counted; more are estimated from these."""
MOST_NAMES = 12
"""Modules that are named."""


def data_line(trainer: Any) -> str:
    """Rows to train on and held out, steps, and tokens of the whole training."""
    args, rows, held_out = trainer.args, trainer.train_dataset, trainer.eval_dataset
    packed = " packed" if getattr(args, "packing", False) else ""
    said = f"{len(rows)}{packed} rows" if hasattr(rows, "__len__") else "streamed rows"
    said += f", {len(held_out)} held out" if hasattr(held_out, "__len__") else ", none held out"
    steps = num_steps(args, len(rows) if hasattr(rows, "__len__") else None)
    if steps is None:
        return said
    batch = args.per_device_train_batch_size * args.world_size * args.gradient_accumulation_steps
    said += f"; {steps} steps of {batch} rows"
    if tokens := mean_tokens(rows):
        num_rows = steps * batch if args.max_steps > 0 else args.num_train_epochs * len(rows)
        said += f", about {round_number(tokens * num_rows)} tokens"
    return said


def num_steps(args: Any, num_rows: int | None) -> int | None:
    """Optimizer steps of a training, or None where they cannot be known before.

    Args:
        args: transformers' `TrainingArguments`.
        num_rows: of the training set; None where it can only be iterated.
    """
    if args.max_steps > 0:
        return args.max_steps
    if num_rows is None:
        return None
    per_batch = args.per_device_train_batch_size * args.world_size
    batches = num_rows // per_batch if args.dataloader_drop_last else math.ceil(num_rows / per_batch)
    return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))


def mean_tokens(rows: Any) -> float | None:
    """Tokens of a row in the mean over the first rows, or None where rows are not tokenised yet."""
    if "input_ids" not in (getattr(rows, "column_names", None) or ()) or not hasattr(rows, "__len__") or not len(rows):
        return None
    lengths = [len(ids) for ids in rows[:SAMPLE]["input_ids"]]
    return sum(lengths) / len(lengths)


def adapter_line(model: Any, kind: str, args: Any) -> str:
    """The adapter's rank and modules, and the learning rate.

    Args:
        model: with its adapter.
        kind: the word after `--adapter`; `none` where the model's own weights train.
        args: transformers' `TrainingArguments`.
    """
    rate = f"learning rate {args.learning_rate:g} ({getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)})"
    if kind == "none":
        return rate
    config = next(iter(model.peft_config.values()))
    size = getattr(config, "init_r", None) if kind == "adalora" else getattr(config, "r", None)
    width = getattr(config, "bottleneck_size", None)
    rank = f", rank {size}" if size else f", width {width}" if width else ""
    names = adapted_modules(model)
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return f"{kind}{rank}, on {', '.join(names[:MOST_NAMES])}{more}; {rate}"


def adapted_modules(model: Any) -> list[str]:
    """The last names of the modules that carry adapters, each once, in the model's order."""
    names = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def round_number(value: float) -> str:
    """A number as a reader wants it: 950, 12 k, 3.4 M."""
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.{0 if value >= 10 * size else 1}f}{unit}"
    return f"{value:.0f}"
