"""The products of an adapter in own kernels: where they serve, and with which tiles they are launched.

Of many rows without dropout, PyTorch's products of whole matrices (cuBLAS) are the faster ones for all but one: the
product that is added to an output, which a kernel of small ranks reads and writes once. So Kernels takes these there
(benchmarks/step_time/results/products-*.json).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import kernels
from .draws import Draw, draw
from .precision import Plain, Split, fold, wide_product
from .products import Products, add_product_, has_many_rows, linear_on_top

__all__ = ["Kernels", "find_kernels", "is_wide", "norm_output", "try_out"]

HALVES = (torch.bfloat16, torch.float16)
BLOCK = 64
"""Ranks that one tile holds: what fits into the shared memory of every GPU that kernels are for."""
MOST_RANKS = 256
"""Above, products of matrices are no longer thin, and cuBLAS does them well."""
MOST_ADDED = {True: 64, False: 128}
"""The ranks up to which a kernel adds `h w` to many rows faster than cuBLAS does; True is where matrices are split."""
NOTHING: Draw = (0, 0, 0)

# The kernels are no functions to a type checker that has no Triton.
down_kernel: Any = kernels.down_kernel
up_kernel: Any = kernels.up_kernel
grad_kernel: Any = kernels.grad_kernel
norm_kernel: Any = kernels.norm_kernel
parts_kernel: Any = kernels.parts_kernel


class Kernels(Products):
    """Products of an adapter in kernels.

    Args:
        autocast: autocast's dtype, or None where it is off.
        half: the dtype of activations.
        split: whether float32 matrices are multiplied as two bfloat16 parts; otherwise they are rounded to `half`.
        weight_dtype: of A and B.
    """

    __slots__ = ("autocast", "dtype", "half", "split", "weight_dtype", "whole")

    def __init__(self, autocast: torch.dtype | None, half: torch.dtype, split: bool, weight_dtype: torch.dtype) -> None:
        self.autocast = autocast
        self.half = half
        self.split = split
        self.weight_dtype = weight_dtype
        self.dtype = torch.float32 if split else half
        self.whole: Plain | SplitOnce = SplitOnce() if split else Plain(autocast, half, weight_dtype)

    def rest(self, dropout: float) -> float:
        return 1 / (1 - dropout)

    def down(self, x: Tensor, a: Tensor, dropout: float) -> tuple[Tensor, None, Any]:
        if dropout:
            drawn = draw(x.device, dropout)
            return self._down(x, a, drawn), None, drawn
        if has_many_rows(x):
            check_columns(x, a)
            return self.whole.product_with_a(self._readable(x), a), None, None
        return self._down(x, a), None, None

    def drop_again(
        self, x: Tensor | None, dropout: float, mask: Tensor | None, drawn_from: Any, like: Callable[[], Tensor]
    ) -> tuple[Tensor | None, Any]:
        return x, drawn_from

    def output(self, x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, b: Tensor, factor: float) -> Tensor:
        return linear_on_top(x, weight, bias, lambda y, add: self._up_(y, h, b.t(), factor, None, add))

    def add_up_(self, y: Tensor, h: Tensor, b: Tensor, factor: float) -> None:
        self._up_(y, h, b.t(), factor)

    def grad_of_h(self, dy: Tensor, b: Tensor) -> Tensor:
        return self.whole.grad_of_h(self._readable(dy), b) if has_many_rows(dy) else self._down(dy, b.t())

    def grad_of_b(self, dy: Tensor, h: Tensor, factor: float) -> Tensor:
        if has_many_rows(dy):
            return self.whole.grad_of_b(self._readable(dy), h.to(self.dtype), factor)
        found = torch.empty(dy.shape[1], h.shape[1], dtype=self.weight_dtype, device=dy.device)
        self._grad_(found.t(), h, dy, factor, None)
        return found

    def grad_of_a(self, dh: Tensor, inputs: Tensor, mask: Any, factor: float) -> Tensor:
        if mask is None and has_many_rows(inputs):
            return self.whole.grad_of_a(dh, self._readable(inputs), None, factor)
        found = torch.empty(dh.shape[1], inputs.shape[1], dtype=self.weight_dtype, device=dh.device)
        self._grad_(found, dh, inputs, factor, mask)
        return found

    def input_grad(
        self, dy: Tensor, weight: Tensor, dh: Tensor, a: Tensor, mask: Any, dropout: float, factor: float
    ) -> Tensor:
        return linear_on_top(dy, weight.t(), None, lambda dx, add: self._up_(dx, dh, a, factor, mask, add))

    def grad_of_x(self, dh: Tensor, a: Tensor, mask: Any, dropout: float, factor: float) -> Tensor:
        dx = torch.empty(len(dh), a.shape[1], dtype=self.half, device=dh.device)
        self._up_(dx, dh, a, factor, mask, add=False)
        return dx

    def parts(self, w: Tensor, low: int) -> Tensor:
        return three_parts(w, low)

    def _down(self, x: Tensor, w: Tensor, drawn: Draw | None = None) -> Tensor:
        """`D(x) wᵀ`, in float32."""
        check_columns(x, w)
        many = has_many_rows(x)
        x = self._readable(x)
        (rows, width), rank = x.shape, w.shape[0]
        h = torch.empty(rows, rank, dtype=torch.float32, device=x.device)
        ranks, blocks = rank_blocks(rank)
        # Each tile of rows reads all of w, which costs more than the activations once ranks are many.
        tile = 16 if w.stride(1) == 1 and not (blocks > 1 and many) else 64
        with torch.cuda.device_of(x):
            down_kernel[(tiles(rows, tile) * blocks,)](
                x, w, h, rows, width, rank, x.stride(0), *w.stride(), *(drawn or NOTHING),
                DROP=drawn is not None, SPLIT=self.split, ROWS=tile, COLUMNS=128 if ranks <= 32 else 64, RANK=ranks,
                BLOCKS=blocks, num_warps=4, num_stages=3,
            )  # fmt: skip
        return h

    def _up_(self, y: Tensor, h: Tensor, w: Tensor, factor: float, drawn: Draw | None = None, add: bool = True) -> None:
        """`y += f D(h w)`, or `y = …`."""
        rows, width = y.shape
        ranks, blocks = rank_blocks(w.shape[0])
        if drawn is None and w.shape[0] > MOST_ADDED[self.split] and has_many_rows(y):
            self.whole.add_(y, h, w, factor, add)
            return
        with torch.cuda.device_of(y):
            up_kernel[(tiles(rows, 64), tiles(width, 128))](
                y, h, w, rows, width, w.shape[0], y.stride(0), *w.stride(), factor, *(drawn or NOTHING),
                DROP=drawn is not None, SPLIT=self.split, ADD=add, ROWS=64, COLUMNS=128, RANK=ranks, BLOCKS=blocks,
                num_warps=4,
            )  # fmt: skip

    def _grad_(self, g: Tensor, h: Tensor, x: Tensor, factor: float, drawn: Draw | None) -> None:
        """`g = f hᵀ D(x)`."""
        x = self._readable(x)
        rows, width = x.shape
        ranks, blocks = rank_blocks(h.shape[1])
        tile = 64 if blocks > 1 else 32
        with torch.cuda.device_of(x):
            grad_kernel[(tiles(width, tile) * blocks,)](
                g, h, x, rows, width, h.shape[1], x.stride(0), *g.stride(), factor, *(drawn or NOTHING),
                DROP=drawn is not None, SPLIT=self.split, ROWS=64, COLUMNS=tile, RANK=ranks, BLOCKS=blocks,
                num_warps=4, num_stages=3,
            )  # fmt: skip

    def _readable(self, x: Tensor) -> Tensor:
        """Activations in their dtype, each row in one piece."""
        if x.dtype != self.half:
            x = x.to(self.half)
        return x if x.stride(1) == 1 else x.contiguous()


class SplitOnce(Split):
    """`Split` with the parts of a matrix made by one kernel."""

    __slots__ = ()

    def product_with_a(self, x: Tensor, a: Tensor) -> Tensor:
        return fold(wide_product(x, two_parts(a).t()))

    def grad_of_h(self, dy: Tensor, b: Tensor) -> Tensor:
        return fold(wide_product(dy, two_parts(b.t()).t()))

    def grad_of_b(self, dy: Tensor, h: Tensor, factor: float) -> Tensor:
        return fold(wide_product(dy.t(), two_parts(h.t()).t())).mul_(factor)

    def grad_of_a(self, dh: Tensor, inputs: Any, mask: Any, factor: float) -> Tensor:
        high, low = wide_product(two_parts(dh.t()), inputs).view(2, -1, inputs.shape[-1])
        return high.add_(low).mul_(factor)

    def add_(self, y: Tensor, h: Tensor, w: Tensor, factor: float, add: bool = True) -> None:
        """`y += f h w`, or `y = …`: high · high, low · high, high · low."""
        add_product_(y, three_parts(h.t(), 1).t(), three_parts(w, 2), factor, add)


def two_parts(w: Tensor) -> Tensor:
    """`w` `[r, n]` as its high and its low bfloat16 part one under another, `[2r, n]`."""
    return three_parts(w, 1)[: 2 * len(w)]


def three_parts(w: Tensor, low: int) -> Tensor:
    """As `Products.parts`."""
    rank, width = w.shape
    found = torch.empty(3 * rank, width, dtype=torch.bfloat16, device=w.device)
    with torch.cuda.device_of(w):
        parts_kernel[(rank, tiles(width, 1024))](w, found, rank, width, *w.stride(), LOW=low, COLUMNS=1024)
    return found


def norm_output(x: Tensor, w: Tensor, factors: Tensor, offset: float, rounded: bool) -> Tensor:
    """As `ist.step.fused.norms.norm_output`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, width = x.shape
    with torch.cuda.device_of(x):
        norm_kernel[(rows, tiles(width, 1024))](
            y, x, w, factors, width, x.stride(0), offset, ROUNDED=rounded, COLUMNS=1024, num_warps=4
        )
    return y


