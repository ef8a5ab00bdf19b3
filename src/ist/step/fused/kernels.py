"""Three products of a thin matrix with activations, on a GPU, in Triton: each reads the activations once per 64 ranks.

A matrix of an adapter is so thin that its products cost what reading the activations costs, and at small batches what
launching kernels costs. So what PEFT does in many steps is done here within one: the adapter's input is dropped out
while it is read, float32 matrices are split into bfloat16 parts in registers (see `precision`), and the adapter's
output is added where the module's own already is.

Dropout keeps no mask: whether an element stays is a hash of its place and of two numbers, which the backward asks
again. Nothing is summed by atomic additions: the same inputs give the same bits.

x is `[rows, width]`, h `[rows, rank]` in float32, w and g `[rank, width]` with strides of their own. Ranks come in
BLOCKS blocks of RANK, a power of two; the last one need not be full. Where each block makes elements of its own, it has
programs of its own, those of the same activations next to each other, so that the cache serves all but the first;
where blocks are summed, a program goes through them.
"""

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

__all__ = ["down_kernel", "grad_kernel", "norm_kernel", "parts_kernel", "up_kernel"]

CHANGING = ["rows", "key", "other", "threshold"]
"""Arguments of whose values kernels are not to be compiled anew."""


@triton.jit
def kept(rows, columns, width, key, other, threshold):  # type: ignore[no-untyped-def]
    """Whether the elements of a tile survive the dropout."""
    place = (rows[:, None] * width + columns[None, :]).to(tl.uint32)
    return (mix(place ^ key.to(tl.uint32)) ^ other.to(tl.uint32)) >= threshold.to(tl.uint32)


@triton.jit
def mix(bits):  # type: ignore[no-untyped-def]
    """A bijection of 32 bits in which every input bit moves every output bit half of the time."""
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit(do_not_specialize=CHANGING)
def down_kernel(  # type: ignore[no-untyped-def]
    x, w, h, rows, width, rank, x_row, w_rank, w_column, key, other, threshold,
    DROP: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """`h = D(x) wᵀ`."""
    row = tl.program_id(0) // BLOCKS * ROWS + tl.arange(0, ROWS)
    place = tl.program_id(0) % BLOCKS * RANK + tl.arange(0, RANK)
    total = tl.zeros((ROWS, RANK), dtype=tl.float32)
    for start in range(0, width, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        tile = tl.load(x + row[:, None].to(tl.int64) * x_row + column[None, :], mask=inside, other=0.0)
        if DROP:
            tile = tl.where(kept(row, column, width, key, other, threshold), tile, 0.0)
        own = (column[:, None] < width) & (place[None, :] < rank)
        matrix = tl.load(w + column[:, None] * w_column + place[None, :] * w_rank, mask=own, other=0.0)
        high = matrix.to(tile.dtype)
        total = tl.dot(tile, high, total)
        if SPLIT:
            total = tl.dot(tile, (matrix - high.to(tl.float32)).to(tile.dtype), total)
    tl.store(h + row[:, None] * rank + place[None, :], total, mask=(row[:, None] < rows) & (place[None, :] < rank))


@triton.jit(do_not_specialize=CHANGING)
def up_kernel(  # type: ignore[no-untyped-def]
    y, h, w, rows, width, rank, y_row, w_rank, w_column, factor, key, other, threshold,
    DROP: tl.constexpr, SPLIT: tl.constexpr, ADD: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """`y += f D(h w)`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    kind = y.dtype.element_ty
    product = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for block in tl.static_range(BLOCKS):
        place = block * RANK + tl.arange(0, RANK)
        known = (row[:, None] < rows) & (place[None, :] < rank)
        thin = tl.load(h + row[:, None] * rank + place[None, :], mask=known, other=0.0)
        own = (column[None, :] < width) & (place[:, None] < rank)
        matrix = tl.load(w + column[None, :] * w_column + place[:, None] * w_rank, mask=own, other=0.0)
        thin_high, high = thin.to(kind), matrix.to(kind)
        product = tl.dot(thin_high, high, product)
        if SPLIT:
            product = tl.dot((thin - thin_high.to(tl.float32)).to(kind), high, product)
            product = tl.dot(thin_high, (matrix - high.to(tl.float32)).to(kind), product)
    product *= factor
    if DROP:
        product = tl.where(kept(row, column, width, key, other, threshold), product, 0.0)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    at = y + row[:, None].to(tl.int64) * y_row + column[None, :]
    if ADD:
        product += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, product.to(kind), mask=inside)


@triton.jit(do_not_specialize=CHANGING)
def grad_kernel(  # type: ignore[no-untyped-def]
    g, h, x, rows, width, rank, x_row, g_rank, g_column, factor, key, other, threshold,
    DROP: tl.constexpr, SPLIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RANK: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """`g = f hᵀ D(x)`."""
    column = tl.program_id(0) // BLOCKS * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.program_id(0) % BLOCKS * RANK + tl.arange(0, RANK)
    total = tl.zeros((RANK, COLUMNS), dtype=tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row[:, None] < rows) & (column[None, :] < width)
        tile = tl.load(x + row[:, None].to(tl.int64) * x_row + column[None, :], mask=inside, other=0.0)
        if DROP:
            tile = tl.where(kept(row, column, width, key, other, threshold), tile, 0.0)
        known = (row[None, :] < rows) & (place[:, None] < rank)
        thin = tl.load(h + row[None, :] * rank + place[:, None], mask=known, other=0.0)
        high = thin.to(tile.dtype)
        total = tl.dot(high, tile, total)
        if SPLIT:
            total = tl.dot((thin - high.to(tl.float32)).to(tile.dtype), tile, total)
    own = (column[None, :] < width) & (place[:, None] < rank)
    tl.store(g + column[None, :] * g_column + place[:, None] * g_rank, total * factor, mask=own)


@triton.jit
def parts_kernel(w, parts, rank, width, w_rank, w_column, LOW: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Three bfloat16 parts of w one under another, `[3 rank, width]`: number LOW is its low part, two its high."""
    place = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    value = tl.load(w + place * w_rank + column * w_column, mask=inside, other=0.0)
    high = value.to(tl.bfloat16)
    low = (value - high.to(tl.float32)).to(tl.bfloat16)
    for part in tl.static_range(3):
        at = parts + (part * rank + place) * width + column
        if part == LOW:
            tl.store(at, low, mask=inside)
        else:
            tl.store(at, high, mask=inside)


@triton.jit(do_not_specialize=["offset"])
def norm_kernel(  # type: ignore[no-untyped-def]
    y, x, w, factors, width, x_row, offset, ROUNDED: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """`y = x ρ (w + offset)` of a row, to the bits of Liger's RMSNorm, where ρ is one factor a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    product = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32) * tl.load(factors + row)
    if ROUNDED:
        product = product.to(x.dtype.element_ty).to(tl.float32)
    product *= tl.load(w + column, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(y + row * width + column, product.to(y.dtype.element_ty), mask=inside)
