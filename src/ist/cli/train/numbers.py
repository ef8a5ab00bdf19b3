"""Numbers that cannot be: refused before anything loads, and named where a training ends in them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

__all__ = ["all_finite", "check_numbers"]

RANGES: dict[str, tuple[float, float, str]] = {
    "learning_rate": (0.0, math.inf, "a finite number of at least 0, such as 2e-4"),
    "weight_decay": (0.0, math.inf, "a finite number of at least 0, such as 0.01"),
    "max_grad_norm": (0.0, math.inf, "a finite number of at least 0; 0 clips nothing"),
    "label_smoothing_factor": (0.0, 1.0, "a number from 0 to 1"),
    "adam_beta1": (0.0, 1.0, "a number from 0 to 1"),
    "adam_beta2": (0.0, 1.0, "a number from 0 to 1"),
    "adam_epsilon": (0.0, math.inf, "a finite number of at least 0, such as 1e-8"),
    "num_train_epochs": (0.0, math.inf, "a finite number of at least 0"),
    "warmup_steps": (0.0, math.inf, "a finite number of at least 0"),
    "neftune_noise_alpha": (0.0, math.inf, "a finite number of at least 0"),
    "lora_dropout": (0.0, 1.0, "a number from 0 to 1"),
    "bottleneck_dropout": (0.0, 1.0, "a number from 0 to 1"),
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
                raise ValueError(f"{name}={value} cannot be: give {allowed}.")


def all_finite(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether every number in these tensors is finite."""
    return all(bool(torch.isfinite(parameter.detach()).all()) for parameter in parameters)
