"""Saved adapters, which may come from anybody: their configuration is checked before PEFT works with it."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .expressions import check_expressions
from .loading import load_adapter, whole
from .quickstart_model import QUICKSTART_MODEL
from .sources import looked_for_adapter, looked_for_model

__all__ = [
    "REFUSED",
    "check_alone",
    "check_base",
    "check_learning",
    "check_matrices",
    "check_numbers",
    "check_ranks",
    "holds_adapter",
    "put_adapter",
    "read_config",
    "warn_of_no_effect",
]

logger = logging.getLogger(__name__)

REFUSED = {
    "megatron_config": "imports a module that it names",
    "adapters": "loads other adapters",
    "arrow_config": "mixes other adapters",
}
"""Settings that no adapter's file may have, and why."""
MOST_ROUNDS = 1000
"""Of PiSSA's singular values, for which PEFT's examples take 4 to 16."""
RANKS = ("r", "init_r", "target_r", "bottleneck_size")
"""Settings that are a side of every matrix."""
MOST_RANKS = 1 << 16
"""As many as the widest layers of today's models have features: memory ends before."""
FACTORS = ("lora_alpha", "alpha", "scaling", "delora_lambda", "psoft_alpha", "randlora_alpha")
"""Settings by which what an adapter adds is multiplied."""
PATTERNS = ("alpha_pattern", "lambda_pattern", "rank_pattern")
"""Settings that hold such factors, and ranks, of single modules."""
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files of a whole model."""


def holds_adapter(source: str, revision: str | None = None) -> bool:
    """Whether a folder or a name on the hub holds an adapter."""
    from transformers.utils import find_adapter_config_file

    if source == QUICKSTART_MODEL:
        return False
    with looked_for_model(source):
        return find_adapter_config_file(source, revision=revision) is not None


def check_alone(source: str) -> None:
    """Raise ValueError where a whole model is in the folder of an adapter: which of the two is meant cannot be told."""
    if any((Path(source) / name).is_file() for name in WEIGHTS):
        raise ValueError(
            f"{source} holds a whole model and an adapter: put them in folders of their own, and give "
            "--model_name_or_path and --adapter."
        )


def check_base(source: str, revision: str | None = None) -> None:
    """Raise ValueError where the base of an adapter is an adapter too, which transformers would load unchecked."""
    if holds_adapter(source, revision):
        raise ValueError(f"{source} is an adapter, which serves as no base: give the model that it belongs to.")


def read_config(source: str, revision: str | None = None) -> Any:
    """The configuration of a saved adapter.

    Raises:
        ValueError: there is none, it is damaged, or it has a setting that no file may have, or a number that is NaN.
    """
    from peft import PeftConfig

    from .. import bottleneck  # noqa: F401  (PEFT learns of series and parallel adapters)

    with looked_for_adapter(source), whole(source, "adapter"):
        config = PeftConfig.from_pretrained(source, revision=revision)
    for name, reason in REFUSED.items():
        if getattr(config, name, None):
            raise ValueError(f"The adapter in {source} sets {name}, which {reason}: remove it from its configuration.")
    check_numbers(vars(config), f"The adapter in {source}")
    return config


def check_numbers(settings: Mapping[str, Any], where: str) -> None:
    """Raise ValueError where an adapter's configuration has a number that is NaN or infinite, at any depth, or one of
    rounds that never end.

    Args:
        settings: the configuration by name.
        where: it comes from.
    """
    for name, value in settings.items():
        if (number := non_finite(value)) is not None:
            raise ValueError(f"{where} sets {name} to {number}, which no layer can compute with: give a finite number.")
        rounds = re.fullmatch(r"pissa_niter_(\d+)", value) if isinstance(value, str) else None
        if rounds and (len(rounds[1]) > 9 or int(rounds[1]) > MOST_ROUNDS):
            raise ValueError(
                f"{where} sets {name} to {value[:40]!r}, which would take for ever: give at most {MOST_ROUNDS} rounds."
            )
    check_ranks(settings, where)


def check_ranks(settings: Mapping[str, Any], where: str) -> None:
    """Raise ValueError at a rank that no memory holds, before matrices of it are made.

    Args:
        settings: of an adapter by name.
        where: they come from.
    """
    pattern = settings.get("rank_pattern")
    ranks = {name: settings.get(name) for name in RANKS}
    if isinstance(pattern, Mapping):
        ranks |= {f"rank_pattern of {module!r}": rank for module, rank in pattern.items()}
    for name, rank in ranks.items():
        if isinstance(rank, (int, float)) and rank > MOST_RANKS:
            raise ValueError(f"{where} sets {name} to {rank}, which no memory holds: give at most {MOST_RANKS}.")


def check_matrices(model: Any, source: str) -> None:
    """Raise ValueError where both matrices of every module with LoRA are zero: no gradient starts from there.

    Args:
        model: with a saved adapter on it, whose training is to continue.
        source: the adapter's folder or name.
    """
    from peft.tuners.lora import LoraLayer

    weights: list[Any] = [
        part[name].weight
        for module in model.modules()
        if isinstance(module, LoraLayer)
        for part in (module.lora_A, module.lora_B)
        for name in part
    ]
    here = all(weight.numel() and not weight.is_meta for weight in weights)  # Not on other ranks.
    if weights and here and not any(weight.any() for weight in weights):
        raise ValueError(
            f"The adapter in {source} holds zeros alone, from which no gradient starts: give its base, for a new one."
        )


def check_learning(settings: Mapping[str, Any], where: str) -> None:
    """Raise ValueError at a number with which an adapter learns nothing: a factor of 0, or a dropout of 1.

    Args:
        settings: of an adapter that is to train, new or saved, by name.
        where: they come from.
    """
    for name, value in settings.items():
        if name.endswith("dropout") and isinstance(value, (int, float)) and not 0 <= value < 1:
            raise ValueError(f"{where} sets {name} to {value!r}: give a number from 0 to below 1.")
    for name, what in factors_of_0(settings):
        raise ValueError(f"{where} sets {name} to 0, with which {what}: give another number.")


def factors_of_0(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The settings of an adapter that are 0 and leave it, or it on some modules, without effect, and what they do."""
    for name in FACTORS:
        value = settings.get(name)
        if isinstance(value, (int, float)) and value == 0:
            yield name, "the adapter adds nothing"
    for name in PATTERNS:
        pattern = settings.get(name)
        for module, value in pattern.items() if isinstance(pattern, Mapping) else ():
            if isinstance(value, (int, float)) and value == 0:
                yield f"{name} of {module!r}", "the adapter adds nothing there"


def warn_of_no_effect(config: Any, source: str) -> None:
    """Warn where an adapter adds nothing to its base, or to some modules, so that the base's results are its own."""
    for name, what in factors_of_0(vars(config)):
        logger.warning("The adapter in %s sets %s to 0, with which %s.", source, name, what)


def non_finite(value: Any) -> float | None:
    """The first NaN or infinite number in a value, or None."""
    if isinstance(value, float):
        return None if math.isfinite(value) else value
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (list, tuple, set, frozenset)):
        return None
    return next((number for item in value if (number := non_finite(item)) is not None), None)


def put_adapter(model: Any, source: str, config: Any, **options: Any) -> Any:
    """A model with a saved adapter on it.

    Args:
        model: its base.
        source: a folder, or a name on the hub.
        config: what `read_config` read there.
        options: of PEFT's `from_pretrained`.

    Raises:
        ValueError: a regular expression in the configuration does not end, the adapter is damaged, or of another base.
    """
    check_expressions(config, model, f"The adapter in {source}")
    return load_adapter(model, source, config=config, **options)
