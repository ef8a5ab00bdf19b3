"""What a PEFT configuration would adapt in a model: names, ranks and sizes, found without memory for either.

PEFT itself puts the adapters into a copy of the model without weights (on PyTorch's `meta` device), so whatever a
configuration means, here and in training it means the same. The model is not touched.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..runtime.randomness import private_randomness
from ..runtime.sharding import sharded_units
from .layers import discover_layers, find_adapters

__all__ = ["AdaptedModule", "Outline", "adapted_modules", "outline"]

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's modules."""


@dataclass(frozen=True)
class AdaptedModule:
    """A module that gets an adapter."""

    name: str
    """Qualified name in the model."""
    layer: int | None
    """Which of the outline's layers holds it, from 0; None outside of them."""
    rank: int | None
    """Rank of its adapter; None for kinds without one."""
    alpha: float | None
    """Alpha of its adapter, likewise."""
    num_parameters: int
    """What trains in it."""
    largest_rank: int
    """The smaller side of its weight; a higher rank expresses nothing more."""


@dataclass(frozen=True)
class Outline:
    """The layers of a model and the modules that a configuration adapts in it."""

    layers: tuple[str, ...]
    """Qualified names of the blocks that get adapters, in the order of the forward pass."""
    modules: tuple[AdaptedModule, ...]
    """In the order of the model."""
    target_modules: tuple[str, ...] | str | None
    """The configuration's, as PEFT completed it: ends of names, or a regular expression."""

    def of_layer(self, layer: int | None) -> list[AdaptedModule]:
        """The modules of one layer, or those outside of all."""
        return [module for module in self.modules if module.layer == layer]

    @property
    def num_parameters(self) -> int:
        """What trains in the adapters of all layers."""
        return sum(module.num_parameters for module in self.modules if module.layer is not None)


def outline(model: nn.Module, peft_config: Any, layers: str | Sequence[str] | None = None) -> Outline:
    """What `get_peft_model(model, peft_config)` would adapt.

    Args:
        model: without adapters.
        peft_config: of a method that works layer by layer; not changed.
        layers: the stack of blocks, where the model has several: see `discover_layers`.

    Raises:
        ValueError: the configuration fits no module, or no layer by layer method, or is of adapters that cannot be
            known or moved; or the model has adapters already.
    """
    check_moves(peft_config)
    adapted = adapt_weightless(model, peft_config)
    check_modules(find_adapters(adapted))
    found = discover_layers(adapted, layers)
    of_layer = {name: layer.index for layer in found for name in layer.adapters}
    completed = getattr(adapted.peft_config["default"], "target_modules", None)
    return Outline(
        layers=tuple(layer.name.removeprefix(PREFIX) for layer in found),
        modules=tuple(describe_all(adapted, of_layer)),
        target_modules=completed if completed is None or isinstance(completed, str) else tuple(sorted(completed)),
    )


def adapted_modules(model: nn.Module, peft_config: Any) -> list[AdaptedModule]:
    """The modules that `get_peft_model(model, peft_config)` would adapt, in layers or not.

    Raises:
        ValueError: as `outline`.
    """
    return describe_all(adapt_weightless(model, peft_config), {})


def check_moves(peft_config: Any) -> None:
    """Raise ValueError where a configuration makes layers that the model does not have yet."""
    if getattr(peft_config, "layer_replication", None):
        raise ValueError(
            f"layer_replication={peft_config.layer_replication} makes layers when the adapters are made, and layers "
            "are chosen before: leave it out, or name the layers yourself in layers_to_transform."
        )


def check_modules(adapters: Mapping[str, nn.Module]) -> None:
    """Raise ValueError where an adapter is on a parameter, of which a module may hold several, as experts do."""
    if name := next((name for name, module in adapters.items() if hasattr(module, "parameter_name")), None):
        raise ValueError(
            f"The configuration puts an adapter on a parameter of {name.removeprefix(PREFIX)} (target_parameters), "
            "whose gradient is not measured and whose rank is not moved: leave target_parameters out, or choose layers "
            "yourself by the full names of their parameters."
        )


