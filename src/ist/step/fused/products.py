"""What LoRA's function asks of the products of an adapter's matrices with activations, and sums of large products.

`precision` has them in PyTorch's operations, `launch` in kernels for GPUs; `choice` says which serve.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["Products", "add_product_", "has_many_rows", "linear_on_top", "product", "shaped"]


class Products:
    """The products of an adapter.

    Everywhere x is `[rows, in]`, y `[rows, out]`, h `[rows, r]`, A `[r, in]`, B `[out, r]`, W `[out, in]`, and D is the
    adapter's dropout up to the factor `rest`, by which whoever calls multiplies.
    """

    __slots__ = ()
    autocast: torch.dtype | None
    """Autocast's dtype, or None where it is off."""
    dtype: torch.dtype
    """As precise as which the products are."""
    split: bool
    """Whether float32 matrices are taken as bfloat16 parts."""

    def down(self, x: Tensor, a: Tensor, dropout: float) -> tuple[Tensor, Tensor | None, Any]:
        """`h = D(x) Aᵀ`, and of the dropout its mask or what it was drawn from."""
        raise NotImplementedError

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, factor: float) -> Tensor:
        """`x Wᵀ + bias + f h Bᵀ`."""
        raise NotImplementedError

    def add_up_(self, y: Tensor, h: Tensor, b: Tensor, factor: float) -> None:
        """`y += f h Bᵀ`."""
        raise NotImplementedError

    def drop_again(
        self, x: Tensor | None, dropout: float, mask: Tensor | None, drawn_from: Any, like: Callable[[], Tensor]
    ) -> tuple[Tensor | None, Any]:
        """D(x) as it was drawn, and its mask, in the forms that the gradients below take. x is None where nothing is
        learned from it; `like` makes something of its shape.
        """
        raise NotImplementedError

    def grad_of_h(self, dy: Tensor, b: Tensor) -> Tensor:
        """`dh = dy B`."""
        raise NotImplementedError

    def grad_of_b(self, dy: Tensor, h: Tensor, factor: float) -> Tensor:
        """`f dyᵀ h`."""
        raise NotImplementedError

    def grad_of_a(self, dh: Tensor, inputs: Any, mask: Any, factor: float) -> Tensor:
        """`f dhᵀ D(x)`, of `inputs` and `mask` as `drop_again` gives them."""
        raise NotImplementedError

    def grad_of_x(self, dh: Tensor, a: Tensor, mask: Any, dropout: float, factor: float) -> Tensor:
        """`f D(dh A)`."""
        raise NotImplementedError

    def input_grad(
        self, dy: Tensor, weight: Tensor, dh: Tensor, a: Tensor, mask: Any, dropout: float, factor: float
    ) -> Tensor:
        """`dy W + f D(dh A)`."""
        raise NotImplementedError

    def rest(self, dropout: float) -> float:
        """The factor that D lacks."""
        raise NotImplementedError

    def parts(self, w: Tensor, low: int) -> Tensor:
        """`w` `[r, n]` as three bfloat16 parts one under another, `[3r, n]`: number `low` is its low part, the others
        its high one. For products that are `split`.
        """
        raise NotImplementedError


FEW_ROWS = 2048
"""Up to which the host that launches products is slower than a GPU that computes them."""


def has_many_rows(x: Tensor) -> bool:
    """Whether what a GPU reads counts more than how often something is launched. A graph does not ask: it would be
    another one for another number of rows.
    """
    return not torch.compiler.is_compiling() and x.numel() > FEW_ROWS * x.shape[-1]


def linear_on_top(x: Tensor, weight: Tensor, bias: Tensor | None, add_up_: Callable[[Tensor, bool], None]) -> Tensor:
    """`x Wᵀ + b` and an adapter's product in one tensor.

    An output wider than the input is larger than what it is computed from: to read it once more costs most. There the
    adapter's product comes first, and the large one is added to it where it is summed up.

    Args:
        x: `[rows, in]`.
        weight: `[out, in]`.
        bias: `[out]`, or None.
        add_up_: `(y, add)` adds the adapter's product to y `[rows, out]`, or without `add` writes it there.
    """
    if bias is None and weight.shape[0] > weight.shape[1] and has_many_rows(x):
        y = x.new_empty(x.shape[0], weight.shape[0])
        add_up_(y, False)
        return y.addmm_(x, weight.t())
    y = linear(x, weight, bias)
    add_up_(y, True)
    return y


def shaped(rows: Tensor, x: Tensor) -> Tensor:
    """The rows of an output in the shape of the input. It is no view, so that the model may change it in place."""
    return torch.ops.aten._unsafe_view(rows, (*x.shape[:-1], rows.shape[-1]))


def product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """`f · left @ right`, rounded once."""
    return torch.addmm(left.new_empty(1, 1), left, right, beta=0, alpha=factor)


def add_product_(y: Tensor, left: Tensor, right: Tensor, factor: float, add: bool = True) -> None:
    """`y += f · left @ right` in y's dtype, or without `add` `y = …`."""
    if y.dtype == left.dtype:
        y.addmm_(left, right, beta=int(add), alpha=factor)
    else:
        (y if add else y.zero_()).add_(left @ right, alpha=factor)
