"""The settings of a checkpoint that is saved quantised: transformers takes the names in them as regular expressions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from .expressions import check_quantization

__all__ = ["check_settings"]

SETTINGS = ("quantization_config", "compression_config")
"""Names that config.json has for them."""
PLACE = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "proxies", "force_download")
"""Options of `from_pretrained` that say where the files are."""


def check_settings(source: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError where an expression in the settings of a quantised checkpoint does not end.

    Args:
        source: the checkpoint's folder or name.
        options: of transformers' `from_pretrained`.
    """
    if options.get("gguf_file") is not None or options.get("config") is not None:
        return
    place = {name: options[name] for name in PLACE if name in options}
    read, _ = PreTrainedConfig.get_config_dict(source, **place)
    trust = bool(options.get("trust_remote_code"))

    def make_model() -> nn.Module:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust, **place)
        for part in (config, config.get_text_config(decoder=True)):
            for name in SETTINGS:
                getattr(part, "__dict__", {}).pop(name, None)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)

    for settings in settings_in(read):
        check_quantization(settings, make_model, f"The quantization_config of {source}")


def settings_in(config: Any) -> Iterator[Any]:
    """The settings of quantisers in a model's configuration, and in the configurations of its parts."""
    for name, value in config.items():
        if name in SETTINGS:
            yield value
        elif isinstance(value, Mapping):
            yield from settings_in(value)
