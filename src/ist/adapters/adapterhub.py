"""The adapters of AdapterHub's library `adapters`: which modules they are, and how to scale what they add by beta.

They are known by their protocol (a layer names the attribute that holds its adapters, and says which are active), so
nothing is imported from that library. Prefixes lengthen the keys and values of an attention module: what they add can
be separated in the attention's output only, so the attention module is the adapter there.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .blending import blend

__all__ = ["check_adapters", "is_adapter", "pooled_parameters", "scaled_response"]

PROMPTS = ("prefixes", "prompt_tunings")
"""Where prompt-based methods keep their adapters; the outputs of these layers are no responses."""


def is_adapter(module: nn.Module) -> bool:
    """Whether the output of `module` is what adapters of AdapterHub add their response to."""
    return any(map(has_prefixes, module.children())) or (
        is_layer(module) and module.adapter_modules_name not in PROMPTS
    )


def is_layer(module: nn.Module) -> bool:
    """Whether `module` follows the protocol of AdapterHub's `AdapterLayerBase` and holds at least one adapter."""
    name = getattr(module, "adapter_modules_name", None)
    return isinstance(name, str) and hasattr(module, "get_active_setup") and bool(getattr(module, name, None))


def has_prefixes(module: nn.Module) -> bool:
    """Whether `module` puts prefixes before an attention's keys and values."""
    return is_layer(module) and module.adapter_modules_name == "prefixes"


def layers_within(*modules: nn.Module) -> list[nn.Module]:
    """The layers of AdapterHub in some modules, those of prompt-based methods among them."""
    return [part for module in modules for part in module.modules() if is_layer(part)]


def check_adapters(model: nn.Module) -> None:
    """Raise ValueError if the model has adapters of AdapterHub that do not train, or whose response cannot be told."""
    parts = layers_within(model)
    active = [part for part in parts if part.get_active_setup() is not None]  # type: ignore[operator]
    if any(getattr(part, "merged", False) for part in parts):
        raise ValueError(
            "An adapter is merged into its base weights, so its response cannot be trained or suppressed apart from "
            "them: call model.reset_adapter() first."
        )
    if parts and not any(parameter.requires_grad for part in active for parameter in part.parameters()):
        raise ValueError("No active adapter requires a gradient: call model.train_adapter(name) before training.")
    if parts and all(part.adapter_modules_name in PROMPTS for part in active):
        raise ValueError(
            "Prompt or prefix tuning alone adds no response to a layer's output that could be suppressed, so the "
            "paper excludes it: use an adapter that works layer by layer, such as MAMConfig() or LoRAConfig()."
        )
    for name, module in model.named_modules():
        prefixes = [part for part in module.children() if has_prefixes(part) and part in active]
        if prefixes and hasattr(module, "has_relative_attention_bias"):
            raise ValueError(
                f"{name} has relative positions, which prefixes shift in all layers, so what it computes without them "
                "cannot be told: leave prefix tuning out on this model, as with ParBnConfig() for MAMConfig()."
            )


def pooled_parameters(adapters: Iterable[nn.Module]) -> set[int]:
    """The ids of the parameters that prefixes are made from, before the first layer and for all layers at once."""
    pools = (part.pool for part in layers_within(*adapters) if has_prefixes(part))
    return {id(parameter) for pool in pools for parameter in pool.parameters()}  # type: ignore[union-attr]


@contextmanager
def scaled_response(adapter: nn.Module, beta: float) -> Iterator[None]:
    """Within the context, `adapter` returns `base + β·(full − base)`; afterwards it is as it was.

    Where a module returns several values, the first is its output, and the others stay those of the full module.

    Args:
        adapter: a module that `is_adapter` recognises.
        beta: factor on the response of its active adapters, in [0, 1].
    """
    own = vars(adapter).get("forward")
    forward = adapter.forward

    def blended(*args: Any, **kwargs: Any) -> Any:
        with disabled(adapter):
            base = forward(*map(copy_cache, args), **{name: copy_cache(value) for name, value in kwargs.items()})
        full = forward(*args, **kwargs)
        if isinstance(full, tuple):
            return (blend_output(base[0], full[0], beta), *full[1:])
        return blend_output(base, full, beta)

    try:
        adapter.forward = blended
        yield
    finally:
        if own is None:
            del adapter.forward
        else:
            adapter.forward = own


def blend_output(base: Any, full: Any, beta: float) -> Tensor:
    """`base + β·(full − base)` of one tensor.

    Raises:
        ValueError: the module returned something else, or its adapters change the shape.
    """
    if not isinstance(full, Tensor) or base.shape != full.shape:
        found = f"tensors of shapes {list(base.shape)} and {list(full.shape)}" if isinstance(full, Tensor) else "none"
        raise ValueError(
            f"A module must return one tensor of one shape without and with its adapters, and gave {found}, so its "
            "response cannot be scaled: train one adapter, or a Stack, rather than adapters in Parallel."
        )
    return blend(base, full, beta)


@contextmanager
def disabled(adapter: nn.Module) -> Iterator[None]:
    """Within the context, no adapter in a module is active; the library computes as if it had none."""
    parts = layers_within(adapter)
    try:
        for part in parts:
            part.get_active_setup = nothing_active  # type: ignore[assignment]
        yield
    finally:
        for part in parts:
            vars(part).pop("get_active_setup", None)


def nothing_active() -> None:
    """The answer of a layer none of whose adapters is active."""


def copy_cache(value: Any) -> Any:
    """A copy of a key–value cache, which the forward that follows would otherwise lengthen once more."""
    return copy.deepcopy(value) if hasattr(value, "get_seq_length") else value
