"""Numbers of a loaded model that are NaN or infinite: in its weights, and in what a quantiser keeps beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import modeling_utils

from ..step.finite import all_finite, is_finite

__all__ = ["check_finite", "first_file", "list_non_finite", "say_non_finite", "some"]

FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of a model's weights in one file; with `.index.json` the list of several."""
ORIGINAL = ("torch.nn.", "transformers.models.", "transformers_modules.")
"""Where the classes of a model's own modules are; a quantiser puts others in their place."""
NUMBERS = ("scale", "zero", "shift", "absmax", "scb", "codebook", "centroid", "bias", "norm")
"""In names of tensors of a quantised module that are numbers, and no packed codes, whatever their shape."""


def check_finite(source: str, model: Any) -> None:
    """Raise ValueError where weights are NaN or infinite, as far as this process holds them."""
    if modeling_utils.is_fsdp_enabled() and int(os.environ.get("LOCAL_RANK", "0")):
        return  # FSDP sends the weights to this process later.
    codes = set(code_names(model))
    weights = {name: weight for name, weight in model.named_parameters() if not (weight.is_meta or name in codes)}
    named = {**weights, **{name: tensor for name, tensor in kept_beside(model) if not tensor.is_meta}}
    broken = list_non_finite(named)
    if broken:
        narrow = any(name in weights and weights[name].dtype == torch.float16 for name in broken)
        raise ValueError(
            say_non_finite(f"The weights in {source} hold", broken, len(named), file_of(source, broken[0]))
            + ("give --dtype float32 or bfloat16, since float16 ends at 65504, or " if narrow else "")
            + "load the model's files anew, or save it anew from finite weights."
        )


def code_names(model: Any) -> Iterator[str]:
    """The names of parameters that hold packed codes of a quantised matrix; as numbers of their dtype they say nothing.

    bitsandbytes and HQQ may store them as bfloat16, float16 or float32. Numbers of 8 bits stand for themselves.
    """
    for place, module, put_in in modules_of(model):
        for name, parameter in module.named_parameters(recurse=False):
            packed = getattr(parameter, "quant_state", None) is not None or getattr(parameter, "bnb_quantized", False)
            large = parameter.dim() > 1 and parameter.element_size() > 1
            if packed or (put_in and large and not is_number(name)):
                yield place + name


def kept_beside(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors by which a quantiser multiplies codes, where they are no parameters: buffers, attributes of the codes
    or of the module, and the parts of a tensor of its own class.
    """
    for place, module, put_in in modules_of(model):
        for name, parameter in module.named_parameters(recurse=False):
            state = getattr(parameter, "quant_state", None)
            for prefix, inner in (("", state), ("nested_", getattr(state, "state2", None))):
                yield from floating(f"{place}{name}.{prefix}", {"absmax": getattr(inner, "absmax", None)})
            yield from floating(f"{place}{name}.", {"nested_offset": getattr(state, "offset", None)})
            yield from floating(place, {"SCB": getattr(parameter, "SCB", None)})
            flatten = getattr(parameter, "__tensor_flatten__", None)
            if flatten is not None and not hasattr(parameter, "to_local"):
                yield from floating(f"{place}{name}.", {part: getattr(parameter, part) for part in flatten()[0]})
        if put_in and holds_codes(module):
            meta = getattr(module, "meta", None)
            held = {**dict(module.named_buffers(recurse=False)), **(meta if isinstance(meta, dict) else {})}
            yield from floating(place, {name: value for name, value in held.items() if is_number(str(name))})


def modules_of(model: Any) -> Iterator[tuple[str, nn.Module, bool]]:
    """A model's modules: what their tensors' names begin with, and whether a quantiser has put them in."""
    quantised = getattr(model, "hf_quantizer", None) is not None
    for place, module in model.named_modules():
        put_in = quantised and not f"{type(module).__module__}.".startswith(ORIGINAL)
        yield f"{place}." if place else "", module, put_in


def holds_codes(module: nn.Module) -> bool:
    """Whether a module that is not the model's own has a matrix that may be packed codes: one of attention from another
    package may hold an infinite mask alone.
    """
    held = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    return any(tensor.dim() > 1 and not is_number(name) for name, tensor in held)


def is_number(name: str) -> bool:
    """Whether a tensor of a quantised module stands for itself, by its name."""
    return any(word in name.lower() for word in NUMBERS)


def floating(place: str, named: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Those of some values that are floating-point tensors, by their whole names."""
    for name, value in named.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            yield f"{place}{name}", value


def list_non_finite(named: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors with NaN or infinite numbers among them, in order; whole numbers are always finite.

    Args:
        named: tensors of any kind and shape by name.
    """
    floating = {name: tensor for name, tensor in named.items() if tensor.is_floating_point() or tensor.is_complex()}
    plain = {name: tensor for name, tensor in floating.items() if is_plain(tensor)}
    fine = set(plain) if all_finite(plain.values()) else {name for name, tensor in plain.items() if is_finite(tensor)}
    return [
        name for name, tensor in floating.items() if not (name in fine if name in plain else is_finite_alone(tensor))
    ]


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is looked at together with others: one of 8 bits, or of a quantiser's own class, is not."""
    return tensor.element_size() > 1 and (type(tensor) in (Tensor, nn.Parameter) or hasattr(tensor, "to_local"))


def is_finite_alone(tensor: Tensor) -> bool:
    """Whether a tensor is finite; true where PyTorch cannot tell, as of float4_e2m1fn_x2, which has no NaN."""
    try:
        return is_finite(tensor.detach().bfloat16() if tensor.element_size() == 1 else tensor)
    except (RuntimeError, TypeError):  # NotImplementedError is a RuntimeError.
        return True


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


def some(names: Collection[str]) -> str:
    """The first of several names."""
    first, *others = names
    return f"{first}, …" if others else first
