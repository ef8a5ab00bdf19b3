"""The hyperparameters of Importance-aware Sparse Tuning: the paper's options, and how a step is executed."""

from .checks import (
    check_choice,
    check_layer_number,
    check_loss_function,
    check_seed,
    check_stack_names,
    check_whole,
    is_number,
    plain,
)
from .keywords import keywords_of, unknown_keywords, with_checked_keywords
from .options import ISTConfig, LayerCounts, PaperOptions, StepOptions, Suppression, Trains, resolve_config
from .presets import PRESETS, current_names

__all__ = [
    "PRESETS",
    "ISTConfig",
    "LayerCounts",
    "PaperOptions",
    "StepOptions",
    "Suppression",
    "Trains",
    "check_choice",
    "check_layer_number",
    "check_loss_function",
    "check_seed",
    "check_stack_names",
    "check_whole",
    "current_names",
    "is_number",
    "keywords_of",
    "plain",
    "resolve_config",
    "unknown_keywords",
    "with_checked_keywords",
]
