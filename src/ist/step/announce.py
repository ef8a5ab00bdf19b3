"""What is announced once, at the start: what is chosen from, how it computes, and what trains besides."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..adapters.layers import Layer, parameters_outside
from ..method.registry import EverySelector, Selector
from .bare import bare_blocks

__all__ = ["announce", "describe_fused", "warn_of_missing_parameters"]

logger = logging.getLogger(__name__)


def announce(
    model: nn.Module, layers: Sequence[Layer], selector: Selector, num_fused: int, not_fused: Mapping[str, int]
) -> None:
    """Say what is chosen from, whether LoRA is fused, and what trains at every step.

    Where adapters are on some of the blocks alone, as focused training puts them, it says what happens to the others.

    Args:
        model: with adapters, or without them where whole layers train.
        layers: what is chosen from.
        selector: chooses the layers of a step.
        num_fused: modules that are fused.
        not_fused: how many do not, by reason.
    """
    how = f"; {describe_fused(num_fused, not_fused)} (fused=False turns it off)" if num_fused else ""
    outside = parameters_outside(model, layers)
    bare = len(bare_blocks(model, layers))
    # Transformers shows its users warnings alone.
    if isinstance(selector, EverySelector):
        logger.warning("%s%s.", describe_all(layers, bare, bool(outside)), how)
    else:
        num_active = len(selector.choose(0))
        among = describe_focus(len(layers), bare) if bare else ""
        logger.warning(
            "IST trains %d of %d layers a step%s, from %s%s.", num_active, len(layers), among, layers[0].name, how
        )
    if outside:
        count = sum(parameter.numel() for parameter in outside.values())
        names = list(outside)
        # With whole layers embeddings and head are meant to.
        logger.log(
            logging.WARNING if layers[0].adapters else logging.INFO,
            "%d parameters in %d tensors outside of the layers%s train at every step: %s%s.",
            count,
            len(outside),
            "' adapters" if layers[0].adapters else "",
            ", ".join(names[:3]),
            ", …" if len(names) > 3 else "",
        )


def describe_all(layers: Sequence[Layer], bare: int, outside: bool) -> str:
    """What `selector="all"` does.

    Args:
        layers: all of them train.
        bare: blocks without adapters.
        outside: whether something outside of the layers trains too, perhaps below the lowest of them.
    """
    kind = " with adapters" if layers[0].adapters else ""
    said = (
        f"IST trains all {len(layers)} layers{kind} at every step, from {layers[0].name}: nothing is frozen or measured"
    )
    if not bare:
        return said
    said += f", and the other {bare} of {bare + len(layers)} blocks stay as they are"
    return said if outside else f"{said}, with no backward below the lowest layer"


def describe_focus(num_layers: int, bare: int) -> str:
    """What is chosen among where the adapters' configuration names some of the blocks, and how to train all of these.

    Args:
        num_layers: blocks with adapters.
        bare: blocks without.
    """
    return (
        f", chosen among the {num_layers} of {bare + num_layers} blocks that have adapters (layers_to_transform; "
        f'selector="all" trains all {num_layers} at every step)'
    )


def describe_fused(num_fused: int, not_fused: Mapping[str, int]) -> str:
    """How many adapter modules are fused, and why the others do not."""
    others = ", ".join(f"{count} not: {reason}" for reason, count in not_fused.items())
    return f"{num_fused} LoRA modules are fused" + (f", {others}" if others else "")


def warn_of_missing_parameters(optimizer: Any, layers: Sequence[Layer]) -> None:
    """Warn of layers that an optimizer never trains."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [layer.name for layer in layers if not all(id(p) in held for p in layer.parameters)]
    if missing:
        warnings.warn(
            f"The optimizer lacks trainable parameters of {len(missing)} layers ({missing[0]}, …), which it never "
            "trains: make it from all parameters that require a gradient, before the first begin_step(), unless "
            "another optimizer has them.",
            stacklevel=4,
        )
