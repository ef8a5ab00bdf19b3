"""Saved adapters, which may come from anybody: their configuration is checked before PEFT works with it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .expressions import check_expressions
from .loading import load_adapter, whole
from .quickstart_model import QUICKSTART_MODEL
from .sources import looked_for_adapter, looked_for_model

__all__ = ["REFUSED", "check_alone", "check_base", "check_numbers", "holds_adapter", "put_adapter", "read_config"]

REFUSED = {
    "megatron_config": "imports a module that it names",
    "adapters": "loads other adapters",
    "arrow_config": "mixes other adapters",
}
"""Settings that no adapter's file may have, and why."""
MOST_ROUNDS = 1000
"""Of PiSSA's singular values, for which PEFT's examples take 4 to 16."""
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
