"""LoRA on a linear module as one function: `y = x Wᵀ + b + s (D(x) Aᵀ) Bᵀ`, with D the adapter's dropout.

Autograd's own graph of the same expression keeps the input in two precisions, the dropped-out input, its mask and the
adapter's output of every module, frozen or not. Here nothing is kept where A and B are frozen, and the input alone
where they train (q, k and v share it: it is the same tensor); the mask is drawn again in the backward from the
generator's state. The adapter's product is added to the base product in place, in both directions, so it makes no
tensor of the output's size.

Shapes: x `[..., in]`, W `[out, in]`, b `[out]`, A `[r, in]`, B `[out, r]`, C `[out]` (a bias of B), y `[..., out]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from .precision import Products, autocast_dtype, products

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
) -> Tensor:
    """LoRA and the frozen linear module under it."""
    if torch.is_grad_enabled() and (x.requires_grad or a.requires_grad or b.requires_grad):
        return LoraLinear.apply(x, weight, bias, a, b, c, scaling, dropout)  # type: ignore[return-value]
    y, kind = base_product(x, weight, bias, a)
    add_lora_(kind, y, x, a, b, c, scaling, dropout)
    return y


def lora_update(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor | None, scaling: float, dropout: float
) -> Tensor:
    """LoRA alone, added to what any module under it returned; its gradient joins that of the module."""
    return LoraUpdate.apply(base, x, a, b, c, scaling, dropout)  # type: ignore[return-value]


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
    ) -> Tensor:
        y, kind = base_product(x, weight, bias, a)
        drawn = add_lora_(kind, y, x, a, b, c, scaling, dropout)
        needs_x, _, _, *needs, _, _ = ctx.needs_input_grad
        ctx.save_for_backward(weight if needs_x else None, *keep(ctx, needs, kind, x, a, b, scaling, dropout, drawn))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, *kept = ctx.saved_tensors
        dy = grad.reshape(-1, grad.shape[-1])
        dx = None
        if weight is not None:
            dx = dy @ (weight if weight.dtype == dy.dtype else weight.to(dy.dtype))
        dx, da, db, dc = lora_backward(ctx, dy, dx, ctx.needs_input_grad[0], kept)
        return unflatten(ctx, dx, grad), None, None, da, db, dc, None, None


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
    ) -> Tensor:
        y = base.clone(memory_format=torch.contiguous_format)  # Some modules return views, which must stay untouched.
        kind = products(a, autocast_dtype(x), x.dtype, y.dtype)
        drawn = add_lora_(kind, y, x, a, b, c, scaling, dropout)
        ctx.save_for_backward(*keep(ctx, ctx.needs_input_grad[2:5], kind, x, a, b, scaling, dropout, drawn))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dy = grad.reshape(-1, grad.shape[-1])
        dx, da, db, dc = lora_backward(ctx, dy, None, ctx.needs_input_grad[1], ctx.saved_tensors)
        return grad if ctx.needs_input_grad[0] else None, unflatten(ctx, dx, grad), da, db, dc, None, None


def base_product(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor) -> tuple[Tensor, Products]:
    """`x Wᵀ + b`, in autocast's precision where it is on, and how the adapter's products are to be computed."""
    kind = products(a, autocast_dtype(x), x.dtype)
    if kind.autocast is not None:
        x, weight = x.to(kind.autocast), weight.to(kind.autocast)
        bias = None if bias is None else bias.to(kind.autocast)
    return linear(x, weight, bias), kind


Drawn = tuple[Tensor, Tensor | None, Any]
"""`D(x) Aᵀ`, and of the dropout its mask or the generator's state that it was drawn with."""


def add_lora_(
    kind: Products,
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    scaling: float,
    dropout: float,
) -> Drawn:
    """`y += s (D(x) Aᵀ) Bᵀ + s C` in place."""
    inputs, mask, state = x.reshape(-1, x.shape[-1]), None, None
    if dropout:
        if torch.compiler.is_compiling():  # A generator's state cannot be read in a graph: the mask is kept.
            inputs, mask = kind.drop(inputs, dropout)
        else:
            state = rng_state(x.device)
            inputs = kind.drop(inputs, dropout)[0]
    h = kind.down(inputs, a)
    rows = y.view(-1, y.shape[-1])
    kind.add_up_(rows, h, b, scaling * kind.rest(dropout))
    if c is not None:
        rows.add_(c.to(kind.dtype), alpha=scaling)
    return h, mask, state


def keep(
    ctx: Any, needs: Any, kind: Products, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout: float, drawn: Drawn
) -> tuple[Tensor | None, ...]:
    """What the backward needs: nothing of the activations where nothing trains."""
    h, mask, state = drawn
    needs_a, needs_b, _ = needs
    ctx.needs, ctx.autocast, ctx.x_dtype = needs, kind.autocast, x.dtype
    ctx.scaling, ctx.dropout, ctx.rng_state = scaling, dropout, state
    return x.reshape(-1, x.shape[-1]) if needs_a else None, mask, h if needs_b else None, a, b


def lora_backward(
    ctx: Any, dy: Tensor, dx: Tensor | None, needs_x: bool, kept: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x (added to `dx` in place, if it is there), A, B and C from that of y, `[rows, out]`."""
    x, mask, h, a, b = kept
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
    inputs = x
    if mask is not None:
        inputs = None if x is None else kind.mask(x, mask, dropout)
    elif dropout:
        like = dy.new_empty(dy.shape[0], a.shape[1], dtype=ctx.x_dtype) if x is None else x
        inputs, mask = dropped_again(kind, like, dropout, ctx.rng_state)
    if needs_a:
        da = kind.grad_of_a(dh, inputs, scaling)  # type: ignore[arg-type]
    if not needs_x:
        return None, da, db, dc
    if mask is None and dx is not None:
        kind.add_grad_of_x_(dx, dh, a, scaling)
        return dx, da, db, dc
    through_lora = kind.grad_of_x(dh, a, scaling)
    if mask is not None:
        through_lora = kind.mask(through_lora, mask, dropout)
    return through_lora if dx is None else dx.add_(through_lora), da, db, dc


def unflatten(ctx: Any, dx: Tensor | None, like: Tensor) -> Tensor | None:
    """The gradient of x in its shape and dtype."""
    if dx is None:
        return None
    dx = dx.view(*like.shape[:-1], dx.shape[-1])
    return dx if dx.dtype == ctx.x_dtype else dx.to(ctx.x_dtype)


def rng_state(device: torch.device) -> Tensor:
    """The state of the generator that dropout draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_rng_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def dropped_again(kind: Products, x: Tensor, dropout: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same draw of dropout as in the forward, and its mask; the generator goes on from where it was."""
    now = rng_state(x.device)
    set_rng_state(state, x.device)
    try:
        return kind.drop(x, dropout)
    finally:
        set_rng_state(now, x.device)
