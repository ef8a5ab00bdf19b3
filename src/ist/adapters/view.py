"""What is known of a model in training: found out once, and passed down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..config import Trains
from ..runtime.sharding import check_backend, compute_device, is_sharded
from ..runtime.wrappers import compiled_call, unwrap, within_fsdp
from .adalora import find_adalora
from .layers import Layer
from .whole_layers import layers_to_train

__all__ = ["ModelView", "view_model"]


@dataclass(frozen=True)
class ModelView:
    """A model, its layers, and the facts about it that several parts of a step need."""

    model: nn.Module
    """Inside of DistributedDataParallel and `torch.compile`."""
    layers: tuple[Layer, ...]
    """The layers to choose from, in the order of the depth."""
    sharded: bool
    """Whether each rank holds a part of the weights (FSDP), so that a forward is a collective."""

    @cached_property
    def adalora(self) -> Any:
        """PEFT's AdaLoRA tuner, or None for every other kind of adapter."""
        return find_adalora(self.model)

    @property
    def device(self) -> torch.device:
        """Where the model computes. Looked up each time: a model may move between two trainings."""
        return compute_device(self.model, self.sharded)

    @property
    def compiled(self) -> bool:
        """Whether a layer is compiled by itself. Looked up each time: it may be compiled after the tuner was made."""
        return any(compiled_call(within_fsdp(layer.module)) for layer in self.layers)


def view_model(model: Any, layers: str | Sequence[str] | None, trains: Trains, at_least: int = 2) -> ModelView:
    """The view of a model.

    Args:
        model: with adapters, or without them for selectors that train whole layers; it may be wrapped by DDP or
            `torch.compile`.
        layers: the stack of blocks to choose from, see `discover_layers`.
        trains: what the selector trains.
        at_least: how many layers with adapters it needs.

    Raises:
        ValueError: it is no model, its distributed backend cannot train single layers, or it has no layers to choose
            from.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: give a model, such as get_peft_model returns.")
    model = unwrap(model)
    check_backend(model)
    found, sharded = layers_to_train(model, layers, trains, at_least), is_sharded(model)
    if sharded and not any(layer.adapters for layer in found):
        raise ValueError(
            "Whole layers are to be trained, and the model's weights are sharded by FSDP, which was not tried with "
            "that: use one process, or adapters."
        )
    return ModelView(model, found, sharded)
