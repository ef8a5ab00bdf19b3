"""How the products of an adapter are computed: in which precision, by PyTorch's operations or by kernels."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from logging import getLogger
from typing import Any

import torch
from torch import Tensor

from .precision import Plain, Split
from .products import Products

__all__ = ["autocast_dtype", "products", "working_kernels"]

logger = getLogger(__name__)


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
    """The products in own kernels (`ist.step.fused.launch`); None where there are none for this case."""
    if torch.compiler.is_compiling():
        return None
    launch = working_kernels(a.device)
    found = launch and launch.find_kernels(a, autocast, activations)
    if found and launch.is_wide(a.shape[0]) and not working_kernels(a.device, wide=True):
        return None
    return found


OLDEST = (8, 0)
"""Compute capability of the first GPUs whose tensor cores know bfloat16."""


@cache
def working_kernels(device: torch.device, wide: bool = False) -> Any:
    """The module `ist.step.fused.launch`, where Triton is here and can compile for this GPU, or None.

    Args:
        device: a GPU.
        wide: for ranks whose tiles are larger than those of small ranks, and tried out when they are first asked for.
    """
    if torch.version.cuda is None or find_spec("triton") is None:
        return None
    if torch.cuda.get_device_capability(device) < OLDEST:
        return None
    try:
        from . import launch

        launch.try_out(device, wide)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        logger.warning(
            "LoRA's kernels cannot be compiled here (%s), so PyTorch's operations take their place, which is slower: "
            "Triton has to be whole, and needs a C compiler such as gcc.",
            reason,
        )
        return None
    return launch


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of linear products here, or None where it is off."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)
