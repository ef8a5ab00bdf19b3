"""A causal language model, its tokenizer and its adapter from their files, which have to be whole and belong together.

Transformers and PEFT load what they find, and put random numbers in the place of what is missing; what they say of it
is not shown between the lines of a command. The training would begin from a model that nobody has.
"""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from .finite import first_file, list_non_finite, say_non_finite, some
from .model_config import check_config, check_config_beside
from .quantised import check_settings
from .sources import looked_for_adapter, looked_for_model
from .weights import check_weights, count

__all__ = [
    "check_adapter_weights",
    "check_tokens",
    "load_adapter",
    "load_causal_model",
    "load_tokenizer",
    "whole",
]

logger = logging.getLogger(__name__)

MISSING = "Found missing adapter keys"
"""How PEFT begins its warning about weights that an adapter's file lacks."""
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
"""Names of an adapter's weights, the one that PEFT prefers first."""
NOT_CAUSAL = re.compile(r"Unrecognized configuration class <class '(?:\w+\.)*(\w+)'>")
UNKNOWN = re.compile(r"unexpected keyword argument '(\w+)'")


def load_causal_model(source: str, *, saves: bool = False, **options: Any) -> Any:
    """A model from a folder or the hub.

    Args:
        source: its folder or name.
        saves: whether the model's own weights train and are saved, and its configuration as the options change it.
        options: of transformers' `from_pretrained`.

    Raises:
        ValueError: it is no causal language model, or its weights are damaged, or are not those of its configuration,
            which may hold a NaN, an absurd size, or a regular expression that does not end.
    """
    with looked_for_model(source), whole(source, "model", options):
        check_config(source, options)
        check_settings(source, options)
        # Sizes are compared below, where they can be told.
        told = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, **{**options, **told})
    model, found = loaded if isinstance(loaded, tuple) else (loaded, {})  # Remote code may have a way of its own.
    check_weights(source, model, found, options, saves)
    return model


def load_tokenizer(source: str, **options: Any) -> Any:
    """A tokenizer from a folder or the hub.

    Raises:
        ValueError: it is not there, or damaged.
    """
    with looked_for_model(source), whole(source, "tokenizer"):
        check_config_beside(source, options)
        return AutoTokenizer.from_pretrained(source, **options)


def load_adapter(model: Any, source: str, **options: Any) -> Any:
    """A model with a saved adapter on it.

    Raises:
        ValueError: the adapter is damaged or not finite, or is none of this model.
    """
    import peft

    with looked_for_adapter(source), whole(source, "adapter"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        adapted = peft.PeftModel.from_pretrained(model, source, **options)
    for warning in said:
        text = str(warning.message)
        if text.startswith(MISSING):
            names = text.partition("[")[2].partition("]")[0].replace("'", "").split(", ")
            raise ValueError(
                f"The adapter in {source} lacks {count(len(names))} that this model takes ({some(names)}): it belongs "
                "to another base, or its file is incomplete."
            )
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    revision = options.get("revision")
    where: dict[str, Any] = {"revision": revision} if revision else {}
    saved = peft.load_peft_weights(source, device="cpu", **where)
    check_adapter_weights(source, saved)
    warn_of_unused(adapted, source, saved)
    return adapted


def check_adapter_weights(source: str, saved: Mapping[str, Any]) -> None:
    """Raise ValueError where an adapter's file holds NaN or infinite numbers.

    Args:
        source: the adapter's folder or name.
        saved: its tensors by name, as PEFT's `load_peft_weights` gives them.
    """
    if broken := list_non_finite(saved):
        file = first_file(source, ADAPTER_FILES)
        raise ValueError(
            say_non_finite(f"The adapter in {source} holds", broken, len(saved), file)
            + "take a checkpoint from before its training diverged, or train it anew."
        )


def warn_of_unused(adapted: Any, source: str, saved: Mapping[str, Any]) -> None:
    """Warn of weights in an adapter's file that the model has no place for, which PEFT leaves out."""
    from peft import get_peft_model_state_dict

    held = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
    if not held <= saved.keys():  # PEFT has translated names, as of adapters made with transformers 4.
        return
    unused = sorted(name for name in saved if name not in held and ".layers." in name)
    if unused:
        logger.warning(
            "%s of the adapter in %s are not used (%s): this model has no place for them, so the adapter belongs to "
            "another base.",
            count(len(unused)).capitalize(), source, some(unused),
        )  # fmt: skip


@contextmanager
def whole(source: str, what: str, options: Collection[str] = ()) -> Iterator[None]:
    """Name the source where a library cannot read what is in it, and what the first line of its error says.

    Args:
        source: the folder or name.
        what: is in it.
        options: names of what the user gives to the library beside it.
    """
    try:
        yield
    except (ImportError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = first_words(error)
        if isinstance(error, HFValidationError) and Path(source).is_dir():
            raise ValueError(
                f"The {what} in {source} is incomplete: its folder lacks a file, such as the weights. Give the whole "
                "folder."
            ) from error
        if what == "model" and (other := NOT_CAUSAL.match(said)):
            raise ValueError(
                f"The model in {source} is no causal language model (its configuration is a {other[1]}): give one that "
                "generates text from left to right."
            ) from error
        if (unknown := UNKNOWN.search(said)) and unknown[1] in options:
            raise ValueError(
                f"--model_init_kwargs sets {unknown[1]}, which neither transformers nor the config.json of {source} "
                "knows: give names of that file, such as num_hidden_layers, or options of from_pretrained."
            ) from error
        if isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError):
            raise
        if type(error).__name__ == "UnpicklingError":  # PyTorch's own text says how to run the file's code.
            raise ValueError(
                f"The {what} in {source} has a file of weights that is damaged, or that runs code when it is read: "
                "give one with weights in safetensors."
            ) from error
        raise ValueError(
            f"The {what} in {source} cannot be loaded ({type(error).__name__}: {said}): its files are damaged, do not "
            "belong together, or do not go with the flags or the installed versions."
        ) from error


def first_words(error: Exception) -> str:
    """The first line of an error's text, and the next one where the first introduces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[:2]) if lines and lines[0].endswith(":") else "".join(lines[:1])
    return said.rstrip(" .:") or "no message"


def check_tokens(source: str, model: Any, tokenizer: Any) -> None:
    """Raise ValueError where the token that ends a text, or the one that pads, has no row in the embedding."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is None:
        return
    rows = getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 takes parameters apart.
    for name in ("eos_token", "pad_token"):
        number = getattr(tokenizer, f"{name}_id")
        if isinstance(number, int) and number >= rows:
            raise ValueError(
                f"The tokenizer in {source} has {name} {getattr(tokenizer, name)!r} with the number {number}, and the "
                f"model's embedding has {rows} rows: give the tokenizer that belongs to the model."
            )
