"""Evaluation mode that is undone exactly, and batches moved to a device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["evaluation_mode", "to_device"]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within the context every module evaluates (no dropout) and nothing is cached for generation; afterwards each is
    in the mode that it was in.

    A 4-bit module of bitsandbytes is in training meanwhile: it computes the same in both modes, but on some CPUs it
    repacks its weight at its first evaluation, and no gradient comes through it from then on.
    """
    # Straight from the instances: a module's own walk, and search for its attributes, take as long as a small forward.
    modules = all_modules(model)
    training = [module for module in modules if module.training]
    configs = {id(config): config for module in modules if (config := module.__dict__.get("config")) is not None}
    caching = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    own = [module for module in training if has_own_evaluation(module)]
    repacking = [module for module in modules if type(module).__name__ == "Linear4bit"]
    evaluating = [module for module in repacking if not module.training]
    try:
        for config in caching:
            config.use_cache = False
        if own:
            model.eval()
        else:
            for module in training:
                module.__dict__["training"] = False
        for module in repacking:
            module.training = True
        yield
    finally:
        for module in evaluating:
            module.training = False
        for module in own:
            module.train()
        if own:
            trained = set(map(id, training))
            for module in modules:
                module.training = id(module) in trained
        else:
            for module in training:
                module.__dict__["training"] = True
        for config in caching:
            config.use_cache = True


def all_modules(model: nn.Module) -> list[nn.Module]:
    """A module and all within it, each once."""
    found = {id(model): model}
    waiting = [model]
    while waiting:
        for child in waiting.pop().__dict__["_modules"].values():
            if child is not None and id(child) not in found:
                found[id(child)] = child
                waiting.append(child)
    return list(found.values())


def has_own_evaluation(module: nn.Module) -> bool:
    """Whether evaluation is more to a module than a flag, such as merged weights."""
    if "training" not in module.__dict__:
        return True
    train = type(module).train
    if train.__qualname__ == "PreTrainedModel.train":  # which renews kernels of a hub, where a model has them
        return bool(getattr(module, "use_kernels", False))
    return train is not nn.Module.train


def to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors in nested mappings and sequences to a device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(to_device(item, device) for item in value))
    if isinstance(value, (list, tuple)):
        return type(value)(to_device(item, device) for item in value)
    return value
