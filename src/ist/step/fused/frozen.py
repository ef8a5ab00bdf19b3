"""A frozen LoRA module: nothing is learned from its adapter, so two thin products in each direction are all of it.

The matrices are brought into the form of these products once a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .choice import autocast_dtype, products
from .function import unflatten
from .products import Products, add_product_, has_many_rows, linear_on_top, shaped

__all__ = ["FrozenPair", "KeptPair", "PairKeeper", "frozen_lora_linear", "frozen_pair"]

FrozenPair = tuple[Tensor, Tensor]
"""A frozen adapter ready for two products, `x @ downᵀ` and `· @ up` forwards, `dy @ upᵀ` and `· @ down` backwards: down
`[k, in]` and up `[k, out]` in the activations' dtype, k = r or a multiple of it."""


def frozen_pair(kind: Products, dtype: torch.dtype, a: Tensor, b: Tensor) -> FrozenPair | None:
    """A and B for products that nothing is learned from, or None where these need another dtype than the activations'.

    Of float32 matrices they are parts: high, high and low of A, and high, low and high of Bᵀ, whose products add up to
    high·high + high·low + low·high. What is lost is that the first product, which nothing is learned from, is rounded
    to bfloat16: 2⁻⁹ of the adapter's response, beside the 2⁻⁹ of the whole output that any bfloat16 output has lost.

    Args:
        kind: says how the adapter's products are computed.
        dtype: of the activations, after autocast.
        a: the matrix A `[r, in]`.
        b: the matrix B `[out, r]`.
    """
    if kind.split:
        return kind.parts(a, 2), kind.parts(b.t(), 1)
    return (a.to(dtype), b.to(dtype).t()) if kind.dtype == dtype else None


KeptPair = tuple[tuple[Any, ...], FrozenPair | None]
"""What a pair was prepared of, and the pair."""


class PairKeeper:
    """Prepares the matrices of a frozen module for products (`frozen_pair`), once a step where it may keep them.

    Whoever writes through `.data` is seen by no counter, and a new tensor may lie where an old one lay. Neither an
    address nor a version tells that a matrix is the one that was prepared, so what is kept is cleared at each beginning
    of a step and of a measurement. Within these, autograd's version counter shows the writes that it sees.

    Args:
        keep: whether it may keep them.
        kept: where it keeps them, in common with other modules that forget together; a place of its own if None.
    """

    def __init__(self, keep: bool, kept: dict[object, KeptPair] | None = None) -> None:
        self._keep = keep
        self._kept = {} if kept is None else kept
        self._key = object()
        """Of its own among the others; itself would hold what it holds, until Python collects garbage."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._keep,)  # A copied model prepares its own.

    def __call__(self, x: Tensor, a: Tensor, b: Tensor) -> FrozenPair | None:
        """What x is to be multiplied with, or None where it cannot be prepared."""
        autocast = autocast_dtype(x)
        dtype = autocast or x.dtype
        if torch.compiler.is_compiling() or not self._keep or a.is_inference():
            return frozen_pair(products(a, autocast, x.dtype), dtype, a.detach(), b.detach())
        key = (a.data_ptr(), a._version, b.data_ptr(), b._version, dtype, autocast)
        known = self._kept.get(self._key)
        if known is None or known[0] != key:
            with torch.inference_mode(False):  # It may be kept beyond an evaluation.
                pair = frozen_pair(products(a, autocast, x.dtype), dtype, a.detach(), b.detach())
            known = self._kept[self._key] = key, pair
        return known[1]


def frozen_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pair: FrozenPair,
    c: Tensor | None,
    scaling: float,
    factors: Tensor | None = None,
) -> Tensor:
    """`lora_linear` of a frozen adapter without dropout: two thin products in each direction, and nothing else.

    Args:
        factors: `[parts, 1, 1]`, further factors on what the adapter adds, one for each of so many parts of the rows;
            without gradient.
    """
    needs_function = torch.is_grad_enabled() and x.requires_grad and factors is None
    casts = weight.dtype != pair[0].dtype  # A weight that autocast casts would be kept as it was cast.
    if needs_function and (casts or torch.compiler.is_compiling() or has_many_rows(x)):
        return FrozenLoraLinear.apply(x, weight, bias, *pair, c, scaling)  # type: ignore[return-value]
    return frozen_forward(x, weight, bias, *pair, c, scaling, factors)


def frozen_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    down: Tensor,
    up: Tensor,
    c: Tensor | None,
    scaling: float,
    factors: Tensor | None = None,
) -> Tensor:
    """The operations themselves. Of few rows autograd may record them: they too keep nothing, since no matrix trains;
    they add two gradients of x where `FrozenLoraLinear` makes one, but run without Python in the backward.
    """
    if autocast_dtype(x) is not None:  # Each by itself: an input may have autocast's dtype already.
        x, weight = x.to(down.dtype), weight.to(down.dtype)
        bias = None if bias is None else bias.to(down.dtype)
    inputs = x.reshape(-1, x.shape[-1])
    h = inputs @ down.t()
    if factors is not None:
        h.view(len(factors), -1, h.shape[-1]).mul_(factors)
    rows = linear_on_top(inputs, weight, bias, lambda y, add: add_product_(y, h, up, scaling, add))
    if c is not None and factors is None:
        rows.add_(c.to(rows.dtype), alpha=scaling)
    elif c is not None:
        rows.view(len(factors), -1, rows.shape[-1]).add_(factors * c, alpha=scaling)  # type: ignore
    return shaped(rows, x)


class FrozenLoraLinear(torch.autograd.Function):
    """`frozen_lora_linear` with its backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        c: Tensor | None,
        scaling: float,
    ) -> Tensor:
        ctx.save_for_backward(weight, down, up)
        ctx.scaling, ctx.x_dtype = scaling, x.dtype
        return frozen_forward(x, weight, bias, down, up, c, scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weight, down, up = ctx.saved_tensors
        dy = grad.reshape(-1, grad.shape[-1])
        dh, scaling = dy @ up.t(), ctx.scaling
        dx = linear_on_top(dy, weight.to(dy.dtype).t(), None, lambda dx, add: add_product_(dx, dh, down, scaling, add))
        return unflatten(ctx, dx, grad), None, None, None, None, None, None
