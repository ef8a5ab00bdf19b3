"""The model of `ist eval`, with or without an adapter, whose configuration names the base where no flag does."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from ..loading import check_tokens, load_causal_model, load_tokenizer
from ..quickstart_model import QUICKSTART_MODEL, quickstart_model_path
from ..saved_adapter import check_base, put_adapter, read_config, warn_of_no_effect
from ..sources import ADAPTERS

__all__ = ["find_base", "load_model"]

ADAPTER_CONFIG = "adapter_config.json"


def find_base(adapter: str) -> str:
    """The model that an adapter was trained on, as its configuration names it.

    Args:
        adapter: a folder, or a name on the Hugging Face hub.

    Raises:
        ValueError: it holds no adapter, or the configuration names no model or one that is not there.
    """
    check_adapter(adapter)
    way_out = "add --model_name_or_path"
    if Path(adapter).is_dir():
        file = Path(adapter) / ADAPTER_CONFIG
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is damaged ({type(error).__name__}): save the adapter anew.") from error
        base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    else:
        file, base = Path(adapter), read_config(adapter).base_model_name_or_path
    if not base or not isinstance(base, str):
        raise ValueError(f"{file} names no model that the adapter belongs to: {way_out}.")
    if Path(base).is_absolute() and not Path(base).exists():
        raise ValueError(f"{file} names the model {base}, which is not there: {way_out}.")
    return base


def check_adapter(adapter: str) -> None:
    """Raise ValueError at a folder without an adapter."""
    if Path(adapter).is_dir() and not (Path(adapter) / ADAPTER_CONFIG).is_file():
        raise ValueError(f"{adapter} holds no {ADAPTER_CONFIG}, and so no adapter: {ADAPTERS}.")


def check_device(name: str | None) -> None:
    """Raise ValueError where the value of `--device` is no device of this machine."""
    if name is None:
        return
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:
        said = next(iter(str(error).splitlines()), type(error).__name__).rstrip(" .")
        said = "torch knows no such kind" if "at start of device string" in said else said
    else:
        if device.type != "meta":
            return
        said = "it holds no numbers"
    raise ValueError(
        f"--device {name} cannot be used here ({said}): give cpu, cuda, cuda:1, mps …, or leave it out for the GPU "
        "where there is one."
    )


def load_model(flags: argparse.Namespace) -> tuple[Any, Any]:
    """The model with its adapter, and the tokenizer.

    Raises:
        ValueError: the adapter's folder holds none, or the device is not there.
    """
    check_device(flags.device)
    name = flags.model_name_or_path
    source = str(quickstart_model_path()) if name == QUICKSTART_MODEL else name
    config = None
    if flags.adapter:
        check_adapter(flags.adapter)
        config = read_config(flags.adapter)
        warn_of_no_effect(config, flags.adapter)
    check_base(source)
    trust: dict[str, Any] = {"trust_remote_code": flags.trust_remote_code}
    place = flags.adapter if flags.adapter and holds_tokenizer(flags.adapter) else source
    tokenizer = load_tokenizer(place, **trust)
    model = load_causal_model(source, dtype=flags.dtype, **trust)
    if place != source:
        check_tokens(place, model, tokenizer)
    if config is not None:
        model = put_adapter(model, flags.adapter, config)
    device = flags.device or (torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    return model.to(device), tokenizer


def holds_tokenizer(adapter: str) -> bool:
    """Whether an adapter's folder has the tokenizer that it was trained with, whose end and template were taught.

    One with code of its own does not count: `--trust_remote_code` is for the model's.
    """
    try:
        config = json.loads((Path(adapter) / "tokenizer_config.json").read_text(encoding="utf-8"))
    except OSError:
        return False
    except ValueError:
        return True  # Loading says what is damaged.
    return isinstance(config, dict) and "auto_map" not in config
