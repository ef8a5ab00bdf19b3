"""Counts what a rank gathers and reduces, at the collectives themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["CollectiveBytes"]

GATHERS = ("_allgather_base_", "allgather_", "all_gather_into_tensor")
REDUCES = ("_reduce_scatter_base_", "reduce_scatter_", "reduce_scatter_tensor", "allreduce_", "all_reduce")


class CollectiveBytes(TorchDispatchMode):
    """Within this context, adds up the tensors that go through torch.distributed's collectives.

    It sees every collective of PyTorch's dispatcher, those of DDP's C++ and of FSDP2's backward among them. A gather
    counts what a rank has afterwards, a reduction what it gives. It slows every operation down, so time is taken
    without it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gathered = 0
        """Bytes of the results of all-gathers."""
        self.reduced = 0
        """Bytes of the inputs of reductions: reduce-scatters and all-reduces."""
        self.calls = 0
        """Gathers and reductions."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func.overloadpacket.__name__
            # Of output and input of a gather or a scatter, the larger is the whole.
            if name in GATHERS:
                self.gathered += largest(args)
                self.calls += 1
            elif name in REDUCES:
                self.reduced += largest(args)
                self.calls += 1
        return func(*args, **(kwargs or {}))

    def take(self) -> dict[str, int]:
        """What was counted since the last call."""
        taken = {"gathered": self.gathered, "reduced": self.reduced, "calls": self.calls}
        self.gathered = self.reduced = self.calls = 0
        return taken


def largest(arguments: Iterable[Any]) -> int:
    """Bytes of the largest argument, a tensor or a list of tensors (of lists)."""
    return max((num_bytes(argument) for argument in arguments), default=0)


def num_bytes(value: Any) -> int:
    """Bytes of a tensor, or of all tensors in a list."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    return sum(map(num_bytes, value)) if isinstance(value, (list, tuple)) else 0
