"""What is announced once, at the start: what is chosen from, how it computes, and what trains besides."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..adapters.layers import Layer, parameters_outside

__all__ = ["announce", "describe_fused", "warn_of_missing_parameters"]

logger = logging.getLogger(__name__)


def announce(
    model: nn.Module, layers: Sequence[Layer], num_active: int, num_fused: int, not_fused: Mapping[str, int]
) -> None:
    """Say what is chosen from, whether LoRA is fused, and what trains at every step.

    Args:
        model: with adapters, or without them where whole layers train.
        layers: what is chosen from.
        num_active: layers of a step.
        num_fused: modules that are fused.
        not_fused: how many do not, by reason.
    """
    how = f"; {describe_fused(num_fused, not_fused)} (fused=False turns it off)" if num_fused else ""
    # Transformers shows its users warnings alone.
    logger.warning("IST trains %d of %d layers a step, from %s%s.", num_active, len(layers), layers[0].name, how)
    outside = parameters_outside(model, layers)
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


def describe_fused(num_fused: int, not_fused: Mapping[str, int]) -> str:
    """How many adapter modules are fused, and why the others do not."""
    others = ", ".join(f"{count} not: {reason}" for reason, count in not_fused.items())
    return f"{num_fused} LoRA modules are fused" + (f", {others}" if others else "")


def warn_of_missing_parameters(optimizer: Any, layers: Sequence[Layer]) -> None:
    """Warn of layers that an optimizer can never train."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [layer.name for layer in layers if not all(id(p) in held for p in layer.parameters)]
    if missing:
        warnings.warn(
            f"The optimizer lacks trainable parameters of {len(missing)} layers ({missing[0]}, …), which are never "
            "trained: make it from all parameters that require a gradient, before the first begin_step().",
            stacklevel=4,
        )
