"""The products of an adapter's matrices with activations, in the precision that PEFT would compute them in.

Where the adapter has the activations' dtype, or autocast sets one, that is `Plain`. PEFT's default on a bfloat16 model
is float32 adapters, and without autocast it computes them in float32, activations included: three times the bytes and,
on a GPU, off the tensor cores. `Split` gets the same from bfloat16 products: a float32 number is the sum of two
bfloat16 ones up to 2⁻¹⁶ of itself, so its products with bfloat16 are the sum of two products with float32 sums, which
is what tensor cores compute anyway; of two such numbers, three products matter. The rank grows from r to 2r or 3r, and
the products of an adapter are so thin that only the bytes of the activations count.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

__all__ = ["Plain", "Products", "Split", "autocast_dtype", "parts", "products"]


class Plain:
    """Products in one dtype.

    Args:
        autocast: autocast's dtype, or None where it is off.
        dtype: of the products.
        weight_dtype: of A and B.
    """

    __slots__ = ("autocast", "dtype", "weight_dtype")

    def __init__(self, autocast: torch.dtype | None, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
        self.autocast = autocast
        self.dtype = dtype
        self.weight_dtype = weight_dtype

    def cast(self, x: Tensor) -> Tensor:
        return x if x.dtype == self.dtype else x.to(self.dtype)

    def drop(self, x: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        """`D(x)` up to the factor `rest`, and its mask."""
        return torch.native_dropout(self.cast(x), dropout, True)

    def mask(self, x: Tensor, mask: Tensor, dropout: float) -> Tensor:
        """`D(x)` of a known mask, up to the factor `rest`."""
        return torch.ops.aten.native_dropout_backward(self.cast(x), mask, 1 / (1 - dropout))

    def rest(self, dropout: float) -> float:
        """What `drop` and `mask` leave of D to be multiplied."""
        return 1.0

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """`x Aᵀ`."""
        return linear(self.cast(x), self.cast(a))

    def add_up_(self, y: Tensor, h: Tensor, b: Tensor, factor: float) -> None:
        """`y += f h Bᵀ`."""
        add_product_(y, h, self.cast(b).t(), factor)

    def grad_of_b(self, dy: Tensor, h: Tensor, factor: float) -> Tensor:
        """`f dyᵀ h`."""
        return product(self.cast(dy).t(), h, factor).to(self.weight_dtype)

    def grad_of_h(self, dy: Tensor, b: Tensor) -> Tensor:
        """`dy B`."""
        return self.cast(dy) @ self.cast(b)

    def grad_of_a(self, dh: Tensor, x: Tensor, factor: float) -> Tensor:
        """`f dhᵀ x`."""
        return product(dh.t(), self.cast(x), factor).to(self.weight_dtype)

    def grad_of_x(self, dh: Tensor, a: Tensor, factor: float) -> Tensor:
        """`f dh A`."""
        return product(dh, self.cast(a), factor)

    def add_grad_of_x_(self, dx: Tensor, dh: Tensor, a: Tensor, factor: float) -> None:
        """`dx += f dh A`."""
        add_product_(dx, dh, self.cast(a), factor)


class Split:
    """Products of bfloat16 activations with float32 matrices, on a GPU. See `Plain` for what each one is."""

    __slots__ = ()
    autocast = None
    dtype = torch.float32

    def drop(self, x: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        mask = torch.native_dropout(x, dropout, True)[1]
        return x * mask, mask

    def mask(self, x: Tensor, mask: Tensor, dropout: float) -> Tensor:
        return x * mask

    def rest(self, dropout: float) -> float:
        return 1 / (1 - dropout)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return fold(wide_product(x, parts(a, 2).t()))

    def add_up_(self, y: Tensor, h: Tensor, b: Tensor, factor: float) -> None:
        y.addmm_(beside(h, 3), parts(b.t(), 3), alpha=factor)

    def grad_of_b(self, dy: Tensor, h: Tensor, factor: float) -> Tensor:
        return fold(wide_product(dy.t(), beside(h, 2))).mul_(factor)

    def grad_of_h(self, dy: Tensor, b: Tensor) -> Tensor:
        return fold(wide_product(dy, beside(b, 2)))

    def grad_of_a(self, dh: Tensor, x: Tensor, factor: float) -> Tensor:
        high, low = wide_product(beside(dh, 2).t(), x).view(2, -1, x.shape[-1])
        return high.add_(low).mul_(factor)

    def grad_of_x(self, dh: Tensor, a: Tensor, factor: float) -> Tensor:
        return product(beside(dh, 3), parts(a, 3), factor)

    def add_grad_of_x_(self, dx: Tensor, dh: Tensor, a: Tensor, factor: float) -> None:
        dx.addmm_(beside(dh, 3), parts(a, 3), alpha=factor)


Products = Plain | Split


def products(a: Tensor, autocast: torch.dtype | None, *activations: torch.dtype) -> Products:
    """How to compute.

    Args:
        a: the matrix A.
        autocast: what `autocast_dtype` says.
        activations: dtypes of x and y.
    """
    if autocast is not None:
        return Plain(autocast, autocast, a.dtype)
    if a.is_cuda and a.dtype == torch.float32 and all(dtype == torch.bfloat16 for dtype in activations):
        return Split()
    return Plain(None, a.dtype, a.dtype)


def product(left: Tensor, right: Tensor, factor: float) -> Tensor:
    """`f · left @ right`, rounded once."""
    return torch.addmm(left.new_empty(1, 1), left, right, beta=0, alpha=factor)


def add_product_(y: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """`y += f · left @ right`, in y's dtype."""
    if y.dtype == left.dtype:
        y.addmm_(left, right, alpha=factor)
    else:
        y.add_(left @ right, alpha=factor)


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """The product of two bfloat16 matrices in float32."""
    return torch.mm(left, right, out_dtype=torch.float32)


def parts(w: Tensor, count: int) -> Tensor:
    """`w` `[r, n]` as bfloat16 parts one under another, `[count·r, n]`: high and low; of three, the high one twice."""
    if torch.compiler.is_compiling():  # Which fuses this by itself, and does not follow writes into views.
        high = w.to(torch.bfloat16)
        return torch.cat([*[high] * (count - 1), (w - high).to(torch.bfloat16)])
    found = w.new_empty(count, *w.shape, dtype=torch.bfloat16)
    found.copy_(w)
    torch.sub(w, found[0], out=found[-1])
    return found.flatten(0, 1)


def beside(u: Tensor, count: int) -> Tensor:
    """`u` `[n, r]` as bfloat16 parts beside one another, `[n, count·r]`: high and low; of three, high once more.

    So `beside(u, 3) @ parts(w, 3)` is high·high + low·high + high·low.
    """
    if torch.compiler.is_compiling():
        high = u.to(torch.bfloat16)
        return torch.cat([high, (u - high).to(torch.bfloat16), high][:count], dim=1)
    found = u.new_empty(u.shape[0], count, u.shape[1], dtype=torch.bfloat16)
    found.copy_(u.unsqueeze(1))
    torch.sub(u, found[:, 0], out=found[:, 1])
    return found.flatten(1)


def fold(both: Tensor) -> Tensor:
    """The sum of two parts beside one another."""
    half = both.shape[1] // 2
    return both[:, :half] + both[:, half:]


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes of linear products here, or None where it is off."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)
