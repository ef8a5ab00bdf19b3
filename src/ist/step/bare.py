"""Blocks of a stack that carry no adapters, as focused training leaves most of them.

Nothing is switched in them and nothing hooks them: they are the modules that PEFT left as they were. Whoever keeps no
activations asks for them here.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..adapters.layers import Layer, is_adapter

__all__ = ["NO_LAYER", "bare_blocks"]

NO_LAYER = -1
"""The index of a block that is no layer, and so is never among the active ones."""


def bare_blocks(model: nn.Module, layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The blocks without adapters in the stacks of `layers`, in the order of the depth; none where layers train whole.

    Args:
        model: whose layers these are, by their qualified names.
        layers: as `discover_layers` found them.

    Returns:
        Each block as a layer of the index -1, without adapters or parameters.
    """
    if not all(layer.adapters for layer in layers):
        return ()
    own = {id(layer.module) for layer in layers}
    stacks = dict.fromkeys(layer.name.rpartition(".")[0] for layer in layers)
    return tuple(
        Layer(NO_LAYER, f"{stack}.{name}", block, {}, ())
        for stack in stacks
        for name, block in model.get_submodule(stack).named_children()
        if id(block) not in own and is_block(block)
    )


def is_block(module: nn.Module) -> bool:
    """Whether a module is made of others, none of which is an adapter."""
    return any(True for _ in module.children()) and not any(map(is_adapter, module.modules()))
