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

__all__ = ["LoraLinear", "LoraUpdate"]


class LoraLinear(torch.autograd.Function):
    """LoRA and the frozen linear module under it."""

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
        dtype = autocast_dtype(x)
        base_input, base_weight, base_bias = cast(dtype, x, weight, bias)
        y = linear(base_input, base_weight, base_bias)  # type: ignore[arg-type]
        ctx.dtype = dtype
        kept = add_lora_(ctx, y, x, a, b, c, scaling, dropout)
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, *kept = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        dx = flat @ weight.to(flat.dtype) if ctx.needs_input_grad[0] else None
        dx, da, db, dc = lora_backward(ctx, flat, dx, ctx.needs_input_grad[0], kept)
        dx = None if dx is None else dx.view(*grad.shape[:-1], -1).to(ctx.x_dtype)
        return dx, None, None, da, db, dc, None, None


class LoraUpdate(torch.autograd.Function):
    """LoRA alone, added to what any module under it returned; its gradient joins that of the module."""

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
        ctx.dtype = autocast_dtype(x)
        y = base.clone(memory_format=torch.contiguous_format)  # Some modules return views, which must stay untouched.
        ctx.save_for_backward(*add_lora_(ctx, y, x, a, b, c, scaling, dropout))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        flat = grad.reshape(-1, grad.shape[-1])
        dx, da, db, dc = lora_backward(ctx, flat, None, ctx.needs_input_grad[1], ctx.saved_tensors)
        dx = None if dx is None else dx.view(*grad.shape[:-1], -1).to(ctx.x_dtype)
        return grad if ctx.needs_input_grad[0] else None, dx, da, db, dc, None, None


def add_lora_(
    ctx: Any,
    y: Tensor,
    x: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor | None,
    scaling: float,
    dropout: float,
) -> tuple[Tensor | None, ...]:
    """`y += s (D(x) Aᵀ) Bᵀ + s C` in place; returns what the backward needs."""
    dtype = ctx.dtype or a.dtype
    flat = x.reshape(-1, x.shape[-1])
    ctx.scaling, ctx.dropout, ctx.x_dtype, ctx.in_features = scaling, dropout, x.dtype, x.shape[-1]
    ctx.rng_state, mask = None, None
    inputs = flat.to(dtype)
    if dropout:
        if torch.compiler.is_compiling():  # A generator's state cannot be read in a graph: the mask is kept.
            inputs, mask = torch.native_dropout(inputs, dropout, True)
        else:
            ctx.rng_state = rng_state(x.device)
            inputs = torch.native_dropout(inputs, dropout, True)[0]
    a_cast, b_cast, c_cast = cast(dtype, a, b, c)
    h = inputs @ a_cast.t()  # type: ignore[union-attr]
    rows = y.view(-1, y.shape[-1])
    if rows.dtype == dtype:
        rows.addmm_(h, b_cast.t(), alpha=scaling)  # type: ignore[union-attr]
    else:
        rows.add_(h @ b_cast.t(), alpha=scaling)  # type: ignore[union-attr]
    if c_cast is not None:
        rows.add_(c_cast, alpha=scaling)
    needs_a, needs_b, _ = needed(ctx)
    return flat if needs_a else None, mask, h if needs_b else None, a, b


def lora_backward(
    ctx: Any, grad: Tensor, dx: Tensor | None, needs_x: bool, kept: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x (added to `dx` in place, if it is there), A, B and C from that of y, `[rows, out]`."""
    x, mask, h, a, b = kept
    needs_a, needs_b, needs_c = needed(ctx)
    dtype = ctx.dtype or a.dtype
    a_cast, b_cast, dy = cast(dtype, a, b, grad)
    da = db = dc = None
    if needs_b:
        db = scaled_product(dy.t(), h, ctx.scaling).to(b.dtype)  # type: ignore[union-attr]
    if needs_c:
        dc = dy.sum(0).mul_(ctx.scaling)  # type: ignore[union-attr]
    if not needs_x and not needs_a:
        return None, None, db, dc
    dh = dy @ b_cast  # type: ignore[operator]
    inputs = x if x is None else x.to(dtype)
    scale = 1 / (1 - ctx.dropout)
    if mask is not None:
        inputs = inputs if inputs is None else torch.ops.aten.native_dropout_backward(inputs, mask, scale)
    elif ctx.dropout:
        like = dh.new_empty(dh.shape[0], ctx.in_features) if inputs is None else inputs
        inputs, mask = dropped_again(like, ctx.dropout, ctx.rng_state)
    if needs_a:
        da = scaled_product(dh.t(), inputs, ctx.scaling).to(a.dtype)  # type: ignore[operator]
    if not needs_x:
        return None, da, db, dc
    if mask is None and dx is not None and dx.dtype == dtype:
        return dx.addmm_(dh, a_cast, alpha=ctx.scaling), da, db, dc  # type: ignore[arg-type]
    through_lora = scaled_product(dh, a_cast, ctx.scaling)
    if mask is not None:
        through_lora = torch.ops.aten.native_dropout_backward(through_lora, mask, scale)
    return through_lora if dx is None else dx.add_(through_lora), da, db, dc


def scaled_product(left: Tensor, right: Tensor | None, factor: float) -> Tensor:
    """`factor · left @ right`, rounded once."""
    assert right is not None
    return torch.addmm(left.new_empty(1, 1), left, right, beta=0, alpha=factor)


def needed(ctx: Any) -> tuple[bool, ...]:
    """Which of A, B and C want a gradient."""
    return ctx.needs_input_grad[-5:-2]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of linear products here, or None where it is off."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def cast(dtype: torch.dtype | None, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in `dtype`, or as they are where it is None."""
    return tensors if dtype is None else tuple(t if t is None else t.to(dtype) for t in tensors)


def rng_state(device: torch.device) -> Tensor:
    """The state of the generator that dropout draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_rng_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def dropped_again(x: Tensor, dropout: float, state: Tensor) -> tuple[Tensor, Tensor]:
    """The same draw of dropout as in the forward, and its mask; the generator goes on from where it was."""
    now = rng_state(x.device)
    set_rng_state(state, x.device)
    try:
        return torch.native_dropout(x, dropout, True)
    finally:
        set_rng_state(now, x.device)
