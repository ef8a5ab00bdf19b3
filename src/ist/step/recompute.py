"""Recompute by need: frozen layers keep no activations and compute once more in the backward; active ones keep theirs.

Every layer above the lowest active one needs a backward, but three quarters of them train nothing. With fused LoRA
(`ist.step.fused`) they keep little; here they keep their input alone, as with gradient checkpointing, at the cost of a
second forward of the frozen layers only. What lies below the lowest active layer has no backward, so it is neither kept
nor recomputed. Blocks without adapters are frozen for good, and recomputed like frozen layers.

The recomputation is PyTorch's own (`torch.utils.checkpoint`), exact with dropout and autocast. A frozen layer trains
nothing, so what is bad about the reentrant kind does not touch it, and that kind is the faster one where launching
counts: its forward records no graph, and no hook runs for each tensor that would be saved. Where computing counts, the
other kind is the faster one for blocks without adapters: it stops when it has what the backward needs, so the last
projection of such a block, a fifth of its arithmetic, is not computed again.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..adapters.layers import Layer
from ..adapters.view import ModelView
from ..runtime.part import Part
from ..runtime.wrappers import compiled_call, within_fsdp
from .bare import NO_LAYER, bare_blocks
from .fused.products import has_many_rows

__all__ = ["Recompute"]

FORWARDS = ("forward", "_old_forward")
"""Where a block's forward is looked up; the second is where Accelerate's hooks keep it, to move tensors around it."""
CALLS = ("_compiled_call_impl", "forward")
"""What calls a block compiled by `block.compile()` and by `torch.compile(block)`."""
recomputed = partial(checkpoint, use_reentrant=False)
reentrantly_recomputed = partial(checkpoint, use_reentrant=True)


def recomputed_frozen(function: partial[Any], *args: Any) -> Any:
    """The recomputation of a layer in which nothing trains: reentrant, where gradients go through `args` alone."""
    tensors = [value for value in args if isinstance(value, Tensor)]
    others = [value for value in args if not isinstance(value, Tensor)]
    if needs_gradient(tensors) and not needs_gradient([*others, *function.keywords.values()]):
        return reentrantly_recomputed(function, *args)
    return recomputed(function, *args)


def recomputed_bare(function: partial[Any], *args: Any) -> Any:
    """The recomputation of a block without adapters: of many rows only as far as the backward needs it."""
    if args and isinstance(args[0], Tensor) and has_many_rows(args[0]):
        return recomputed(function, *args)
    return recomputed_frozen(function, *args)


def needs_gradient(values: Iterable[Any]) -> bool:
    """Whether a tensor among nested values requires a gradient."""
    return any(
        value.requires_grad
        if isinstance(value, Tensor)
        else isinstance(value, (tuple, list, dict))
        and needs_gradient(value.values() if isinstance(value, dict) else value)
        for value in values
    )


class Recompute(Part):
    """Switches recomputation on for single layers.

    Args:
        view: the model in training.
        mode: `frozen` recomputes frozen layers and blocks without adapters, `all` every one, `none` and `norms` none:
            the outputs of norms are made again by the modules that read them (`ist.step.fused.again`).

    Raises:
        ValueError: gradient checkpointing is on, which recomputes every layer already.
    """

    def __init__(self, view: ModelView, mode: str) -> None:
        blocks = (*view.layers, *bare_blocks(view.model, view.layers))
        self._still = {layer.name for layer in blocks if not view.sharded and is_still(layer)}
        layers = [replace(layer, module=within_fsdp(layer.module)) for layer in blocks]
        restore_all([layer.module for layer in layers])  # of a training that ended with an exception
        self._layers = () if mode in ("none", "norms") else tuple(layers)
        self._mode = mode
        check_not_checkpointing(() if mode == "none" else layers, mode)
        if mode == "norms":
            warn_of_other_norms(view.model)
        warn_of_other_forwards(self._layers, mode)
        self._restore = weakref.finalize(self, restore_all, [layer.module for layer in self._layers])

    def begin(self, active: Collection[int], step: int = 0) -> None:
        """From now on recompute what `mode` says, where the layers `active` train."""
        for layer in self._layers:
            frozen = layer.index not in active
            again = self._mode == "all" or frozen
            still = recomputed_bare if layer.index == NO_LAYER else recomputed_frozen
            switch(layer.module, again, still if frozen and layer.name in self._still else recomputed)

    def end(self) -> None:
        """Recompute nothing."""
        restore_all([layer.module for layer in self._layers])

    def close(self) -> None:
        """Leave the model as it was."""
        self._restore()


def check_not_checkpointing(layers: Sequence[Layer], mode: str) -> None:
    """Raise ValueError where gradient checkpointing is on."""
    if any(getattr(layer.module, "gradient_checkpointing", False) for layer in layers):
        raise ValueError(
            f"recompute={mode!r} and gradient checkpointing are both on: leave one of them off; recompute='frozen' is "
            "the faster one, gradient_checkpointing=True the smaller one. TRL's SFTConfig turns it on by default: give "
            "gradient_checkpointing=False."
        )


def warn_of_other_forwards(layers: Sequence[Layer], mode: str) -> None:
    """Warn of layers that cannot be recomputed, since something else than their class says what they compute."""
    others = [layer.name for layer in layers if not (compiled_call(layer.module) or own_forward(layer.module))]
    if others:
        warnings.warn(
            f"recompute={mode!r} does nothing for {len(others)} of {len(layers)} layers ({others[0]}, …), whose "
            "forward was replaced: only that of a block's class is recomputed. Take it off (del block.forward), or set "
            "recompute='none'.",
            stacklevel=4,
        )


def warn_of_other_norms(model: nn.Module) -> None:
    """Warn of a model whose norms keep more than Liger's do."""
    if not any(module._get_name().startswith("LigerRMSNorm") for module in model.modules()):
        warnings.warn(
            "recompute='norms' does nothing here: the model has none of Liger's RMSNorm, the only one made again. Use "
            "Liger's kernels (use_liger_kernel=True), or set recompute='none'.",
            stacklevel=4,
        )


