"""What a model or a block may be wrapped in (DDP, FSDP1, `torch.compile`, PEFT), and how to come to what is inside."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = ["base_model", "compiled_call", "is_ddp", "unwrap", "within_fsdp"]

COMPILED = "_orig_mod"
"""Where `torch.compile(module)` keeps the module."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside of DistributedDataParallel and `torch.compile`, whichever is outside; adapters stay on it.

    FSDP's wrapper stays too: a forward has to go through it, since it gathers the weights.
    """
    return list(wrapping(model))[-1]


def base_model(model: Any) -> Any:
    """The model that the user loaded: inside of every wrapper, PEFT's too. Adapters that are put into a model, as
    AdapterHub's are, leave it the model that it is.
    """
    model = within_fsdp(unwrap(model))
    get_base_model: Any = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def is_ddp(model: nn.Module) -> bool:
    """Whether DistributedDataParallel is among the wrappers of a model."""
    return any(isinstance(part, DistributedDataParallel) for part in wrapping(model))


def wrapping(model: nn.Module) -> Iterator[nn.Module]:
    """A model and, one after the other, what DistributedDataParallel or `torch.compile` wraps."""
    inner: nn.Module | None = model
    while inner is not None:
        yield inner
        modules = getattr(inner, "_modules", {})
        inner = inner.module if isinstance(inner, DistributedDataParallel) else modules.get(COMPILED)


def within_fsdp(module: nn.Module) -> nn.Module:
    """What FSDP1 wraps, which gathers the weights for all that is computed within its forward; else the module."""
    return getattr(module, "_modules", {}).get("_fsdp_wrapped_module") or module


def compiled_call(block: nn.Module) -> str | None:
    """The attribute that calls a block which `block.compile()` or `torch.compile(block)` compiled; None for others."""
    if block._compiled_call_impl is not None:
        return "_compiled_call_impl"
    return "forward" if COMPILED in block._modules else None
