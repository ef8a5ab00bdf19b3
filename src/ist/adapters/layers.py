"""Find the layers of a model and the adapters in each, from the model's structure.

A *layer* is one block of the model's repeated stack: one element of an `nn.ModuleList` (or of an `nn.Sequential`)
whose elements hold adapters. No class name is looked up, so a new architecture works on the day that it appears.
"""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import nn

from ..config import check_stack_names
from ..runtime.wrappers import base_model
from . import adapterhub

__all__ = ["Layer", "discover_layers", "parameters_outside"]


NO_PROMPTS = (
    "is a prompt-learning method: it adds no response to a layer's output that could be suppressed, so the paper "
    "excludes it"
)

# Methods of PEFT whose modules look like adapters of a layer, and why none of a layer can be told apart.
NOT_BY_LAYER = {
    "ADAPTION_PROMPT": "adds gated prompts inside attention modules that lack peft's switch for adapters, so a layer's "
    "output without them is not available",
    "SHADOW": "passes a second hidden state of its own from block to block, so no block has a response of its own",
    "TINYLORA": "keeps the parameters of all modules in one bank, which every layer holds",
    "TRAINABLE_TOKENS": "trains rows of an embedding, which belongs to no layer",
    "UNILORA": "trains one bank of parameters for all layers",
    "XLORA": "trains one gate over whole adapters, which are frozen: no layer has trainable parameters of its own",
}


@dataclass(frozen=True, eq=False)
class Layer:
    """One block of the model and the adapters in it."""

    index: int
    """Position among the layers, from 0."""
    name: str
    """Qualified name of the block in the model, such as `base_model.model.model.layers.0`."""
    module: nn.Module
    """The block."""
    adapters: dict[str, nn.Module]
    """Adapter modules in the block by qualified name; one that stands inside another is not listed again. None where
    the layer trains whole."""
    parameters: tuple[nn.Parameter, ...]
    """What trains in this layer: the parameters of its adapters, or of the whole block, that required a gradient when
    the layer was discovered."""


def discover_layers(
    model: nn.Module, names: str | Sequence[str] | None = None, *, at_least: int = 2
) -> tuple[Layer, ...]:
    """Find the layers of `model` that carry adapters.

    The stack is the outermost list of blocks that holds adapters, so the experts of a mixture lie inside a layer.
    An encoder–decoder has two stacks, and its layers are those of the encoder followed by those of the decoder.

    Args:
        model: a model that PEFT (or a library with the same conventions) has put adapters into.
        names: the stack or stacks to use where the structure leaves a choice: qualified names of lists of blocks, or
            their ends, such as `language_model.layers`. `*` stands for any part, as in `stages.*.blocks`.
        at_least: how many layers there have to be: 2 to choose among them, 1 to train all.

    Returns:
        The layers in the order of the forward pass, numbered from 0.

    Raises:
        ValueError: the model has no trainable adapter, an adapter is merged, no block repeats, or several stacks hold
            adapters and `names` does not say which one is meant.
    """
    adapters = find_adapters(model)
    check_adapters(model, adapters)
    stacks = find_stacks(model, adapters) or (find_stacks(model, adapters, held=1) if at_least == 1 else {})
    chosen = choose_stacks(model, stacks, names)
    shared = shared_parameters(chosen, adapters) | adapterhub.pooled_parameters(adapters.values())
    adapters = without_shared_modules(chosen, adapters)
    layers: list[Layer] = []
    for stack_name, stack in chosen.items():
        for block_name, block in stack.named_children():
            name = f"{stack_name}.{block_name}"
            layer = make_layer(len(layers), name, block, adapters, shared)
            if layer.parameters:
                layers.append(layer)
    if not layers:
        raise ValueError(
            f"All trainable adapter parameters in {', '.join(chosen)} are shared between layers, so no layer can be "
            "trained without the others: use a method with parameters of each layer's own, such as LoRA."
        )
    if len(layers) < at_least:
        raise ValueError(
            f"Only one layer of {', '.join(chosen)} carries trainable adapters, and choosing among layers needs at "
            "least 2: put adapters on more layers (target_modules, layers_to_transform), or train this one with "
            "selector='all'."
        )
    return tuple(layers)


