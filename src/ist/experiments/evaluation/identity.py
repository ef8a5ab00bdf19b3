"""What answers depend on beside the weights: the configuration of the model and its adapters, and the chat template."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["model_identity"]

NOT_COMPUTED_WITH = {
    *("transformers_version", "peft_version", "architectures", "use_cache", "dtype", "torch_dtype", "name_or_path"),
    *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "task_type"),
}
"""Settings that say where a model is from or how it is run, and change no answer."""


def model_identity(model: Any, tokenizer: Any) -> dict[str, str]:
    """Digests by name; only of what there is.

    Args:
        model: with or without adapters.
        tokenizer: the model's.
    """
    parts = {
        "config": settings_of(getattr(model, "config", None)),
        "adapter": {name: settings_of(config) for name, config in sorted(getattr(model, "peft_config", {}).items())},
        "chat template": getattr(tokenizer, "chat_template", None),
    }
    return {name: digest(value) for name, value in parts.items() if value}


def settings_of(config: Any) -> dict[str, Any]:
    """The settings of a configuration that a model is computed with."""
    read = config.to_dict() if hasattr(config, "to_dict") else {}
    return {
        str(name): value
        for name, value in sorted(read.items(), key=lambda item: str(item[0]))
        if name not in NOT_COMPUTED_WITH and not str(name).startswith("_")
    }


def digest(value: Any) -> str:
    """Of anything that JSON has, sets and enums: the same in each process."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=plain).encode(), digest_size=8).hexdigest()


def plain(value: Any) -> Any:
    """What JSON does not have."""
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)
