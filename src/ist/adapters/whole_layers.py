"""Layers that train whole, all weights of a block, as LISA, LIFT and full fine-tuning train them.

A model without adapters has no adapter to tell a layer by. Its layers are the blocks of its repeated stack(s): the
outermost list of blocks, at least two of which are of one class and made of modules themselves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from torch import nn

from ..config import Trains
from .layers import Layer, base_name, choose_stacks, discover_layers, find_adapters, find_stacks

__all__ = ["discover_whole_layers", "layers_to_train"]

CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def layers_to_train(
    model: nn.Module, names: str | Sequence[str] | None, trains: Trains, at_least: int = 2
) -> tuple[Layer, ...]:
    """The layers of a model for a selector.

    Args:
        model: with adapters, or without where whole layers train.
        names: see `discover_layers`.
        trains: what the selector trains.
        at_least: how many layers with adapters it needs.

    Raises:
        ValueError: the model is not of that kind, or its structure leaves a choice.
    """
    if trains == "adapters" or (trains == "either" and has_adapters(model)):
        return discover_layers(model, names, at_least=at_least)
    return discover_whole_layers(model, names)


def discover_whole_layers(model: nn.Module, names: str | Sequence[str] | None = None) -> tuple[Layer, ...]:
    """Find the blocks of a model without adapters.

    What lies outside of them (embeddings, the final norm, the head) belongs to no layer, and neither does a weight
    that two blocks, or a block and the head, have in common: they train at every step.

    Args:
        model: a model without adapters, whose trainable weights are its own.
        names: the stack or stacks to use where the structure leaves a choice, as for `discover_layers`.

    Returns:
        The layers in the order of the forward pass, numbered from 0; at least 2. Their `adapters` are empty, and their
        `parameters` are all that requires a gradient in the block.

    Raises:
        ValueError: the model has adapters, has nothing to train, no block repeats, or several stacks do and
            `names` does not say which one is meant.
    """
    check_whole(model)
    trained = {name: m for name, m in model.named_modules() if any(p.requires_grad for p in own_parameters(m))}
    stacks = {name: stack for name, stack in find_stacks(model, trained).items() if repeats(stack)}
    if not stacks:
        raise ValueError(
            f"Found no stack of at least 2 blocks with trainable weights in {base_name(model)}: choosing among whole "
            "layers needs blocks of one class in an nn.ModuleList or nn.Sequential."
        )
    chosen = choose_stacks(model, stacks, names, "trainable weights")
    blocks = {f"{stack}.{name}": block for stack, s in chosen.items() for name, block in s.named_children()}
    places = Counter(id(module) for block in blocks.values() for module in block.modules())
    owners = Counter(id(p) for block in blocks.values() for p in set(block.parameters()))
    owners.update(outside_parameters(model, set(places)))
    layers: list[Layer] = []
    for name, block in blocks.items():
        own = tuple(p for p in block.parameters() if p.requires_grad and owners[id(p)] == 1)
        if own:
            layers.append(Layer(len(layers), name, block, {}, own))
    if len(layers) < 2:
        raise ValueError(
            f"{len(layers)} block(s) of {', '.join(chosen)} have weights of their own, and choosing among layers needs "
            "at least 2 (one that is used for several layers is one block)."
        )
    return tuple(layers)


def has_adapters(model: nn.Module) -> bool:
    """Whether PEFT, or a library with the same conventions, has put something on the model."""
    return bool(find_adapters(model) or getattr(model, "peft_config", None))


def check_whole(model: nn.Module) -> None:
    """Raise ValueError unless single blocks of the model can be trained whole."""
    if has_adapters(model):
        raise ValueError(
            "Whole layers are to be trained, and this model has adapters: give the model without them (LISA and full "
            "fine-tuning train its own weights), or choose among adapters with selector='ist' or 'random'."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "No weight of the model requires a gradient, so there is no layer to train whole: load it unquantised and "
            "unfrozen, or put adapters on it."
        )


def repeats(stack: nn.Module) -> bool:
    """Whether at least two elements of a stack are of one class and made of modules (a head's linear ones are not)."""
    kinds = Counter(type(block) for block in stack.children() if any(True for _ in block.children()))
    return max(kinds.values(), default=0) >= 2


def own_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that a module holds itself."""
    return module.parameters(recurse=False)


def outside_parameters(model: nn.Module, inside: set[int]) -> set[int]:
    """The ids of the parameters that a module outside of the blocks holds."""
    return {id(p) for module in model.modules() if id(module) not in inside for p in own_parameters(module)}


def computing_parts(block: nn.Module) -> Iterator[tuple[nn.Module, set[int]]]:
    """The modules around whose forward a block's weights can be frozen, and the ids of those weights.

    They are the block's children, with lists and the like in between passed through, and the block itself for weights
    that it holds. Not the block for all: some compute with one of its children alone, and gradient checkpointing
    computes it anew, when each part must find what it found at first.
    """
    if held := set(map(id, own_parameters(block))):
        yield block, held
    waiting = list(block.children())
    while waiting:
        module = waiting.pop()
        if isinstance(module, CONTAINERS):
            waiting += module.children()
        elif weights := set(map(id, module.parameters())):
            yield module, weights