def check_columns(x: Tensor, w: Tensor) -> None:
    """Raise RuntimeError where an adapter's matrix does not take an input of these columns, or from this device."""
    if x.shape[1] != w.shape[1] or x.device != w.device:
        raise RuntimeError(
            f"An adapter of {w.shape[1]} columns on {w.device} got an input of {x.shape[1]} on {x.device}."
        )


def find_kernels(a: Tensor, autocast: torch.dtype | None, activations: tuple[torch.dtype, ...]) -> Kernels | None:
    """The products in kernels; None where dtypes or rank are others than these are for.

    Args:
        a: the matrix A.
        autocast: as `ist.step.fused.choice.products` has it.
        activations: dtypes of x and y.
    """
    half = autocast or activations[0]
    if half not in HALVES or a.shape[0] > MOST_RANKS:
        return None
    if autocast is not None:
        return make_kernels(autocast, half, False, a.dtype)
    if any(dtype != half for dtype in activations):
        return None
    split = a.dtype == torch.float32 and half == torch.bfloat16
    return make_kernels(None, half, split, a.dtype) if split or a.dtype == half else None


@cache
def make_kernels(autocast: torch.dtype | None, half: torch.dtype, split: bool, weight_dtype: torch.dtype) -> Kernels:
    return Kernels(autocast, half, split, weight_dtype)


