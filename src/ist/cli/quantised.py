"""The settings of a checkpoint that is saved quantised: transformers takes the names in them as regular expressions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PreTrainedConfig

from .expressions import check_quantization
from .model_config import SETTINGS, empty_model, place_of

__all__ = ["check_settings"]


def check_settings(source: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError where an expression in the settings of a quantised checkpoint does not end.

    Args:
        source: the checkpoint's folder or name.
        options: of transformers' `from_pretrained`.
    """
    if options.get("gguf_file") is not None or options.get("config") is not None:
        return
    read, _ = PreTrainedConfig.get_config_dict(source, **place_of(options))
    for settings in settings_in(read):
        check_quantization(settings, lambda: empty_model(source, options), f"The quantization_config of {source}")


def settings_in(config: Any) -> Iterator[Any]:
    """The settings of quantisers in a model's configuration, and in the configurations of its parts."""
    for name, value in config.items():
        if name in SETTINGS:
            yield value
        elif isinstance(value, Mapping):
            yield from settings_in(value)
