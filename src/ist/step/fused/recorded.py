"""A LoRA module of few rows without dropout: three operations, whose backward autograd has by itself.

There a step is launch-bound: it waits for the host. The function of `ist.step.fused.function` then costs more in
Python, and its kernels more to launch, than they save. Without dropout, and with everything in one dtype, autograd
keeps no more than the function does: the input, unless the graph can make it again (`again`), and `x Aᵀ`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .again import Recipe, recipe_of

__all__ = ["is_recorded", "recorded_lora_linear"]

RECORDED_ROWS = 2048
"""Up to how many rows of x autograd records the operations; 0 is never."""


def is_recorded(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether autograd's own operations are faster than the function, and keep no more.

    A graph is the compiler's, and would be another one for another number of rows.

    Args:
        x: `[..., in]`.
        weight: `[out, in]`.
        a: the matrix A.
        b: the matrix B.
    """
    dtype = x.dtype
    return (
        not torch.compiler.is_compiling()
        and x.numel() <= RECORDED_ROWS * x.shape[-1]
        and a.dtype == dtype
        and b.dtype == dtype
        and weight.dtype == dtype
        and not torch.is_autocast_enabled(x.device.type)
    )


def recorded_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, c: Tensor | None, scaling: float
) -> Tensor:
    """`lora_linear` without dropout: PEFT's products, of which the last is scaled and added in one operation."""
    shape = x.shape
    inputs = x if len(shape) == 2 else x.reshape(-1, shape[-1])
    rows = linear(inputs, weight, bias)
    again = recipe_of(x) if a.requires_grad and torch.is_grad_enabled() else None
    h = linear(inputs, a) if again is None else linear_of_product(inputs, a, again)
    rows.addmm_(h, b.t(), alpha=scaling)
    if c is not None:
        rows.add_(c, alpha=scaling)
    # No view, so that the model may change it in place.
    return rows if len(shape) == 2 else torch.ops.aten._unsafe_view(rows, (*shape[:-1], rows.shape[-1]))


def linear_of_product(inputs: Tensor, a: Tensor, again: Recipe) -> Tensor:
    """`x Aᵀ`, which keeps how to make x in the place of x.

    Args:
        inputs: x as `[rows, in]`.
        a: the matrix A.
        again: makes x.
    """
    place, shape, version = inputs.data_ptr(), inputs.shape, a._version

    def pack(kept: Tensor) -> Any:
        return again if kept.data_ptr() == place else kept

    def unpack(kept: Any) -> Tensor:
        if not isinstance(kept, Tensor):
            return kept().reshape(shape)
        if kept._version != version:  # Autograd does not look where hooks have packed something.
            raise RuntimeError("The matrix A of an adapter was changed in place between a forward and its backward.")
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return linear(inputs, a)
