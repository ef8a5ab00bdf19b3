"""Recompute by need: idle layers keep no activations and compute once more in the backward; active ones keep theirs.

Every layer above the lowest active one needs a backward, but three quarters of them train nothing. With LoRA as one
function (`ist.fused`) they keep little; here they keep their input alone, as with gradient checkpointing, at the price
of a second forward of idle layers only. What lies below the lowest active layer has no backward, so it is neither kept
nor recomputed. The recomputation is PyTorch's own (`torch.utils.checkpoint`), exact with dropout and autocast. An idle
layer trains nothing, so what is bad about the reentrant kind does not touch it, and that kind is the faster one: its
forward records no graph, and no hook runs for each tensor that would be saved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .layers import Layer
from .sharding import is_sharded

__all__ = ["Recompute"]

ATTRIBUTES = ("gradient_checkpointing", "_gradient_checkpointing_func")
"""By which a block of transformers recomputes; it also leaves the cache of generation out then."""
recomputed = partial(checkpoint, use_reentrant=False)
reentrantly_recomputed = partial(checkpoint, use_reentrant=True)


def recomputed_idle(function: Callable[..., Any], *args: Any) -> Any:
    """The recomputation of a layer in which nothing trains: reentrant, where gradients go through `args` alone."""
    needs_gradient = any(isinstance(value, Tensor) and value.requires_grad for value in args)
    if needs_gradient and isinstance(function, partial) and not has_gradient(function.keywords.values()):
        return reentrantly_recomputed(function, *args)
    return recomputed(function, *args)


def has_gradient(values: Iterable[Any]) -> bool:
    """Whether a tensor among nested values requires a gradient."""
    return any(
        value.requires_grad
        if isinstance(value, Tensor)
        else isinstance(value, (tuple, list, dict))
        and has_gradient(value.values() if isinstance(value, dict) else value)
        for value in values
    )


class Recompute:
    """Switches recomputation on for single layers.

    Args:
        layers: the layers of the model.
        mode: `frozen` recomputes idle layers, `all` every one, `none` does nothing.

    Raises:
        ValueError: gradient checkpointing is on, which recomputes every layer already.
    """

    def __init__(self, layers: Sequence[Layer], mode: str) -> None:
        self._layers = () if mode == "none" else tuple(layers)
        self._mode = mode
        for layer in layers:
            restore(layer.module)  # of a training that ended with an exception
        self._still = {layer.index for layer in self._layers if is_still(layer)}
        check_not_checkpointing(self._layers, mode)
        self._restore = weakref.finalize(self, restore_all, [layer.module for layer in self._layers])

    def activate(self, active: Collection[int]) -> None:
        """From now on recompute what `mode` says, where the layers `active` train."""
        for layer in self._layers:
            idle = layer.index not in active
            recomputes = self._mode == "all" or idle
            switch(layer.module, recomputes, recomputed_idle if idle and layer.index in self._still else recomputed)

    def activate_all(self) -> None:
        """Recompute nothing."""
        for layer in self._layers:
            restore(layer.module)

    def close(self) -> None:
        """Leave the model as it was."""
        self._restore()


def check_not_checkpointing(layers: Sequence[Layer], mode: str) -> None:
    """Raise ValueError where gradient checkpointing is on."""
    if any(getattr(layer.module, "gradient_checkpointing", False) for layer in layers):
        raise ValueError(
            f"recompute={mode!r} and gradient checkpointing are both on: leave one of them off; recompute='frozen' is "
            "the faster one, gradient_checkpointing=True the smaller one."
        )


def is_still(layer: Layer) -> bool:
    """Whether nothing trains in the block of a layer while the layer is idle, and no engine watches its backward."""
    own = {id(parameter) for parameter in layer.parameters}
    trains = any(p.requires_grad and id(p) not in own for p in layer.module.parameters())
    return not trains and not is_sharded(layer.module)


def switch(block: nn.Module, on: bool, function: Callable[..., Any]) -> None:
    """Have a block recompute in the backward by `function`, or not."""
    if not on:
        restore(block)
    elif block._compiled_call_impl is not None:
        if not isinstance(block._compiled_call_impl, RecomputedCall):
            block._compiled_call_impl = RecomputedCall(block, block._compiled_call_impl)
    elif hasattr(block, "gradient_checkpointing"):
        block.gradient_checkpointing = True  # type: ignore[assignment]
        block._gradient_checkpointing_func = function  # type: ignore[assignment]
    elif "forward" not in block.__dict__ or "_ist_recompute" in block.__dict__:
        block.__dict__.update(forward=MethodType(recomputed_forward, block), _ist_recompute=function)


class RecomputedCall:
    """The call of a compiled block, computed again around the compiled code: the block's graphs stay the same."""

    def __init__(self, block: nn.Module, call: Callable[..., Any]) -> None:
        self.block = weakref.ref(block)
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block = self.block()
        if block is None or not (block.training and torch.is_grad_enabled()):
            return self.call(*args, **kwargs)
        return recomputed(self.call, *args, **kwargs)


def recomputed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a block that keeps its inputs alone."""
    forward = partial(type(self).forward, self, **kwargs)
    if not (self.training and torch.is_grad_enabled()):
        return forward(*args)
    return self._ist_recompute(forward, *args)


recomputed_forward.__name__ = "forward"  # By which a pickled block finds the forward of its class.


def restore(block: nn.Module) -> None:
    """Have a block compute as its class does."""
    if block.__dict__.get("_gradient_checkpointing_func") in (recomputed, recomputed_idle):
        for name in ATTRIBUTES:
            block.__dict__.pop(name, None)
    if getattr(block.__dict__.get("forward"), "__func__", None) is recomputed_forward:
        del block.__dict__["forward"], block.__dict__["_ist_recompute"]
    if isinstance(block._compiled_call_impl, RecomputedCall):
        block._compiled_call_impl = block._compiled_call_impl.call


def restore_all(blocks: Sequence[nn.Module]) -> None:
    """Have blocks compute as their classes do."""
    for block in blocks:
        restore(block)
