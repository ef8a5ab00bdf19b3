"""What a suppressed layer returns (eq. 8): `m + β·a`, its base output and the scaled response of its adapters.

Where a factor of a module is proportional to its response, that factor is multiplied by β instead, which is free
(`ist.adapters.responses`, and row by row in the fused LoRA for all candidates at once, `ist.probing.batched`);
`tests/adapters/test_equation8.py` compares each of these ways with `blend`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["blend"]


def blend(base: Any, full: Any, beta: float) -> Any:
    """`m + β·a = base + β·(full − base)` of a tensor, or of each floating-point tensor in a tuple or list (eq. 8).

    What is no such tensor (a cache, a shape, None) has no response and is returned as the full module gave it.

    Args:
        base: what a module returns without its adapters.
        full: what it returns with them, of the same shapes.
        beta: factor on the response, in [0, 1].

    Raises:
        ValueError: the output is a mapping, in which nothing tells what the response is; shapes differ.
    """
    if isinstance(full, Mapping) and any(isinstance(v, Tensor) and v.is_floating_point() for v in full.values()):
        raise ValueError(
            f"An adapted module returned a {type(full).__name__}, whose response cannot be scaled: adapt modules that "
            "return tensors, such as linear ones with LoRA."
        )
    if isinstance(full, (tuple, list)):
        parts = [blend(b, f, beta) for b, f in zip(base, full, strict=True)]
        return type(full)(*parts) if hasattr(full, "_fields") else type(full)(parts)
    if isinstance(full, Tensor) and full.is_floating_point():
        return base + beta * (full - base)
    return full
