"""The model that `--model_name_or_path` names: one to put a new adapter on, or a saved adapter to train further."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

from trl import get_quantization_config

from ..expressions import check_expressions
from ..loading import check_tokens, load_causal_model, load_tokenizer
from ..quickstart_model import QUICKSTART_MODEL, quickstart_model_path
from ..saved_adapter import (
    check_base,
    check_learning,
    check_matrices,
    check_ranks,
    holds_adapter,
    put_adapter,
    read_config,
)
from .arguments import RunArguments
from .ends import choose_eos
from .methods import ADAPTER_FLAGS
from .targets import check_named, check_targets, name_targets

__all__ = ["load_model"]

logger = logging.getLogger(__name__)

TARGETS_OF = {
    **dict.fromkeys(("lora", "dora", "adalora"), "lora_target_modules"),
    **dict.fromkeys(("series", "parallel"), "bottleneck_target_modules"),
}
"""The flag that names an adapter's modules."""


def load_model(run: RunArguments) -> tuple[Any, Any, Any]:
    """The model, its tokenizer, and the configuration of the adapter that is still to be put on it, if any.

    Raises:
        ValueError: no model is named, or the adapter that is does not go with the flags.
    """
    name = run.model.model_name_or_path
    if not name:
        raise ValueError(
            "No model given: --model_name_or_path takes a folder, a model of the Hugging Face hub, or "
            f"{QUICKSTART_MODEL} for the quickstart's."
        )
    source = str(quickstart_model_path()) if name == QUICKSTART_MODEL else name
    if not holds_adapter(source, run.model.model_revision):
        config = run.peft_config()
        check_ranks({} if config is None else vars(config), f"--adapter {run.ist.adapter}")
        model = load_base(run, source, run.model.model_revision, config)
        if config is not None:
            check_expressions(config, model, f"--adapter {run.ist.adapter}")
            check_named(model, config, f"--adapter {run.ist.adapter}")
            name_targets(model, config)
        if flag := TARGETS_OF.get(str(run.ist.adapter)):  # PEFT itself checks those of a type or a file.
            check_targets(model, config, flag)
        tokenizer = padding_tokenizer(run, source, run.model.model_revision)
        check_tokens(source, model, tokenizer)
        return model, tokenizer, config
    saved = read_config(source, run.model.model_revision)
    check_saved(saved, source, run)
    base, revision = saved.base_model_name_or_path, saved.revision or "main"
    check_base(base, revision)
    has_tokenizer = (Path(source) / "tokenizer_config.json").is_file()
    place = (source, "main") if has_tokenizer else (base, revision)
    tokenizer = padding_tokenizer(run, *place)
    model = load_base(run, base, revision, saved)
    check_tokens(place[0], model, tokenizer)
    model = put_adapter(model, source, saved, is_trainable=True, revision=run.model.model_revision)
    check_matrices(model, source)
    run.ist.adapter = kind_of(saved)
    logger.warning("Training continues from the adapter in %s (%s), on %s.", source, run.ist.adapter, base)
    return model, tokenizer, None


def load_base(run: RunArguments, source: str, revision: str, config: Any) -> Any:
    """A model without an adapter, as the flags say; one that is saved quantised is loaded as transformers does.

    Args:
        run: the flags.
        source: the model's folder or name.
        revision: of the name.
        config: of the adapter that the model gets; None where its own weights train.
    """
    model_options = cast("dict[str, Any]", run.training.model_init_kwargs or {})
    if (quantization := get_quantization_config(run.model)) is not None:  # None would hide the checkpoint's own.
        model_options = {"quantization_config": quantization, **model_options}
    run.training.model_init_kwargs = None
    options = {
        "dtype": run.model.dtype or "auto",
        "attn_implementation": run.model.attn_implementation,
        "revision": revision,
        "trust_remote_code": run.training.trust_remote_code,
        **model_options,
    }
    return load_causal_model(source, saves=config is None, **options)


def padding_tokenizer(run: RunArguments, source: str, revision: str) -> Any:
    """A tokenizer that can pad, with the `eos_token` that the flags choose."""
    tokenizer = load_tokenizer(source, revision=revision, trust_remote_code=run.training.trust_remote_code)
    choose_eos(run, source, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def kind_of(saved: Any) -> str:
    """The word after `--adapter` for a saved adapter's configuration."""
    if saved.peft_type == "LORA":
        return "dora" if saved.use_dora else "lora"
    return saved.mode if saved.peft_type == "BOTTLENECK" else str(saved.peft_type.value).lower()


def check_saved(saved: Any, source: str, run: RunArguments) -> None:
    """Raise ValueError where training cannot continue from a saved adapter, or flags describe another one."""
    kind = kind_of(saved)
    if run.ist.adapter == "none":
        raise ValueError(
            f"{source} is an adapter ({kind}), and --method {run.ist.method} without an adapter trains the model's own "
            f"weights: give its base, {saved.base_model_name_or_path}, or a method that trains adapters."
        )
    if not saved.base_model_name_or_path:
        raise ValueError(f"{source} is an adapter that names no base: write base_model_name_or_path into its config.")
    if kind == "adalora":
        raise ValueError(
            f"{source} is an AdaLoRA adapter, whose schedule of ranks ended with its training: begin with its base, "
            f"{saved.base_model_name_or_path}."
        )
    check_learning(vars(saved), f"The adapter in {source}")
    described = [f"--{flag}" for flag in adapter_flags(run, kind)]
    if described:
        raise ValueError(
            f"{source} is an adapter ({kind}) that training continues from as it is: leave out {', '.join(described)}, "
            f"or give its base, {saved.base_model_name_or_path}, for a new one."
        )


def adapter_flags(run: RunArguments, kind: str) -> Collection[str]:
    """The flags of the command line that describe an adapter other than a saved one of this kind."""
    same = {"adapter"} if run.ist.adapter == kind else set()
    return [flag for flag in run.given if flag in ADAPTER_FLAGS - same]
