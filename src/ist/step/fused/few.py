"""A LoRA module of few rows without dropout: the same function, with as little Python and as few launches as it takes.

There a step is launch-bound: it waits for the host. Launching a kernel in Triton takes longer than launching a product
of PyTorch's, and choosing how to compute takes time too. With everything in one dtype there is nothing to choose: three
operations forwards and five backwards, to the bits of `function` with PyTorch's operations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from .again import recipe_of
from .products import product, shaped

__all__ = ["few_rows_linear", "has_few_rows"]

MOST_ROWS = 2048
"""Up to how many rows of x this serves; 0 is never."""


def has_few_rows(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether rows are few, and everything is in one dtype.

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
        and x.numel() <= MOST_ROWS * x.shape[-1]
        and a.dtype == dtype
        and b.dtype == dtype
        and weight.dtype == dtype
        and not torch.is_autocast_enabled(x.device.type)
    )


def few_rows_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    scaling: float,
    norms: bool = False,
) -> Tensor:
    """`lora_linear` without dropout, where `has_few_rows` says yes."""
    if torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad):
        return FewRowsLinear.apply(x, weight, bias, a, b, c, scaling, norms)  # type: ignore[return-value]
    return shaped(forward(x.reshape(-1, x.shape[-1]), weight, bias, a, b, c, scaling)[0], x)


def forward(
    inputs: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, c: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """`[rows, out]`, and `x Aᵀ`."""
    rows = linear(inputs, weight, bias)
    h = linear(inputs, a)
    rows.addmm_(h, b.t(), alpha=scaling)
    if c is not None:
        rows.add_(c.to(rows.dtype), alpha=scaling)
    return rows, h


class FewRowsLinear(torch.autograd.Function):
    """`few_rows_linear` with its backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        scaling: float,
        norms: bool,
    ) -> Tensor:
        inputs = x.reshape(-1, x.shape[-1])
        rows, h = forward(inputs, weight, bias, a, b, c, scaling)
        needs_x, _, _, needs_a, needs_b, _, _, _ = ctx.needs_input_grad
        ctx.scaling, ctx.again = scaling, recipe_of(x, norms) if needs_a else None
        kept = inputs if needs_a and ctx.again is None else None
        ctx.save_for_backward(weight if needs_x else None, kept, a, b, h if needs_b else None)
        return shaped(rows, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_autocast_enabled(grad.device.type):  # The forward was without.
            with torch.autocast(grad.device.type, enabled=False):
                return backward(ctx, grad)
        return backward(ctx, grad)


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """The gradients of all arguments."""
    weight, inputs, a, b, h = ctx.saved_tensors
    _, _, _, needs_a, _, needs_c, _, _ = ctx.needs_input_grad
    scaling = ctx.scaling
    dy = grad.reshape(-1, grad.shape[-1])
    dx = da = None
    db = None if h is None else product(dy.t(), h, scaling)
    dc = dy.sum(0).mul_(scaling) if needs_c else None
    if needs_a or weight is not None:
        dh = dy @ b
        if needs_a:
            inputs = inputs if ctx.again is None else ctx.again().reshape(-1, a.shape[1])
            da = product(dh.t(), inputs, scaling)
        if weight is not None:
            dx = (dy @ weight).addmm_(dh, a, alpha=scaling).view(*grad.shape[:-1], a.shape[1])
    return dx, None, None, da, db, dc, None, None