def is_wide(rank: int) -> bool:
    """Whether a rank takes tiles of other sizes than small ranks do."""
    return rank_blocks(rank)[1] > 1


def try_out(device: torch.device, wide: bool = False) -> None:
    """Compile and launch every kernel once, on next to nothing; whatever is wrong is raised.

    Args:
        device: a GPU.
        wide: whether to try the tiles of the largest rank, and not those of a small one.
    """
    kind = make_kernels(None, torch.bfloat16, True, torch.float32)
    w = torch.ones(MOST_RANKS if wide else 16, 16, device=device)
    x = kind.parts(w, 2)[:16]
    h = kind.down(x, w, 0.0)[0]
    kind.grad_of_h(x, w.t().contiguous())
    kind.grad_of_b(x, h, 1.0)
    kind.add_up_(x, h, w.t(), 1.0)
    norm_output(x, w[0], h[:, 0].contiguous(), 0.0, True)


@cache
def rank_blocks(rank: int) -> tuple[int, int]:
    """The ranks of a tile that tensor cores multiply, a power of two from 16 on; and how many tiles hold them all."""
    size = min(BLOCK, max(16, 1 << (rank - 1).bit_length()))
    return size, tiles(rank, size)


def tiles(size: int, tile: int) -> int:
    return -(-size // tile)
