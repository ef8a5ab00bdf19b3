"""Adapters beyond the words of `--adapter`: any type that PEFT knows, by its name or by a file of its configuration."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from ... import bottleneck  # noqa: F401  (PEFT learns of series and parallel adapters)
from ..recipes.safety import is_module
from ..saved_adapter import REFUSED, check_learning, check_numbers
from .methods import ADAPTERS, CAUSAL_LM

__all__ = ["check_adapter", "check_names", "config_from_file", "config_of_type", "peft_types"]

CONFIG_FILE = "adapter_config.json"
MOST_BYTES = 1_000_000
"""Of a configuration."""

OWN_PLACES = {"BOTTLENECK", "LN_TUNING", "TRAINABLE_TOKENS", "ADAPTION_PROMPT", "SHADOW"}
"""Types that go elsewhere than on linear modules; PEFT or a placement knows where."""
NOT_TRAINED = {"XLORA"}
"""Types that mix adapters which they load, and so are refused."""
NEEDED = ("num_virtual_tokens", "adapter_len", "adapter_layers")
"""Settings that PEFT has no default for, and does not ask for."""
PATTERNS = re.compile("module|pattern|parameter")
"""In the names of settings that hold names of modules, the keys of objects among them."""
STARTS = ("d_initial",)
"""Settings that a new adapter's trained vectors begin with, beside others that begin with 0."""
FILES = ("tokenizer_name_or_path", "tokenizer_kwargs", "prompt_tuning_init_state_dict_path", "shadow_model")
"""Settings that name files or models, which PEFT would load."""
WITH_WORDS = {"LORA", "ADALORA", "BOTTLENECK"}
"""Types that have words and flags of their own."""
NOT_SETTINGS = {
    "base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping", "runtime_config",
    "peft_type", "megatron_core",
}  # fmt: skip
"""What a saved configuration says of the adapter that it was saved with; a new adapter does without."""


def peft_types() -> list[str]:
    """The names of PEFT's adapter types that `--adapter` takes, in small letters."""
    names = [str(getattr(name, "value", name)) for name in PEFT_TYPE_TO_CONFIG_MAPPING]
    return sorted(name.lower() for name in names if name not in WITH_WORDS | NOT_TRAINED)


def check_adapter(adapter: str) -> None:
    """Raise ValueError where `--adapter` names neither a kind, nor a type of PEFT, nor a configuration's file."""
    if adapter in ADAPTERS or adapter in peft_types():
        return
    if not os.path.exists(adapter):
        near = next((kind for kind in (*ADAPTERS, *peft_types()) if kind == adapter.lower()), None)
        hint = f" (did you mean {near}?)" if near else ""
        raise ValueError(
            f"adapter={adapter!r} is unknown{hint}: choose one of {', '.join(ADAPTERS)}, one of PEFT's types "
            f"({', '.join(peft_types())}), or a JSON file with the configuration of one."
        )
    config_from_file(adapter)


def check_names(adapter: str | None) -> None:
    """Raise ValueError where a file that a stranger's recipe names has a regular expression: some of them never end; or
    names files of its own.
    """
    if adapter is None or adapter in ADAPTERS or adapter in peft_types():
        return
    config = config_from_file(adapter)
    way_out = "give the file on the command line as --adapter, or give --trust_recipe."
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in FILES and value != field.default:
            raise ValueError(f"{adapter} sets {field.name}, which names files to load: {way_out}")
        if not PATTERNS.search(field.name):
            continue
        for text in names_in(value):
            if not is_module(text):
                raise ValueError(f"{adapter} sets {field.name} to {text!r}, which is no name of a module: {way_out}")


