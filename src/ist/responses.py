"""What an adapter adds to its layer, and how to scale exactly that by beta.

The *response* of an adapter module is what its output gains over the output of the module that it wraps. In most LoRA
layers the response is proportional to a factor that PEFT keeps in `scaling`, so multiplying that factor is exact and
free. Everywhere else (DoRA, whose `scaling` also enters the weight's norm; IA3; OFT; …) the wrapped module is run once
more: `base + β·(full − base)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper
from torch import Tensor, nn

from . import adapterhub

__all__ = ["has_exact_factor", "scaled_response"]


def has_exact_factor(adapter: nn.Module) -> bool:
    """Whether multiplying `adapter.scaling` by beta multiplies the response by beta.

    True for LoRA without variants (rank-stabilised LoRA and AdaLoRA among it), and for adapter layers that promise it
    with an attribute `scaling_is_exact`, as this library's bottleneck adapters do.
    """
    if not isinstance(getattr(adapter, "scaling", None), dict):
        return False
    if getattr(adapter, "scaling_is_exact", False):
        return True
    # These two change weights inside a module whose output is not linear in them.
    if not isinstance(adapter, LoraLayer) or isinstance(adapter, (MultiheadAttention, ParamWrapper)):
        return False
    return not any(name in adapter.lora_variant for name in adapter.active_adapters)


@contextmanager
def scaled_response(adapter: nn.Module, beta: float) -> Iterator[None]:
    """Within the context, `adapter` returns `base + β·(full − base)`; afterwards it is as it was.

    Args:
        adapter: an adapter layer of PEFT or AdapterHub, or one with adapter layers inside itself.
        beta: factor on the response of its active adapters, in [0, 1].
    """
    wrapped = getattr(adapter, "base_layer", None)
    nested = isinstance(wrapped, nn.Module) and hasattr(wrapped, "base_layer")
    if beta == 1:
        yield
    elif adapterhub.is_adapter(adapter):
        with adapterhub.scaled_response(adapter, beta):
            yield
    elif has_exact_factor(adapter) and not nested:
        with scaled_factor(adapter.scaling, beta):  # type: ignore[arg-type]
            yield
    else:
        with blended_output(adapter, beta):
            yield


@contextmanager
def scaled_factor(scaling: dict[str, Any], beta: float) -> Iterator[None]:
    """Multiply the factors of every adapter name; the very same values come back."""
    before = dict(scaling)
    try:
        for name, factor in before.items():
            scaling[name] = factor * beta
        yield
    finally:
        scaling.update(before)


@contextmanager
def blended_output(adapter: nn.Module, beta: float) -> Iterator[None]:
    """Blend the output with that of the wrapped module, which the module computes with its adapters disabled."""

    def blend(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], full: Any) -> Tensor:
        if not isinstance(full, Tensor):
            raise ValueError(
                f"{type(module).__name__} returns a {type(full).__name__}, not a tensor, so its response cannot be "
                "scaled: use an adapter whose layers return one tensor, such as LoRA on linear modules."
            )
        with disabled(module):
            base = module.forward(*args, **kwargs)
        return base + beta * (full - base)

    handle = adapter.register_forward_hook(blend, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def disabled(adapter: nn.Module) -> Iterator[None]:
    """Switch the adapters in a module off without PEFT's own switch, which also touches `requires_grad`."""
    parts = [module for module in adapter.modules() if hasattr(module, "_disable_adapters")]
    before = [part._disable_adapters for part in parts]
    try:
        for part in parts:
            part._disable_adapters = True  # type: ignore[assignment]
        yield
    finally:
        for part, was_disabled in zip(parts, before, strict=True):
            part._disable_adapters = was_disabled  # type: ignore[assignment]
