"""Inputs that need not be kept, since the graph keeps what they are made of.

The input of a gated MLP's last projection is a product of two tensors, `act(gate) · up`, and is the widest input of a
layer. The product's own backward keeps both factors until it has run, which is after that of the projection. So the
projection can multiply them once more, in the same operation and to the same bits, instead of keeping their product.

The input of queries, keys and values, and that of gate and up, is what a norm returned. Liger's RMSNorm keeps its own
input, which is the residual stream, and one factor a row. So its output can be made again too, where memory is wanted
more than time (`recompute="norms"`): once for all modules that read it, and until the norm's own backward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .choice import working_kernels

__all__ = ["recipe_of"]

Recipe = Callable[[], Tensor]
"""Computes a tensor again while the graph that made it has not been freed, in its own shape or as `[rows, in]`."""


def recipe_of(x: Tensor, norms: bool = False) -> Recipe | None:
    """How to compute an input again from what its graph keeps, or None where it has to be kept.

    Not where hooks pack what is kept (activation checkpointing, offloading): unpacking it twice costs more, or fails.

    Args:
        x: `[..., in]`, an elementwise product of two tensors of its shape, or what Liger's SwiGLU or RMSNorm returned.
        norms: whether outputs of norms are made again, which takes a launch more than keeping them.
    """
    if torch.compiler.is_compiling() or x.grad_fn is None or x._version:  # Written to since, perhaps past autograd.
        return None
    node: Any = x.grad_fn
    find = RECIPES.get(type(node).__name__)
    return None if find is None or (find is normed and not norms) else find(node, x)


def multiplied(node: Any, x: Tensor) -> Recipe | None:
    """Of PyTorch's product: it keeps both factors where both need a gradient."""
    if not all(is_kept(saved, x) for saved in (node._raw_saved_self, node._raw_saved_other)):
        return None
    return lambda: node._saved_self * node._saved_other


def gated(node: Any, x: Tensor) -> Recipe | None:
    """Of Liger's function, which keeps gate and up, and writes their gradients over them when its turn comes.

    Before that, and only where the graph is retained for another backward, the product is made once more and kept.
    """
    kept = node._raw_saved_tensors
    if len(kept) != 2 or not all(is_kept(saved, x) for saved in kept) or getattr(node, "dtensor_metadata", None):
        return None
    factors = [getattr(node, name) for name in ("gate_multiplier", "down_multiplier") if hasattr(node, name)]
    again = GatedAgain(node, factors)
    node.register_prehook(again.keep)
    return partial(again.multiply, node)  # The node's own hook holds it weakly: no circle keeps its tensors.


class GatedAgain:
    """Liger's product, made from a node that keeps gate and up until its backward writes over them."""

    def __init__(self, node: Any, factors: list[Any]) -> None:
        self._node, self._factors = weakref.ref(node), factors
        self._product: Tensor | None = None

    def multiply(self, node: Any) -> Tensor:
        """The product."""
        return node._forward_cls.apply(*node.saved_tensors, *self._factors) if self._product is None else self._product

    def keep(self, gradients: Any) -> None:
        """Before the node's backward: keep the product where another backward may ask for it."""
        if self._product is None and is_retained():
            with torch.no_grad():
                self._product = self.multiply(self._node())


def normed(node: Any, x: Tensor) -> Recipe | None:
    """Of Liger's RMSNorm, `y = x ρ (w + offset)`, which keeps x, w and the factor ρ of each row until it has run."""
    kept = node._raw_saved_tensors
    if len(kept) != 3 or node.casting_mode not in ROUNDED or not is_kept(kept[0], x):
        return None
    again = getattr(node, "ist_again", None)
    if again is None:
        again = node.ist_again = NormAgain()
        node.register_prehook(again.forget)
    return partial(again.multiply, node)


class NormAgain:
    """A norm's output, made for the first of the modules that read it and kept until the norm's own backward."""

    def __init__(self) -> None:
        self._product: Tensor | None = None

    def multiply(self, node: Any) -> Tensor:
        """The output, `[rows, in]`."""
        product = self._product
        if product is None:
            x, w, factors = node.saved_tensors
            with torch.no_grad():
                product = self._product = norm_output(x, w, factors, node.offset, ROUNDED[node.casting_mode])
        return product

    def forget(self, gradients: Any) -> None:
        """Before the norm's backward, which runs after those of all that read its output."""
        self._product = None


def norm_output(x: Tensor, w: Tensor, factors: Tensor, offset: float, rounded: bool) -> Tensor:
    """`x ρ (w + offset)` to Liger's bits.

    Args:
        x: `[rows, in]`.
        w: `[in]`.
        factors: ρ, `[rows]` in float32.
        offset: what is added to w.
        rounded: whether `x ρ` is rounded to x's dtype first.
    """
    if x.is_cuda and (launch := working_kernels(x.device)):
        return launch.norm_output(x, w, factors, offset, rounded)
    product = x * factors[:, None]
    product = product.to(x.dtype) if rounded else product
    return (product * (w.float() + offset)).to(x.dtype)


def is_retained() -> bool:
    """Whether the backward that runs leaves its graph for another one."""
    return torch._C._autograd._get_current_graph_task_keep_graph()  # pyright: ignore[reportAttributeAccessIssue]


def is_kept(saved: Any, x: Tensor) -> bool:
    """Whether a graph holds a tensor of the size and dtype of x as it is, and not as hooks have packed it."""
    if getattr(saved, "unpack_hook", saved) is not None or not isinstance(saved.data, Tensor):
        return False
    kept: Tensor = saved.data
    return kept.dtype == x.dtype and kept.numel() == x.numel() and kept.shape[-1:] == x.shape[-1:]


RECIPES: dict[str, Callable[[Any, Tensor], Recipe | None]] = {
    "MulBackward0": multiplied,
    "LigerSiLUMulFunctionBackward": gated,
    "LigerRMSNormFunctionBackward": normed,
}
"""By the name of the function that made an input."""
ROUNDED = {0: True, 1: False}
"""Whether Liger's RMSNorm rounds before it multiplies with w, by its number for how it casts: as Llama, as Gemma."""