def is_still(layer: Layer) -> bool:
    """Whether nothing trains in the block of a layer while the layer is frozen."""
    own = {id(parameter) for parameter in layer.parameters}
    trains = any(p.requires_grad and id(p) not in own for p in layer.module.parameters())
    return not trains


def own_forward(block: nn.Module) -> str | None:
    """The attribute by which the forward of a block's class is found, or None where another one has its place."""
    name = "_old_forward" if "_old_forward" in block.__dict__ else "forward"
    function = getattr(block.__dict__.get(name), "__func__", None)
    plain = name not in block.__dict__ or function in (type(block).forward, recomputed_forward)
    return name if plain else None


def switch(block: nn.Module, on: bool, function: Callable[..., Any]) -> None:
    """Have a block recompute in the backward by `function`, or not. Transformers' own flag for it is left alone: TRL
    reads it, switches it off around passes of its own, and on again for all blocks.
    """
    if not on:
        restore(block)
    elif name := compiled_call(block):
        call = getattr(block, name)
        if not isinstance(call, RecomputedCall):
            block.__dict__[name] = RecomputedCall(block, call)
    elif name := own_forward(block):
        block.__dict__.update({name: MethodType(recomputed_forward, block), "_ist_recompute": function})


def recomputes(block: nn.Module) -> bool:
    """Whether a block is to keep its inputs alone now; gradient checkpointing that came later does so by itself."""
    return block.training and torch.is_grad_enabled() and not getattr(block, "gradient_checkpointing", False)


def without_caches(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Arguments of a block without the cache of generation, which would grow twice; its flag leaves it out as well."""
    if not hasattr(block, "gradient_checkpointing"):
        return args, kwargs
    if kwargs.get("use_cache"):
        kwargs = {**kwargs, "use_cache": False}
    if getattr(block, "_can_checkpoint_with_cache", False):
        return args, kwargs
    args = tuple(None if is_cache(value) else value for value in args)
    return args, {name: None if is_cache(value) else value for name, value in kwargs.items()}


def is_cache(value: Any) -> bool:
    """Whether a value is a cache of transformers."""
    return hasattr(value, "get_seq_length")


class RecomputedCall:
    """The call of a compiled block, computed again around the compiled code: the block's graphs stay the same."""

    def __init__(self, block: nn.Module, call: Callable[..., Any]) -> None:
        self.block = weakref.ref(block)
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block = self.block()
        if block is None or not recomputes(block):
            return self.call(*args, **kwargs)
        args, kwargs = without_caches(block, args, kwargs)
        return recomputed(self.call, *args, **kwargs)


def recomputed_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The forward of a block that keeps its inputs alone."""
    recompute = getattr(self, "_ist_recompute", None)  # None where another library put this back after its step
    if recompute is None or not recomputes(self):
        return type(self).forward(self, *args, **kwargs)
    args, kwargs = without_caches(self, args, kwargs)
    return recompute(partial(type(self).forward, self, **kwargs), *args)


recomputed_forward.__name__ = "forward"  # By which a pickled block finds the forward of its class.


def restore(block: nn.Module) -> None:
    """Have a block compute as its class does."""
    own = block.__dict__
    own.pop("_ist_recompute", None)
    for name in FORWARDS:
        if getattr(own.get(name), "__func__", None) is recomputed_forward:
            own.pop(name)
            if name != "forward":
                own[name] = MethodType(type(block).forward, block)
    for name in CALLS:
        if isinstance(call := own.get(name), RecomputedCall):
            own[name] = call.call


def restore_all(blocks: Sequence[nn.Module]) -> None:
    """Have blocks compute as their classes do."""
    for block in blocks:
        restore(block)