def adapt_weightless(model: nn.Module, peft_config: Any) -> Any:
    """A PEFT model without weights."""
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise ValueError(
            f"peft_config is a {type(peft_config).__name__}: give the configuration that get_peft_model would take, "
            "such as LoraConfig(r=32, target_modules='all-linear')."
        )
    if find_adapters(model):
        raise ValueError(
            "The model has adapters already, and layers are chosen before: give the base model (of a PEFT model, "
            "peft_model.unload() returns it)."
        )
    empty = weightless(model)
    with private_randomness(0), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # What PEFT has to say it says when the adapters are made.
        try:
            return get_peft_model(empty, with_plain_start(peft_config))  # type: ignore[arg-type]
        except NotImplementedError as error:  # A tensor without memory has no values.
            raise ValueError(
                f"{type(peft_config).__name__} makes its adapters from the values of the weights, so what it would "
                "adapt is not known before: choose layers with another configuration on the same modules, such as "
                "LoraConfig, and give the result as layers_to_transform."
            ) from error


def weightless(model: nn.Module) -> nn.Module:
    """A copy of a model whose weights have shapes and no memory; quantised linear modules become plain ones.

    Of a model under FSDP2 it is a copy of the model before `fully_shard`, with weights of full shape.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        if is_quantised_linear(module):
            memo[id(module)] = nn.Linear(
                int(module.in_features),  # type: ignore[arg-type]
                int(module.out_features),  # type: ignore[arg-type]
                bias=getattr(module, "bias", None) is not None,
                device="meta",
            )
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(
            torch.empty(parameter.shape, dtype=parameter.dtype, device="meta"), requires_grad=parameter.requires_grad
        )
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    units = sharded_units(model)
    for unit in units:
        kind: Any = type(unit).__mro__[2]  # FSDP2 derives a class of its own from FSDPModule and the module's.
        memo[id(unit)] = kind.__new__(kind)
        memo[id(unit._get_fsdp_state())] = object()  # type: ignore[operator]  # Holds groups, which have no copy.
    for unit in units:
        memo[id(unit)].__dict__.update(copy.deepcopy(unit.__dict__, memo))
    return copy.deepcopy(model, memo)


def is_quantised_linear(module: nn.Module) -> bool:
    """Whether a module is linear and its weight is stored as something else than a matrix of floats."""
    sides = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if not all(isinstance(side, int) for side in sides):
        return False
    weight = getattr(module, "weight", None)
    return (
        not isinstance(weight, torch.Tensor)
        or type(weight) is not nn.Parameter
        or not weight.is_floating_point()
        or weight.dtype.itemsize == 1
    )


def with_plain_start(peft_config: Any) -> Any:
    """A copy of a configuration that needs no weights to start from (PiSSA and others decompose them)."""
    plain = copy.deepcopy(peft_config)
    if hasattr(plain, "init_lora_weights"):
        plain.init_lora_weights = True
    return plain


def describe_all(adapted: nn.Module, of_layer: Mapping[str, int]) -> list[AdaptedModule]:
    """What is known of the adapted modules of a PEFT model without weights; `of_layer` is by their names in it."""
    adapters = find_adapters(adapted)
    uses = Counter(id(parameter) for module in adapters.values() for parameter in module.parameters())
    return [describe(name, module, of_layer.get(name), uses) for name, module in adapters.items()]


def describe(name: str, module: nn.Module, layer: int | None, uses: Mapping[int, int]) -> AdaptedModule:
    """What is known of an adapted module whose weights are shapes. What several modules share (by `uses`) is part of
    none, as VB-LoRA's vectors are.
    """
    counters = getattr(module, "other_param_names", ())  # Such as AdaLoRA's, which trains nothing.
    trained = sum(
        parameter.numel()
        for own, parameter in module.named_parameters()
        if parameter.requires_grad and uses[id(parameter)] == 1 and own.partition(".")[0] not in counters
    )
    weight = base_weight(module)
    sides = (weight.shape[0], math.prod(weight.shape[1:])) if weight is not None else (1,)
    return AdaptedModule(
        name=name.removeprefix(PREFIX),
        layer=layer,
        rank=setting(module, "r", "bottleneck_size"),
        alpha=setting(module, "lora_alpha", "alpha"),
        num_parameters=trained,
        largest_rank=min(sides),
    )


def setting(module: nn.Module, *names: str) -> Any:
    """The value that an adapter module keeps under one of `names` for its only adapter; None where it has none."""
    for name in names:
        kept = getattr(module, name, None)
        if isinstance(kept, dict) and kept:
            return next(iter(kept.values()))
    return None


def base_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of the module that an adapter wraps."""
    base: Any = module
    while hasattr(base, "base_layer"):
        base = base.base_layer
    weight = getattr(base, "weight", None)
    return weight if isinstance(weight, torch.Tensor) and weight.ndim >= 2 else None
