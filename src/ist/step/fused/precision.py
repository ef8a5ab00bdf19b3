"""The products of an adapter's matrices with activations, in the precision that PEFT would compute them in.

Where the adapter has the activations' dtype, or autocast sets one, that is `Plain`. PEFT's default on a bfloat16 model
is float32 adapters, and without autocast it computes them in float32, activations included: three times the bytes and,
on a GPU, off the tensor cores. `Split` gets the same from bfloat16 products: a float32 number is the sum of two
bfloat16 ones up to 2⁻¹⁶ of itself, so its products with bfloat16 are the sum of two products with float32 sums, which
is what tensor cores compute anyway; of two such numbers, three products matter. The rank grows from r to 2r or 3r, and
the products of an adapter are so thin that only the bytes of the activations count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .products import Products, add_product_, product

__all__ = ["Plain", "Split", "fold", "parts", "wide_product"]


class TorchProducts(Products):
    """What `Plain` and `Split` have in common: dropout by PyTorch's own, whose mask is drawn once more in the backward
    from the generator's state.
    """

    __slots__ = ()

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, factor: float) -> Tensor:
        y = linear(x, weight, bias)
        self.add_up_(y, h, b, factor)
        return y

    def down(self, x: Tensor, a: Tensor, dropout: float) -> tuple[Tensor, Tensor | None, Any]:
        if not dropout:
            return self.product_with_a(x, a), None, None
        if torch.compiler.is_compiling():  # A generator's state cannot be read in a graph: the mask is kept.
            inputs, mask = self.drop(x, dropout)
            return self.product_with_a(inputs, a), mask, None
        state = rng_state(x.device)
        return self.product_with_a(self.drop(x, dropout)[0], a), None, state

    def drop_again(
        self, x: Tensor | None, dropout: float, mask: Tensor | None, drawn_from: Any, like: Callable[[], Tensor]
    ) -> tuple[Tensor | None, Any]:
        if not dropout:
            return x, None
        if mask is not None:
            return x if x is None else self.mask(x, mask, dropout), mask
        x = like() if x is None else x
        now = rng_state(x.device)
        set_rng_state(drawn_from, x.device)
        try:
            return self.drop(x, dropout)
        finally:
            set_rng_state(now, x.device)

    def input_grad(
        self, dy: Tensor, weight: Tensor, dh: Tensor, a: Tensor, mask: Any, dropout: float, factor: float
    ) -> Tensor:
        dx = dy @ weight
        if mask is None:
            self.add_product_with_a_(dx, dh, a, factor)
            return dx
        return dx.add_(self.grad_of_x(dh, a, mask, dropout, factor))

    def grad_of_x(self, dh: Tensor, a: Tensor, mask: Any, dropout: float, factor: float) -> Tensor:
        own = self.product_of_h(dh, a, factor)
        return own if mask is None else self.mask(own, mask, dropout)

    def rest(self, dropout: float) -> float:
        return 1.0

    def parts(self, w: Tensor, low: int) -> Tensor:
        high = w.to(torch.bfloat16)
        found = [high] * 3
        found[low] = (w - high).to(torch.bfloat16)
        return torch.cat(found)

    def drop(self, x: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        """D(x) and its mask, newly drawn."""
        raise NotImplementedError

    def mask(self, x: Tensor, mask: Tensor, dropout: float) -> Tensor:
        """D(x) of a known mask."""
        raise NotImplementedError

    def product_with_a(self, x: Tensor, a: Tensor) -> Tensor:
        """`x Aᵀ`."""
        raise NotImplementedError

    def product_of_h(self, dh: Tensor, a: Tensor, factor: float) -> Tensor:
        """`f dh A`."""
        raise NotImplementedError

    def add_product_with_a_(self, dx: Tensor, dh: Tensor, a: Tensor, factor: float) -> None:
        """`dx += f dh A`."""
        raise NotImplementedError


class Plain(TorchProducts):
    """Products in one dtype.

    Args:
        autocast: autocast's dtype, or None where it is off.
        dtype: of the products.
        weight_dtype: of A and B.
    """

    __slots__ = ("autocast", "dtype", "weight_dtype")
    split = False

    def __init__(self, autocast: torch.dtype | None, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
        self.autocast = autocast
        self.dtype = dtype
        self.weight_dtype = weight_dtype

    def cast(self, x: Tensor) -> Tensor:
        return x if x.dtype == self.dtype else x.to(self.dtype)

    def drop(self, x: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        return torch.native_dropout(self.cast(x), dropout, True)

    def mask(self, x: Tensor, mask: Tensor, dropout: float) -> Tensor:
        return torch.ops.aten.native_dropout_backward(self.cast(x), mask, 1 / (1 - dropout))

    def product_with_a(self, x: Tensor, a: Tensor) -> Tensor:
        return linear(self.cast(x), self.cast(a))

    def product_of_h(self, dh: Tensor, a: Tensor, factor: float) -> Tensor:
        return product(dh, self.cast(a), factor)

    def add_product_with_a_(self, dx: Tensor, dh: Tensor, a: Tensor, factor: float) -> None:
        add_product_(dx, dh, self.cast(a), factor)

    def add_up_(self, y: Tensor, h: Tensor, b: Tensor, factor: float) -> None:
        self.add_(y, h, b.t(), factor)

    def add_(self, y: Tensor, h: Tensor, w: Tensor, factor: float, add: bool = True) -> None:
        """`y += f h w`, or without `add` `y = …`."""
        add_product_(y, self.cast(h), self.cast(w), factor, add)

    def grad_of_h(self, dy: Tensor, b: Tensor) -> Tensor:
        return self.cast(dy) @ self.cast(b)

    def grad_of_b(self, dy: Tensor, h: Tensor, factor: float) -> Tensor:
        return product(self.cast(dy).t(), h, factor).to(self.weight_dtype)

    def grad_of_a(self, dh: Tensor, inputs: Any, mask: Any, factor: float) -> Tensor:
        return product(dh.t(), self.cast(inputs), factor).to(self.weight_dtype)


class Split(TorchProducts):
    """Products of bfloat16 activations with float32 matrices, on a GPU."""

    __slots__ = ()
    autocast = None
    dtype = torch.float32
    split = True

    def drop(self, x: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        mask = torch.native_dropout(x, dropout, True)[1]
        return x * mask, mask

    def mask(self, x: Tensor, mask: Tensor, dropout: float) -> Tensor:
        return x * mask

    def rest(self, dropout: float) -> float:
        return 1 / (1 - dropout)

    def product_with_a(self, x: Tensor, a: Tensor) -> Tensor:
        return fold(wide_product(x, parts(a, 2).t()))

    def product_of_h(self, dh: Tensor, a: Tensor, factor: float) -> Tensor:
        return product(beside(dh, 3), parts(a, 3), factor)

    def add_product_with_a_(self, dx: Tensor, dh: Tensor, a: Tensor, factor: float) -> None:
        dx.addmm_(beside(dh, 3), parts(a, 3), alpha=factor)

    def add_up_(self, y: Tensor, h: Tensor, b: Tensor, factor: float) -> None:
        y.addmm_(beside(h, 3), parts(b.t(), 3), alpha=factor)

    def grad_of_h(self, dy: Tensor, b: Tensor) -> Tensor:
        return fold(wide_product(dy, beside(b, 2)))

    def grad_of_b(self, dy: Tensor, h: Tensor, factor: float) -> Tensor:
        return fold(wide_product(dy.t(), beside(h, 2))).mul_(factor)

    def grad_of_a(self, dh: Tensor, inputs: Any, mask: Any, factor: float) -> Tensor:
        high, low = wide_product(beside(dh, 2).t(), inputs).view(2, -1, inputs.shape[-1])
        return high.add_(low).mul_(factor)


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


def rng_state(device: torch.device) -> Tensor:
    """The state of the generator that dropout draws from."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_rng_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
