"""LoRA on a linear module in one operation: `y = x Wᵀ + b + s (D(x) Aᵀ) Bᵀ`, with D the adapter's dropout.

Autograd's own graph of the same expression keeps the input in two precisions, the dropped-out input, its mask and the
adapter's output of every module, frozen or not. Here nothing is kept where A and B are frozen, and the input alone
where they train (q, k and v share it: it is the same tensor), unless the graph can make it again (`again`); the mask is
drawn again in the backward from the generator's state. The adapter's product is added to the base product in place, in
both directions, so it makes no tensor of the output's size.

Shapes: x `[..., in]`, W `[out, in]`, b `[out]`, A `[r, in]`, B `[out, r]`, C `[out]` (a bias of B), y `[..., out]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .again import recipe_of
from .choice import autocast_dtype, products
from .products import Products, shaped

__all__ = ["lora_linear", "lora_update", "unflatten"]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    scaling: float,
    dropout: float,
    norms: bool = False,
) -> Tensor:
    """LoRA and the frozen linear module under it, equation 12 of the paper; `norms` is as in `recipe_of`."""
    if torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad):
        return LoraLinear.apply(x, weight, bias, a, b, c, scaling, dropout, norms)  # type: ignore[return-value]
    return forward(x, weight, bias, a, b, c, scaling, dropout)[0]


def lora_update(
    base: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    scaling: float,
    dropout: float,
    norms: bool = False,
) -> Tensor:
    """LoRA alone, added to what any module under it returned; its gradient joins that of the module."""
    return LoraUpdate.apply(base, x, a, b, c, scaling, dropout, norms)  # type: ignore[return-value]


class LoraLinear(torch.autograd.Function):
    """`lora_linear` with its backward."""

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
        dropout: float,
        norms: bool,
    ) -> Tensor:
        y, kind, drawn = forward(x, weight, bias, a, b, c, scaling, dropout)
        needs_x, _, _, *needs, _, _, _ = ctx.needs_input_grad
        kept = keep(ctx, needs, kind, x, a, b, scaling, dropout, drawn, norms)
        ctx.save_for_backward(weight if needs_x else None, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, *kept = ctx.saved_tensors
        dx, da, db, dc = lora_backward(ctx, grad.reshape(-1, grad.shape[-1]), weight, weight is not None, kept)
        return unflatten(ctx, dx, grad), None, None, da, db, dc, None, None, None


class LoraUpdate(torch.autograd.Function):
    """`lora_update` with its backward."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        scaling: float,
        dropout: float,
        norms: bool,
    ) -> Tensor:
        y = base.clone(memory_format=torch.contiguous_format)  # Some modules return views, which must stay untouched.
        kind = products(a, autocast_dtype(x), x.dtype, y.dtype)
        drawn = kind.down(x.reshape(-1, x.shape[-1]), a, dropout)
        rows = y.view(-1, y.shape[-1])
        kind.add_up_(rows, drawn[0], b, scaling * kind.rest(dropout))
        add_bias_(kind, rows, c, scaling)
        needs = ctx.needs_input_grad[2:5]
        ctx.save_for_backward(*keep(ctx, needs, kind, x, a, b, scaling, dropout, drawn, norms))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dy = grad.reshape(-1, grad.shape[-1])
        dx, da, db, dc = lora_backward(ctx, dy, None, ctx.needs_input_grad[1], ctx.saved_tensors)
        dbase = grad if ctx.needs_input_grad[0] else None
        return dbase, unflatten(ctx, dx, grad), da, db, dc, None, None, None


Drawn = tuple[Tensor, Tensor | None, Any]
"""`D(x) Aᵀ`, and of the dropout its mask or what it was drawn from."""


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    scaling: float,
    dropout: float,
) -> tuple[Tensor, Products, Drawn]:
    """y, in autocast's precision where it is on; how the adapter's products are computed; and what they leave."""
    kind = products(a, autocast_dtype(x), x.dtype)
    inputs = x.reshape(-1, x.shape[-1])
    if kind.autocast is not None:
        inputs, weight = inputs.to(kind.autocast), weight.to(kind.autocast)
        bias = None if bias is None else bias.to(kind.autocast)
    drawn = kind.down(inputs, a, dropout)
    rows = kind.output(inputs, weight, bias, drawn[0], b, scaling * kind.rest(dropout))
    add_bias_(kind, rows, c, scaling)
    return shaped(rows, x), kind, drawn


def add_bias_(kind: Products, rows: Tensor, c: Tensor | None, scaling: float) -> None:
    """`y += s C`."""
    if c is not None:
        rows.add_(c.to(kind.dtype), alpha=scaling)


def keep(
    ctx: Any,
    needs: Any,
    kind: Products,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropout: float,
    drawn: Drawn,
    norms: bool,
) -> tuple[Tensor | None, ...]:
    """What the backward needs: nothing of the activations where nothing trains, nor where they can be made again."""
    h, mask, drawn_from = drawn
    needs_a, needs_b, _ = needs
    ctx.needs, ctx.autocast, ctx.x_dtype = needs, kind.autocast, x.dtype
    ctx.scaling, ctx.dropout, ctx.drawn_from = scaling, dropout, drawn_from
    ctx.again = recipe_of(x, norms) if needs_a else None
    kept = x.reshape(-1, x.shape[-1]) if needs_a and ctx.again is None else None
    return kept, mask, h if needs_b else None, a, b


def lora_backward(
    ctx: Any, dy: Tensor, weight: Tensor | None, needs_x: bool, kept: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x (with that of the linear module, if its weight is given), A, B and C from that of y,
    `[rows, out]`.
    """
    x, mask, h, a, b = kept
    if ctx.again is not None:
        x = ctx.again().reshape(-1, a.shape[1])
    needs_a, needs_b, needs_c = ctx.needs
    kind, dropout = products(a, ctx.autocast, ctx.x_dtype, dy.dtype), ctx.dropout
    scaling = ctx.scaling * kind.rest(dropout)
    da = db = dc = None
    if needs_b:
        db = kind.grad_of_b(dy, h, scaling)
    if needs_c:
        dc = dy.to(kind.dtype).sum(0).mul_(ctx.scaling)
    if not needs_x and not needs_a:
        return None, None, db, dc
    dh = kind.grad_of_h(dy, b)
    inputs, mask = kind.drop_again(
        x, dropout, mask, ctx.drawn_from, lambda: dy.new_empty(len(dy), a.shape[1], dtype=ctx.x_dtype)
    )
    if needs_a:
        da = kind.grad_of_a(dh, inputs, mask, scaling)
    if not needs_x:
        return None, da, db, dc
    if weight is None:
        return kind.grad_of_x(dh, a, mask, dropout, scaling), da, db, dc
    return kind.input_grad(dy, weight.to(dy.dtype), dh, a, mask, dropout, scaling), da, db, dc


def unflatten(ctx: Any, dx: Tensor | None, like: Tensor) -> Tensor | None:
    """The gradient of x in its shape and dtype."""
    if dx is None:
        return None
    dx = dx.view(*like.shape[:-1], dx.shape[-1])
    return dx if dx.dtype == ctx.x_dtype else dx.to(ctx.x_dtype)