def parameters_outside(model: nn.Module, layers: Iterable[Layer]) -> dict[str, nn.Parameter]:
    """The trainable parameters that no layer owns, by name: heads, embeddings, `modules_to_save`, shared banks.

    They train in every step, as they do without this library.
    """
    owned = {id(parameter) for layer in layers for parameter in layer.parameters}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and id(p) not in owned}


def is_adapter(module: nn.Module) -> bool:
    """Whether `module` is an adapter layer, by the protocol of `peft.tuners.tuners_utils.BaseTunerLayer` or AdapterHub.

    Modules that PEFT trains whole (`modules_to_save`, trainable tokens) share some of it but add no response.
    """
    return adapterhub.is_adapter(module) or (
        bool(getattr(module, "adapter_layer_names", ()))
        and hasattr(module, "merged_adapters")
        and not hasattr(module, "original_module")
    )


def find_adapters(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost adapter modules of a model by qualified name."""
    adapters: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        enclosing = (name[:end] for end, sign in enumerate(name) if sign == ".")
        if is_adapter(module) and not any(outer in adapters for outer in enclosing):
            adapters[name] = module
    return adapters


def check_adapters(model: nn.Module, adapters: dict[str, nn.Module]) -> None:
    """Raise ValueError unless the model has adapters that train and none is merged."""
    for config in (getattr(model, "peft_config", None) or {}).values():
        method = str(getattr(config.peft_type, "value", config.peft_type))
        reason = NO_PROMPTS if getattr(config, "is_prompt_learning", False) else NOT_BY_LAYER.get(method)
        if reason:
            raise ValueError(f"{method} {reason}. Use an adapter that works layer by layer, such as LoRA.")
    adapterhub.check_adapters(model)
    if not adapters:
        raise ValueError(
            f"{base_name(model)} has no adapters: wrap it first, for example "
            "get_peft_model(model, LoraConfig(target_modules='all-linear'))."
        )
    merged = [
        name
        for name, module in adapters.items()
        for part in module.modules()
        if is_adapter(part) and getattr(part, "merged", False)
    ]
    if merged:
        raise ValueError(
            f"The adapter in {merged[0]} is merged into its base weights, so its response cannot be trained or "
            "suppressed apart from them: call model.unmerge_adapter() first."
        )
    if not any(parameter.requires_grad for module in adapters.values() for parameter in module.parameters()):
        raise ValueError(
            "No adapter parameter requires a gradient, so there is nothing to train: load the adapter with "
            "is_trainable=True, call model.set_adapter(name), or where adapters are switched off "
            "model.enable_adapter_layers()."
        )


def find_stacks(model: nn.Module, adapters: dict[str, nn.Module], held: int = 2) -> dict[str, nn.Module]:
    """Every list of at least 2 blocks that hold adapters, by qualified name; outer ones come first.

    One adapted block is enough in an `nn.ModuleList`. An `nn.Sequential` needs `held`: with one it may be a stack of
    which the others were left out, but is rather a pipeline.
    """
    parts_with_adapters: set[str] = set()
    for name in adapters:
        parts = name.split(".")
        parts_with_adapters.update(".".join(parts[: end + 1]) for end in range(len(parts)))
    stacks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if name in parts_with_adapters and isinstance(module, (nn.ModuleList, nn.Sequential)):
            adapted = [child for child, _ in module.named_children() if f"{name}.{child}" in parts_with_adapters]
            needed = 1 if isinstance(module, nn.ModuleList) else held
            if len(list(module.children())) >= 2 and len(adapted) >= needed:
                stacks[name] = module
    return stacks


def choose_stacks(
    model: nn.Module, stacks: dict[str, nn.Module], names: str | Sequence[str] | None, what: str = "adapters"
) -> dict[str, nn.Module]:
    """The stacks that `names` means, or the outermost one where it is None; messages say `what` their blocks have."""
    if names is not None:
        return named_stacks(stacks, names, what)
    outermost = {name: s for name, s in stacks.items() if not any(is_inside(name, other) for other in stacks)}
    if not outermost:
        raise ValueError(
            f"Found no stack of at least 2 blocks with adapters in {base_name(model)}, and choosing among layers needs "
            "at least 2 (one that is used for several layers is one block): put adapters on more layers "
            "(target_modules, layers_to_transform), or train without IST."
        )
    if len(outermost) > 1 and not is_encoder_decoder(model):
        raise ValueError(
            f"{what.capitalize()} were found in {len(outermost)} stacks of blocks: {describe_stacks(outermost)}. "
            f"Say which to choose from, as in layers={next(iter(outermost))!r}, or give a list of them."
        )
    return outermost


def named_stacks(stacks: dict[str, nn.Module], names: str | Sequence[str], what: str) -> dict[str, nn.Module]:
    """The stacks whose qualified name, or an end of it, matches one of `names`."""
    check_stack_names(names, f"this model has {describe_stacks(stacks)}")
    patterns = [names] if isinstance(names, str) else list(names)
    chosen: dict[str, nn.Module] = {}
    for pattern in patterns:
        matches = {n: s for n, s in stacks.items() if fnmatch.fnmatchcase(f".{n}", f"*.{pattern}")}
        if not matches:
            raise ValueError(
                f"layers={pattern!r} names no stack of at least 2 blocks with {what}: "
                f"this model has {describe_stacks(stacks) or 'none'}."
            )
        if len(matches) > 1 and "*" not in pattern:
            raise ValueError(
                f"layers={pattern!r} fits {len(matches)} stacks of blocks: {describe_stacks(matches)}. Give one of "
                f"these names in full, a list of them, or '*.{pattern}' for all."
            )
        chosen.update(matches)
    for name in chosen:
        if any(is_inside(name, other) for other in chosen):
            raise ValueError(f"layers={patterns!r} names {name} and a stack around it: name one of the two.")
    return {name: stack for name, stack in stacks.items() if name in chosen}


def make_layer(index: int, name: str, block: nn.Module, adapters: dict[str, nn.Module], shared: set[int]) -> Layer:
    """The layer of one block: its adapters and those of their trainable parameters that are its own."""
    own = adapters_of_block(name, adapters)
    parameters = {
        id(parameter): parameter
        for module in own.values()
        for parameter in module.parameters()
        if parameter.requires_grad and id(parameter) not in shared
    }
    return Layer(index, name, block, own, tuple(parameters.values()))


def without_shared_modules(stacks: dict[str, nn.Module], adapters: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The adapters that stand in at most one block.

    One that several blocks call is no layer's own: it trains at every step and is not suppressed.
    """
    blocks = [block for stack in stacks.values() for _, block in stack.named_children()]
    places = Counter(id(part) for block in blocks for part in block.modules())
    return {name: module for name, module in adapters.items() if places[id(module)] <= 1}


def shared_parameters(stacks: dict[str, nn.Module], adapters: dict[str, nn.Module]) -> set[int]:
    """The ids of adapter parameters that a block shares with another or with an adapter outside of all blocks.

    Freezing one of the owners must not freeze the others.
    """
    blocks = {f"{stack_name}.{name}" for stack_name, stack in stacks.items() for name, _ in stack.named_children()}
    owners: dict[int, set[str]] = {}
    for name, module in adapters.items():
        starts = (name[:end] for end in range(len(name), 0, -1) if end == len(name) or name[end] == ".")
        owner = next((start for start in starts if start in blocks), "outside")
        for parameter in module.parameters():
            owners.setdefault(id(parameter), set()).add(owner)
    return {parameter for parameter, names in owners.items() if len(names) > 1}


def adapters_of_block(block: str, adapters: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The adapters inside the block of this name; the block may be an adapted module itself."""
    return {name: module for name, module in adapters.items() if name == block or is_inside(name, block)}


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model's configuration says that it has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def base_name(model: nn.Module) -> str:
    """The class of the model that PEFT wrapped."""
    return type(base_model(model)).__name__


def is_inside(name: str, outer: str) -> bool:
    """Whether the module `name` lies inside the module `outer`."""
    return name.startswith(f"{outer}.")


def describe_stacks(stacks: dict[str, nn.Module]) -> str:
    """Names and lengths of stacks for a message."""
    return ", ".join(f"{name!r} ({len(list(stack.children()))} blocks)" for name, stack in stacks.items())
