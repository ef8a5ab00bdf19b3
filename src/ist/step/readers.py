"""Modules that may compute with the weights of the adapters in them, and never call these.

Unsloth and Axolotl replace the forwards of attention and MLP by kernels that read `proj.lora_A[...].weight`. What
freezes an adapter around its own forward does nothing there: frozen layers would have gradients, which cost time and
memory, and which count in the norm that gradients are clipped by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from ..adapters.layers import Layer
from ..runtime.wrappers import compiled_call, within_fsdp

__all__ = ["adapter_readers"]

CALLERS = {"torch", "transformers", "peft", "accelerate", "liger_kernel", "ist"}
"""Packages whose forwards call the modules that they hold."""


def adapter_readers(layer: Layer) -> list[nn.Module]:
    """The modules with adapters of the layer in which another tool has replaced the forward, or a part of it."""
    adapters = set(layer.adapters.values())
    return [module for module in holders(within_fsdp(layer.module), adapters) if is_replaced(module)]


def holders(module: nn.Module, adapters: set[nn.Module]) -> Iterator[nn.Module]:
    """`module` and those in it that hold some of the adapters, without the adapters themselves."""
    if module in adapters or adapters.isdisjoint(module.modules()):
        return
    yield module
    for child in module.children():
        yield from holders(child, adapters)


def is_replaced(module: nn.Module) -> bool:
    """Whether a function of another package computes for a module, in the place of its class's forward or within it."""
    if compiled_call(module):
        return False
    kind = type(module)
    owner = next((one for one in kind.__mro__ if "forward" in vars(one)), kind)
    if package(kind.forward) not in CALLERS | {package(owner)}:
        return True
    for name, value in vars(module).items():
        if not isinstance(value, (FunctionType, MethodType, partial)) or package(value) in CALLERS:
            continue
        is_own = (
            getattr(value, "__func__", None) is kind.forward if name == "forward" else package(value) == package(kind)
        )
        if not is_own:
            return True
    return False


def package(item: Callable[..., Any] | type) -> str:
    """The package that something was defined in."""
    while isinstance(item, partial):
        item = item.func
    return str(getattr(item, "__module__", None)).partition(".")[0]
