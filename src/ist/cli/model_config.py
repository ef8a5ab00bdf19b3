"""A model's config.json before anything is made of it: its numbers are finite, its sizes are those of its weights."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.integrations import is_deepspeed_zero3_enabled

from .model_sizes import Held, check_counts, check_sizes, files_hold, make_counted

__all__ = ["SETTINGS", "check_config", "check_config_beside", "empty_model", "place_of"]

SETTINGS = ("quantization_config", "compression_config")
"""Names that config.json has for the settings of a quantiser."""
PLACE = ("revision", "subfolder", "token", "cache_dir", "local_files_only", "proxies", "force_download")
"""Options of `from_pretrained` that say where the files are."""
NOT_CONFIG = {*PLACE, *SETTINGS, "dtype", "torch_dtype", "attn_implementation", "trust_remote_code"}
"""Options of `from_pretrained` that no model is computed with."""
LIMITS = re.compile("limit|clip|clamp|max|min")
"""In names of settings that may be infinite, such as the time_step_limit of Mamba 2."""
LARGEST = float(torch.finfo(torch.float32).max)
"""Beyond which a number is infinite in a layer."""


def check_config(source: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError where a model's configuration has a NaN or infinite number that it would be computed with, or
    describes a model that its weights are far too small for. Nothing of the model is made.

    Args:
        source: the model's folder or name.
        options: of transformers' `from_pretrained`, some of which may be settings of the configuration.
    """
    if options.get("gguf_file") is not None or options.get("config") is not None:
        return
    read, _ = PreTrainedConfig.get_config_dict(source, **place_of(options))
    described, settings, held = check_settings_of(source, read, options)
    if is_deepspeed_zero3_enabled():
        return  # It would take the empty model apart, too.
    model = make_counted(described, settings, held, lambda: empty_model(source, options))
    if model is not None:
        check_sizes(described, model, held)


def check_config_beside(source: str, options: Mapping[str, Any]) -> None:
    """Raise ValueError where a tokenizer lies beside the configuration of a model with such a number, or one of more
    layers than the files may hold: transformers may make the configuration to find the tokenizer's class.

    Args:
        source: the tokenizer's folder or name.
        options: of transformers' `from_pretrained`.
    """
    try:
        read, _ = PreTrainedConfig.get_config_dict(source, **place_of(options))
    except (OSError, ValueError):
        return
    check_settings_of(source, read, options)


def check_settings_of(
    source: str, read: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[str, dict[str, Any], Held | None]:
    """Raise ValueError at a setting that no model can have.

    Returns:
        Where the settings come from, in words; all of them; and what the files of the model hold.
    """
    given = settings_among(options)
    known = known_settings(read, bool(options.get("trust_remote_code")))
    check_finite_settings(f"The config.json of {source}", read, known)
    check_finite_settings("--model_init_kwargs", given, known)
    changed = [name for name in given if name in (read if known is None else known)]
    added = f", with {', '.join(changed)} of --model_init_kwargs," if changed else ""
    described = f"The config.json of {source}{added}"
    settings, held = {**read, **given}, files_hold(source, options, read)
    check_counts(described, settings, held)
    return described, settings, held


def empty_model(source: str, options: Mapping[str, Any]) -> nn.Module:
    """The model of a checkpoint, not quantised, without memory for its weights.

    Args:
        source: its folder or name.
        options: of transformers' `from_pretrained`.
    """
    trust = bool(options.get("trust_remote_code"))
    found = {"trust_remote_code": trust, "return_unused_kwargs": True, **place_of(options)}
    config: Any
    config, _ = AutoConfig.from_pretrained(source, **found, **settings_among(options))
    for part in (config, config.get_text_config(decoder=True)):
        for name in SETTINGS:
            getattr(part, "__dict__", {}).pop(name, None)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust)


def place_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some options that say where the files are."""
    return {name: options[name] for name in PLACE if name in options}


def settings_among(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some options that may be settings of a configuration."""
    return {name: value for name, value in options.items() if name not in NOT_CONFIG}


def known_settings(read: Mapping[str, Any], trust: bool) -> set[str] | None:
    """The names that a model's kind has for its settings; None where its own code may know any.

    Args:
        read: its config.json.
        trust: whether code of the model's own runs.
    """
    kind = str(read.get("model_type"))
    if (trust and "auto_map" in read) or kind not in CONFIG_MAPPING:
        return None
    found = CONFIG_MAPPING[kind]
    fields = {field.name for field in dataclasses.fields(found)} | set(getattr(found, "attribute_map", None) or ())
    return fields | {"rope_theta", "rope_scaling", "partial_rotary_factor"}  # that transformers 4 saved


def check_finite_settings(where: str, settings: Mapping[str, Any], known: Collection[str] | None) -> None:
    """Raise ValueError at a NaN, at any depth, or an infinite number that is no limit.

    Args:
        where: the settings come from.
        settings: by name, as JSON has them.
        known: names that count; all if None.
    """
    for name, value in settings.items():
        if name in SETTINGS or (known is not None and name not in known):
            continue
        for path, number in numbers_in(name, value):
            if math.isnan(number) or (abs(number) > LARGEST and not LIMITS.search(path)):
                raise ValueError(
                    f"{where} sets {path} to {number}, which no layer can compute with: give a finite number, such as "
                    "the one that came with the model."
                )


def numbers_in(path: str, value: Any) -> Iterator[tuple[str, float]]:
    """The floating-point numbers in a setting, each with its name."""
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from numbers_in(f"{path}.{name}", item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from numbers_in(path, item)
