"""The weights of a loaded model: all there, of the right sizes, finite, and none of its layers left out."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_utils

from ..step.finite import all_finite, is_finite

__all__ = ["check_weights", "count", "first_file", "list_non_finite", "say_non_finite", "some"]

logger = logging.getLogger(__name__)

FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of a model's weights in one file; with `.index.json` the list of several."""
NO_SHAPES = {"dtype", "torch_dtype", "attn_implementation", "quantization_config"}
"""Options of `from_pretrained` that a configuration has too, and that change no shape."""


def check_weights(
    source: str,
    model: Any,
    found: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    trains: Callable[[str], bool] | None = None,
) -> None:
    """Raise ValueError where the weights of a model are not what its configuration describes, or are not finite.

    Args:
        source: its folder or name.
        model: loaded, with random numbers in the place of what is missing.
        found: what transformers says of the loading.
        options: what the user has given to transformers' `from_pretrained`.
        trains: whether a weight, by its name, is trained and saved. None for a model that does not train.
    """
    options = options or {}
    changed = [name for name in options if name not in NO_SHAPES and hasattr(getattr(model, "config", None), name)]
    described = "its config.json" + (f", with {', '.join(changed)} of --model_init_kwargs," if changed else "")
    check_missing(source, model, found, described)
    check_sizes(source, found, described, bool(options.get("ignore_mismatched_sizes")), trains or no_weight)
    unused = sorted(found.get("unexpected_keys", ()))
    if not any("layer" in name for name in names_in(options)):
        check_layers(source, model, unused)
    check_finite(source, model)
    if unused:
        logger.warning(
            "%s of %s are not used (%s): the model of its config.json has no place for them.",
            count(len(unused)).capitalize(), source, some(unused),
        )  # fmt: skip


def no_weight(name: str) -> bool:
    """Nothing of the model trains."""
    return False


def check_missing(source: str, model: Any, found: Mapping[str, Any], described: str) -> None:
    """Raise ValueError where weights were not in the files of a model."""
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    absent = set(found.get("missing_keys", ()))
    missing = sorted(min(tied) for tied in names.values() if tied <= absent)
    if getattr(model, "hf_quantizer", None) is not None:  # Scales and zero points begin with what changes nothing.
        missing = [name for name in missing if name.rpartition(".")[2] in ("weight", "bias")]
    if missing:
        raise ValueError(
            f"The weights in {source} lack {count(len(missing))} that {described} describes ({some(missing)}), and "
            "random numbers would take their place: give the whole model, or the config.json that belongs to it."
        )


def check_sizes(
    source: str, found: Mapping[str, Any], described: str, resizes: bool, trains: Callable[[str], bool]
) -> None:
    """Raise ValueError where weights are of another size than in the files, unless that is wanted and they train.

    Args:
        source: the model's folder or name.
        found: what transformers says of the loading.
        described: where the sizes come from, in words.
        resizes: whether the user has asked for `ignore_mismatched_sizes`.
        trains: whether a weight, by its name, is trained and saved.
    """
    mismatched = sorted(found.get("mismatched_keys", ()))
    if not mismatched:
        return
    first, saved, wanted = mismatched[0]
    if not resizes:
        raise ValueError(
            f"The weights in {source} are not of the sizes in {described} ({first} is {size(saved)}, and should be "
            f"{size(wanted)}): give the config.json that belongs to them."
        )
    frozen = [name for name, *_ in mismatched if not trains(name)]
    if frozen:
        modules = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in frozen})
        raise ValueError(
            f"ignore_mismatched_sizes starts {count(len(frozen))} of {source} from random numbers ({some(frozen)}), "
            f"which an adapter neither trains nor saves: add --lora_modules_to_save {' '.join(modules)}, or take "
            "--method full, which trains the model's own weights."
        )
    logger.warning(
        "%s of %s are newly initialised, since their sizes differ (%s is %s there, and %s here).",
        count(len(mismatched)).capitalize(), source, first, size(saved), size(wanted),
    )  # fmt: skip


