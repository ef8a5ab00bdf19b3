"""Numbers that are not allowed are refused before anything loads."""

from __future__ import annotations

import math
from typing import Any, cast

from ...config import check_layer_number, check_whole
from ...focusing import Rank
from .options import parse_number

__all__ = ["check_numbers", "check_validation_size", "count_held_out", "parse_focus"]

COUNTS = (
    "lora_r", "lora_alpha", "bottleneck_size", "adalora_init_r", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps", "max_length", "save_total_limit",
)  # fmt: skip
BELOW_1 = math.nextafter(1.0, 0.0)
"""At 1 a dropout leaves nothing to learn from."""
PERIODS = ("logging_steps", "eval_steps", "save_steps")
RANGES: dict[str, tuple[float, float, str]] = {
    "learning_rate": (0.0, math.inf, "a finite number of at least 0, such as 2e-4"),
    "weight_decay": (0.0, math.inf, "a finite number of at least 0, such as 0.01"),
    "max_grad_norm": (0.0, math.inf, "a finite number of at least 0; 0 clips nothing"),
    "label_smoothing_factor": (0.0, 1.0, "a number from 0 to 1"),
    "adam_beta1": (0.0, BELOW_1, "a number from 0 to below 1"),
    "adam_beta2": (0.0, BELOW_1, "a number from 0 to below 1"),
    "adam_epsilon": (0.0, math.inf, "a finite number of at least 0, such as 1e-8"),
    "num_train_epochs": (math.ulp(0.0), math.inf, "a finite number above 0"),
    "warmup_steps": (0.0, math.inf, "a finite number of at least 0"),
    "neftune_noise_alpha": (0.0, math.inf, "a finite number of at least 0"),
    "lora_dropout": (0.0, BELOW_1, "a number from 0 to below 1"),
    "focus_min_depth": (0.0, BELOW_1, "a fraction of the depth from 0 to below 1"),
    "bottleneck_dropout": (0.0, BELOW_1, "a number from 0 to below 1"),
    **dict.fromkeys(COUNTS, (1.0, math.inf, "a whole number of at least 1")),
    **dict.fromkeys(PERIODS, (math.ulp(0.0), math.inf, "a count of steps, or a fraction of all steps below 1")),
    "seed": (-math.inf, 2.0**32 - 1, "a whole number from 0 to 4294967295"),
    "greedy_min_gain": (-math.inf, math.inf, "a finite number"),
}
"""The least, the most, and what is allowed in words; the ends are allowed where they are finite."""


def check_numbers(*options: Any) -> None:
    """Raise ValueError at a number that no training can have.

    Args:
        options: objects with flags as attributes.
    """
    for part in options:
        for name, (least, most, allowed) in RANGES.items():
            value = getattr(part, name, None)
            if not isinstance(value, (int, float)):
                continue
            if not math.isfinite(value) or not least <= value <= most:
                raise ValueError(f"{name}={value} is not allowed: give {allowed}.")
        steps = getattr(part, "max_steps", None)
        if isinstance(steps, int) and steps < 1 and steps != -1:
            raise ValueError(f"max_steps={steps} is not allowed: give a whole number of at least 1, or -1 for epochs.")


MOST_HELD_OUT, SHARE_HELD_OUT = 120, 0.1
"""Rows held out where nobody says how many: a tenth, and no more than the paper's 120."""


def check_validation_size(size: str | None) -> None:
    """Raise ValueError unless `size` is a count of rows, a fraction of them below 1, or None."""
    if size is None:
        return
    number = parse_number("validation_size", size)
    if not (0 <= number < 1 if isinstance(number, float) else number >= 0):
        raise ValueError(
            f"validation_size={size} is neither a count of rows nor a fraction below 1: write 120 for 120 rows, 0.1 "
            "for a tenth, or 0 for none."
        )


def count_held_out(size: str | None, num_rows: int) -> int:
    """Rows that are held out of `num_rows`.

    Args:
        size: a count, a fraction (at least one row, unless it is 0), or None for a tenth of at most 120 rows.
        num_rows: rows to train on and to hold out.

    Raises:
        ValueError: a count leaves nothing to train on.
    """
    if size is None:
        return min(MOST_HELD_OUT, max(1, int(SHARE_HELD_OUT * num_rows))) if num_rows > 1 else 0
    number = parse_number("validation_size", size)
    if isinstance(number, float):
        number = max(1, round(number * num_rows)) if number else 0
    if number and number >= num_rows:
        raise ValueError(f"validation_size={size} leaves nothing of {num_rows} rows to train on: give less.")
    return number


def parse_focus(num_layers: str | None, rank: str) -> tuple[int | float | None, Rank]:
    """The values of `--num_focused_layers` and `--focused_rank`.

    Raises:
        ValueError: the first is no count and no fraction, or the second no rank and no word for one.
    """
    number = None if num_layers is None else parse_number("num_focused_layers", num_layers)
    if number is not None:
        check_layer_number("num_focused_layers", number)
    if rank in ("moved", "kept", "uneven"):
        return number, cast("Rank", rank)
    size = int(rank) if rank.lstrip("-").isdecimal() else rank
    check_whole("focused_rank", size, at_least=1, why="give a rank, or 'moved', 'kept' or 'uneven'")
    return number, cast("int", size)
