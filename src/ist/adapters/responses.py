"""What an adapter adds to its layer, and how to scale exactly that by beta.

The *response* of an adapter module is what its output gains over the output of the module that it wraps. Many methods
multiply their response by a factor that PEFT keeps in the module; multiplying that factor is exact and free.
Everywhere else (DoRA, whose factor also enters the weight's norm; IA3; OFT; …) the module is run once more with its
adapters off: `base + β·(full − base)`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import nn

from ..config import Suppression
from . import adapterhub
from .blending import blend

__all__ = ["active_names", "has_exact_factor", "response_factors", "scaled_response"]


@contextmanager
def scaled_response(
    adapter: nn.Module, beta: float, suppression: Suppression = "response"
) -> Iterator[Callable[[], bool]]:
    """Within the context, `adapter` returns `base + β·(full − base)`; afterwards it is as it was.

    Args:
        adapter: an adapter layer of PEFT or AdapterHub, or one with adapter layers inside itself.
        beta: factor on the response of its active adapters, in [0, 1].
        suppression: `response` is the above. `scaling` multiplies the factor `scaling` wherever a module has one, as
            the paper's authors' code does, whether or not the response follows; modules without one follow the above.

    Yields:
        Whether the response was scaled: not where it takes a call of `adapter`, and nobody has called it.
    """
    if beta == 1:
        yield always
        return
    factors, names = response_factors(adapter), active_names(adapter)
    if factors is not None:
        scaled = scaled_factors(factors, beta, names)
    elif adapterhub.is_adapter(adapter):
        scaled = adapterhub.scaled_response(adapter, beta)
    elif suppression == "scaling" and has_factor(adapter):
        scaled = scaled_factors(adapter.scaling, beta, names)  # type: ignore[arg-type]
    else:
        with blended_output(adapter, beta) as was_called:
            yield was_called
        return
    with scaled:
        yield always


def always() -> bool:
    """What reads a factor needs no call."""
    return True


def has_exact_factor(adapter: nn.Module) -> bool:
    """Whether the response of `adapter` is proportional to a factor that it keeps, which makes scaling it free."""
    return response_factors(adapter) is not None


def has_factor(adapter: nn.Module) -> bool:
    """Whether a module keeps a factor by adapter name, proportional to its response or not."""
    return not is_nested(adapter) and isinstance(getattr(adapter, "scaling", None), dict)


def response_factors(adapter: nn.Module) -> dict[str, Any] | None:
    """The factors by adapter name to which a module's response is proportional, or None where there are none.

    Adapter layers outside of PEFT promise it with a true attribute `scaling_is_exact`, as this library's bottleneck
    adapters do.
    """
    if is_nested(adapter):
        return None
    if getattr(adapter, "scaling_is_exact", False):
        return adapter.scaling  # type: ignore[return-value]
    if is_linear_in_factor(adapter):
        for kind, attribute in factor_attributes().items():
            if isinstance(adapter, kind):
                return getattr(adapter, attribute)
    return None


@cache
def factor_attributes() -> dict[type, str]:
    """PEFT's layers whose response is proportional to a factor, and the attribute that holds it.

    `tests/test_tuner_types.py` measures each of them.
    """
    from peft.tuners import fourierft, gralora, lily, loha, lokr, lora, peanut, psoft, randlora, shira, waveft

    return {
        lora.LoraLayer: "scaling",  # AdaLoRA's layers are of this type too.
        loha.LoHaLayer: "scaling",
        lokr.LoKrLayer: "scaling",
        randlora.RandLoraLayer: "scaling",
        shira.ShiraLayer: "scaling",
        gralora.GraloraLayer: "scaling",
        lily.LilyLayer: "scaling",
        peanut.PeanutLayer: "scaling",
        psoft.PsoftLayer: "scaling",
        fourierft.FourierFTLayer: "fourierft_scaling",
        waveft.WaveFTLayer: "waveft_scaling",
    }


def is_linear_in_factor(adapter: nn.Module) -> bool:
    """Whether nothing in a module breaks the proportion that its type promises."""
    from peft.tuners.lora.layer import MultiheadAttention, ParamWrapper

    # These two change weights inside a module whose output is not linear in them.
    if isinstance(adapter, (MultiheadAttention, ParamWrapper)):
        return False
    # DoRA and other variants of LoRA, by the name of the adapter that has them.
    variants = getattr(adapter, "lora_variant", {})
    return not any(name in variants for name in getattr(adapter, "active_adapters", ()))


def is_nested(adapter: nn.Module) -> bool:
    """Whether a module wraps another adapter layer, whose response its own factor does not reach."""
    return hasattr(getattr(adapter, "base_layer", None), "base_layer")


def active_names(adapter: Any) -> list[str] | None:
    """The names of a module's active adapters; None where it does not say.

    A pass with another adapter within the context, as that of TRL's reference, is not suppressed.
    """
    names = getattr(adapter, "active_adapters", None)
    return list(names) if isinstance(names, (list, tuple, set)) else None


@contextmanager
def scaled_factors(factors: dict[str, Any], beta: float, names: Collection[str] | None = None) -> Iterator[None]:
    """Multiply the factors of some adapters, or of all; the very same values come back."""
    before = {name: factor for name, factor in factors.items() if names is None or name in names}
    try:
        for name, factor in before.items():
            factors[name] = factor * beta
        yield
    finally:
        factors.update(before)


@contextmanager
def blended_output(adapter: nn.Module, beta: float) -> Iterator[Callable[[], bool]]:
    """Blend the output with what the module computes with its adapters off; yields whether it was called."""

    names = active_names(adapter)
    called = False

    def blend_with_base(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], full: Any) -> Any:
        nonlocal called
        called = True
        if active_names(module) != names:
            return full
        with disabled(module):
            base = module.forward(*args, **kwargs)
        return blend(base, full, beta)

    handle = adapter.register_forward_hook(blend_with_base, with_kwargs=True)
    try:
        yield lambda: called
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