def check_layers(source: str, model: Any, unused: Iterable[str]) -> None:
    """Raise ValueError where the files hold more layers of a stack than the model has.

    Layers that predict further tokens, which transformers leaves out, are none of the stack.
    """
    modules = dict(model.named_modules())
    extra: dict[str, set[int]] = {}
    for name in unused:
        for match in re.finditer(r"\.(\d+)\.(?=(.*))", name):
            for prefix in ("", f"{getattr(model, 'base_model_prefix', '')}."):
                stack = modules.get(f"{prefix}{name[: match.start()]}")
                if isinstance(stack, nn.ModuleList) and has_layer(stack, int(match[1]), match[2]):
                    extra.setdefault(f"{prefix}{name[: match.start()]}", set()).add(int(match[1]))
    further = getattr(getattr(model, "config", None), "num_nextn_predict_layers", None) or 0
    for place, numbers in sorted(extra.items()):
        made = len(modules[place])  # type: ignore[arg-type]
        if len(numbers) > further:
            raise ValueError(
                f"The weights in {source} have {max(numbers) + 1} layers in {place}, and its config.json makes {made}: "
                "give the config.json that belongs to them. If fewer layers are meant, save the smaller model with "
                f"save_pretrained, or give ist train --model_init_kwargs '{{\"num_hidden_layers\": {made}}}'."
            )


def has_layer(stack: nn.ModuleList, number: int, rest: str) -> bool:
    """Whether a weight is one of a layer beyond a stack's last, named as those of its layers are."""
    return number >= len(stack) > 0 and any(rest in dict(layer.named_parameters()) for layer in stack)


def check_finite(source: str, model: Any) -> None:
    """Raise ValueError where weights are NaN or infinite, as far as this process holds them."""
    if modeling_utils.is_fsdp_enabled() and int(os.environ.get("LOCAL_RANK", "0")):
        return  # FSDP sends the weights to this process later.
    named = {name: parameter for name, parameter in model.named_parameters() if not parameter.is_meta}
    broken = list_non_finite(named)
    if broken:
        narrow = any(named[name].dtype == torch.float16 for name in broken)
        raise ValueError(
            say_non_finite(f"The weights in {source} hold", broken, len(named), file_of(source, broken[0]))
            + ("give --dtype float32 or bfloat16, since float16 ends at 65504, or " if narrow else "")
            + "load the model's files anew, or save it anew from finite weights."
        )


def list_non_finite(named: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors with NaN or infinite numbers among them, in order; whole numbers are always finite.

    Args:
        named: tensors of any kind and shape by name.
    """
    wide = {
        name: tensor.detach().float() if tensor.element_size() == 1 else tensor
        for name, tensor in named.items()
        if tensor.is_floating_point() or tensor.is_complex()
    }
    return [] if all_finite(wide.values()) else [name for name, tensor in wide.items() if not is_finite(tensor)]


def say_non_finite(what: str, broken: Collection[str], total: int, file: str) -> str:
    """The first half of a message."""
    place = f" in {file}" if file else ""
    tensors = f"{len(broken)} of {total} tensors: {some(broken)}{place}"
    return f"{what} NaN or infinite numbers ({tensors}): "


def file_of(source: str, name: str) -> str:
    """The file in a model's folder that a weight is in; empty where that cannot be told."""
    for file in FILES:
        index = Path(source) / f"{file}.index.json"
        if index.is_file():
            return json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).get(name, "")
    return first_file(source, FILES)


def first_file(source: str, files: Iterable[str]) -> str:
    """The first of some files that a folder has, or an empty text."""
    return next((file for file in files if (Path(source) / file).is_file()), "")


def names_in(value: Any) -> Iterable[str]:
    """The keys of nested mappings."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield str(name)
            yield from names_in(inner)


def count(number: int) -> str:
    """A number of weights, in words."""
    return f"{number} weight{'' if number == 1 else 's'}"


def some(names: Collection[str]) -> str:
    """The first of several names."""
    first, *others = names
    return f"{first}, …" if others else first


def size(shape: Any) -> str:
    """A shape as `4 × 8`."""
    return " × ".join(map(str, shape))
