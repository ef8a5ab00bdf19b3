"""The weights of a loaded model: all there, of the right sizes, finite, and none of its layers left out."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .finite import check_finite, some

__all__ = ["check_weights", "count"]

logger = logging.getLogger(__name__)

NO_SHAPES = {"dtype", "torch_dtype", "attn_implementation", "experts_implementation", "quantization_config"}
"""Options of `from_pretrained` that a configuration has too, and that change no shape."""
SAME_BASE = {"use_cache", "output_attentions", "output_hidden_states", "return_dict", "pad_token_id"}
"""Further ones that change nothing of what a model computes; those of dropout change it in a training alone."""
FURTHER = ("num_nextn_predict_layers", "num_mtp_layers")
"""Names of the number of layers that predict further tokens, which transformers leaves out."""
SAVE_FIRST = "save the {} model first, with {}save_pretrained, and train that, or take --method full, which saves it."


def check_weights(
    source: str,
    model: Any,
    found: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    saves: bool = False,
) -> None:
    """Raise ValueError where the weights of a model are not what its configuration describes, or are not finite.

    Args:
        source: its folder or name.
        model: loaded, with random numbers in the place of what is missing.
        found: what transformers says of the loading.
        options: what the user has given to transformers' `from_pretrained`.
        saves: whether the model's own weights train and are saved with their configuration. Otherwise every later
            command loads the model as its files describe it, without these options.
    """
    options = options or {}
    changed = [name for name in options if name not in NO_SHAPES and hasattr(getattr(model, "config", None), name)]
    described = "its config.json" + (f", with {', '.join(changed)} of --model_init_kwargs," if changed else "")
    check_missing(source, model, found, described)
    check_sizes(source, found, described, bool(options.get("ignore_mismatched_sizes")), saves)
    unused = sorted(found.get("unexpected_keys", ()))
    cuts = sets_layers(model, options)
    if not (cuts and saves):
        check_layers(source, model, unused, cuts)
    check_finite(source, model)
    other = [name for name in changed if name not in SAME_BASE and "dropout" not in name]
    if other and not saves:
        logger.warning(
            "An adapter does not save %s of --model_init_kwargs, and every later command takes %s without: save the "
            "changed model first, with save_pretrained, and train that.",
            ", ".join(other), source,
        )  # fmt: skip
    if unused:
        logger.warning(
            "%s of %s are not used (%s): the model of its config.json has no place for them.",
            count(len(unused)).capitalize(), source, some(unused),
        )  # fmt: skip


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


def check_sizes(source: str, found: Mapping[str, Any], described: str, resizes: bool, saves: bool) -> None:
    """Raise ValueError where weights are of another size than in the files, unless that is wanted and they are saved.

    Args:
        source: the model's folder or name.
        found: what transformers says of the loading.
        described: where the sizes come from, in words.
        resizes: whether the user has asked for `ignore_mismatched_sizes`.
        saves: whether the model's own weights train and are saved.
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
    if not saves:
        raise ValueError(
            f"ignore_mismatched_sizes starts {count(len(mismatched))} of {source} from random numbers ({first} is "
            f"{size(saved)} there, and {size(wanted)} here), and an adapter does not save the model that it is on: "
            + SAVE_FIRST.format("resized", "resize_token_embeddings and ")
        )
    logger.warning(
        "%s of %s are newly initialised, since their sizes differ (%s is %s there, and %s here).",
        count(len(mismatched)).capitalize(), source, first, size(saved), size(wanted),
    )  # fmt: skip


def check_layers(source: str, model: Any, unused: Iterable[str], cuts: bool = False) -> None:
    """Raise ValueError where the files hold more layers of a stack than the model has.

    Layers that predict further tokens, which transformers leaves out, are none of the stack.

    Args:
        source: the model's folder or name.
        model: loaded.
        unused: names of the weights in its files that it has no place for.
        cuts: whether the user has set the number of layers.
    """
    configs = configs_of(model)
    further = max((getattr(config, name, None) or 0 for config in configs for name in FURTHER), default=0)
    layers = {getattr(config, "num_hidden_layers", None) for config in configs}
    for place, (made, numbers) in sorted(parts_beyond(model, unused).items()):
        nested = any(part.isdecimal() for part in place.split("."))  # such as the experts of a layer
        if len(numbers) <= (0 if nested or cuts else further):
            continue
        held = max(numbers) + 1
        if made not in layers or nested:
            raise ValueError(
                f"The weights in {source} have {held} parts of {place}, and its config.json makes {made}: give the "
                "config.json that belongs to them."
            )
        if cuts:
            raise ValueError(
                f"The weights in {source} have {held} layers in {place}, and --model_init_kwargs makes {made}; an "
                "adapter does not save the model that it is on: " + SAVE_FIRST.format("smaller", "")
            )
        raise ValueError(
            f"The weights in {source} have {held} layers in {place}, and its config.json makes {made}: give the "
            "config.json that belongs to them. If fewer layers are meant, save the smaller model with "
            "save_pretrained and train that."
        )


def parts_beyond(model: Any, unused: Iterable[str]) -> dict[str, tuple[int, set[int]]]:
    """By the name of a stack, how many parts it has, and the numbers of those that only weights without a place have.

    Such weights are named as those of the stack's parts are.
    """
    modules = dict(model.named_modules())
    names: dict[str, set[str]] = {}
    beyond: dict[str, tuple[int, set[int]]] = {}
    for name in unused:
        for match in re.finditer(r"\.(\d+)(?=\.(.*))", name):
            for prefix in ("", f"{getattr(model, 'base_model_prefix', '')}."):
                place = f"{prefix}{name[: match.start()]}"
                stack = modules.get(place)
                if not isinstance(stack, nn.ModuleList) or int(match[1]) < len(stack) or not len(stack):
                    continue
                if place not in names:
                    names[place] = {inner for part in stack for inner, _ in part.named_parameters()}
                if match[2] in names[place]:
                    beyond.setdefault(place, (len(stack), set()))[1].add(int(match[1]))
    return beyond


def configs_of(model: Any) -> list[Any]:
    """A model's configuration, and that of its text where it is another."""
    config = getattr(model, "config", None)
    get_text = getattr(config, "get_text_config", None)
    return [config] if get_text is None else [config, get_text()]


def sets_layers(model: Any, options: Mapping[str, Any]) -> bool:
    """Whether options set a model's number of layers, by any name that its configuration has for it."""
    names = {"num_hidden_layers"}
    for config in configs_of(model):
        names.add((getattr(config, "attribute_map", None) or {}).get("num_hidden_layers", "num_hidden_layers"))
    inner = [value for name, value in options.items() if name.endswith("_config") and isinstance(value, Mapping)]
    return any(not names.isdisjoint(settings) for settings in (options, *inner))


def count(number: int) -> str:
    """A number of weights, in words."""
    return f"{number} weight{'' if number == 1 else 's'}"


def size(shape: Any) -> str:
    """A shape as `4 × 8`."""
    return " × ".join(map(str, shape))