def names_in(value: Any) -> Iterator[str]:
    """All texts in a value, at any depth, those that are keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list, tuple, set)):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            yield from names_in(item)


def config_of_type(name: str) -> Any:
    """PEFT's configuration of a type with its own defaults, on all linear modules where it takes such.

    Raises:
        ValueError: this type needs settings that have no default.
    """
    return make_config(f"--adapter {name}", {"peft_type": name.upper()})


def config_from_file(path: str) -> Any:
    """The configuration that a file holds, for a new adapter.

    Args:
        path: a JSON file as PEFT saves it (`adapter_config.json`), or the folder of one; `peft_type` and what differs
            from its defaults are enough.

    Raises:
        ValueError: it holds no configuration, several, or one that cannot be used.
    """
    file = Path(path) / CONFIG_FILE if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ValueError(f"--adapter {path}: {file} is not a file; give a JSON file with the configuration.")
    if file.stat().st_size > MOST_BYTES:
        raise ValueError(f"--adapter {path}: the file has more than {MOST_BYTES} bytes, and is no configuration.")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"--adapter {path}: the file is not JSON ({type(error).__name__}).") from error
    if isinstance(settings, list):
        raise ValueError(
            f"--adapter {path} holds several configurations, and PEFT saves one kind of adapter with a model: for LoRA "
            'beside bottlenecks give one with "peft_type": "BOTTLENECK" and "lora_modules".'
        )
    if not isinstance(settings, dict):
        raise ValueError(f"--adapter {path} holds a {type(settings).__name__}, not an object with `peft_type`.")
    return make_config(f"--adapter {path}", settings)


def make_config(where: str, settings: dict[str, Any]) -> Any:
    """PEFT's configuration from plain settings."""
    known = {str(getattr(name, "value", name)): kind for name, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    kind = known.get(str(settings.get("peft_type")))
    if kind is None:
        raise ValueError(
            f"{where} has peft_type={settings.get('peft_type')!r}: choose one of {', '.join(sorted(known))}."
        )
    if settings["peft_type"] in NOT_TRAINED:
        raise ValueError(
            f"{where} is of {settings['peft_type']}, which mixes adapters that it loads: give another type."
        )
    if settings["peft_type"] == "ADALORA":
        raise ValueError(f"{where} is of ADALORA, whose schedule follows from the training: give --adapter adalora.")
    given = {name: value for name, value in settings.items() if name not in NOT_SETTINGS}
    check_numbers(given, where)
    given["task_type"] = given.get("task_type") or CAUSAL_LM
    if given["task_type"] != CAUSAL_LM:
        raise ValueError(
            f"{where} is for {given['task_type']}, and `ist train` trains causal language models: leave task_type out."
        )
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    check_kinds(where, given, fields)
    for name in given:
        if name in REFUSED and given[name]:
            raise ValueError(f"{where} sets {name}, which {REFUSED[name]}: leave it out.")
        if name not in fields:
            raise ValueError(f"{where} sets {name!r}, which {kind.__name__} of this version of PEFT does not know.")
    if "target_modules" in fields and not given.get("target_modules") and not needs_no_modules(settings, given):
        given["target_modules"] = "all-linear"
    try:
        config: Any = kind(**given)
    except (TypeError, ValueError) as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise ValueError(f"{where} is no usable configuration ({said}).") from error
    missing = [name for name in NEEDED if name in fields and getattr(config, name) is None]
    if missing:
        example = json.dumps({"peft_type": settings["peft_type"], **dict.fromkeys(missing, 8)})
        raise ValueError(
            f"{where} lacks {', '.join(missing)}, without a default in PEFT: give --adapter a JSON file such as "
            f"{example}."
        )
    return config


def check_kinds(where: str, given: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Raise ValueError at a text in the place of a number, and at numbers with which a new adapter learns nothing."""
    for name, value in given.items():
        default = getattr(fields.get(name), "default", None)
        if type(default) in (int, float) and not isinstance(value, (int, float, type(None))):
            raise ValueError(f"{where} sets {name} to {value!r}: give a number.")
        if name in STARTS and value == 0:
            raise ValueError(f"{where} sets {name} to 0, with which the adapter learns nothing: give another number.")
    check_learning(given, where)


def needs_no_modules(settings: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether a configuration says otherwise what it is put on, or a placement finds it."""
    return settings["peft_type"] in OWN_PLACES or bool(given.get("target_parameters"))
