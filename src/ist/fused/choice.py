"""How the products of an adapter are computed: in which precision, by PyTorch's operations or by kernels."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .precision import Plain, Split
from .products import Products

__all__ = ["autocast_dtype", "products"]


def products(a: Tensor, autocast: torch.dtype | None, *activations: torch.dtype) -> Products:
    """How to compute.

    Args:
        a: the matrix A.
        autocast: what `autocast_dtype` says.
        activations: dtypes of x and y.
    """
    if a.is_cuda and (found := in_kernels(a, autocast, activations)):
        return found
    if autocast is not None:
        return Plain(autocast, autocast, a.dtype)
    if a.is_cuda and a.dtype == torch.float32 and all(dtype == torch.bfloat16 for dtype in activations):
        return Split()
    return Plain(None, a.dtype, a.dtype)


def in_kernels(a: Tensor, autocast: torch.dtype | None, activations: tuple[torch.dtype, ...]) -> Products | None:
    """The products in own kernels (`ist.fused.launch`); None where there are none for this case."""
    if torch.compiler.is_compiling() or not have_kernels():
        return None
    from .launch import find_kernels

    return find_kernels(a, autocast, activations)


@cache
def have_kernels() -> bool:
    """Whether Triton is here, for the kind of GPU that it is used on."""
    return find_spec("triton") is not None and torch.version.cuda is not None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of linear products here, or None where it is off."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)
