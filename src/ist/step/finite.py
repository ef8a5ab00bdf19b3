"""Weights that are NaN or infinite never become finite again: the training stops there, and says so.

Gradients may overflow: a GradScaler skips such a step and the weights stay finite, so gradients and losses are not
looked at. `skipped` counts such steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ..runtime.distributed import Ranks

__all__ = ["CHECK_INTERVAL", "BrokenStartError", "FiniteWeights", "NotFiniteError", "all_finite", "is_finite"]

CHECK_INTERVAL = 10
"""Optimizer steps between two checks, each of which waits for the device once."""
ADVICE = "Give a lower learning rate, more warm-up steps, gradient clipping (max_grad_norm=1.0), or bf16 for fp16."


class NotFiniteError(ValueError):
    """The trained weights hold NaN or infinite numbers."""


class BrokenStartError(NotFiniteError):
    """The trained weights hold them before the first step of this training."""


class FiniteWeights:
    """Checks that the weights in training are finite, on every rank at once.

    Args:
        model: names the weights.
        parameters: those that train.
        ranks: the processes that train together.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
        self._model, self._parameters, self._ranks = model, parameters, ranks
        self._finite_step: int | None = None
        self._first_step: int | None = None

    @property
    def unchecked(self) -> bool:
        """Whether `check` was never called; call it before the first step."""
        return self._first_step is None

    def check(self, step: int) -> None:
        """Check the weights, once for a step. A collective.

        Args:
            step: optimizer steps done.

        Raises:
            NotFiniteError: on every rank, where those of one rank are not finite.
        """
        if step == self._finite_step:
            return
        if self._first_step is None:
            self._first_step = step
        if not self._ranks.all(all_finite(self._parameters)):
            raise self._describe(step)
        self._finite_step = step

    def _describe(self, step: int) -> NotFiniteError:
        broken = {id(parameter) for parameter in self._parameters if not is_finite(parameter)}
        names = [name for name, parameter in self._model.named_parameters() if id(parameter) in broken]
        where = f"{len(names)} of {len(self._parameters)} tensors, {names[0]} first" if names else "on another process"
        if self._finite_step is None and step:
            return BrokenStartError(
                f"The trained weights are NaN or infinite where this run resumes, before step {step + 1} ({where}): "
                "the checkpoint that it resumes from holds them. Resume from an earlier one, or train anew."
            )
        if self._finite_step is None:
            return BrokenStartError(
                f"The trained weights are NaN or infinite from the start, before step 1 ({where}): load the model and "
                "its adapter anew, and initialise what is new in it."
            )
        since = "at the start" if self._finite_step == self._first_step else f"after step {self._finite_step}"
        return NotFiniteError(
            f"The trained weights are NaN or infinite after step {step} ({where}; they were finite {since}). {ADVICE}"
        )


@torch.no_grad()
def all_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether every number in these tensors is finite; of sharded ones, in this rank's shards.

    The norm of all of them is one fused reduction, and NaN or infinite where a number is. It also overflows for finite
    numbers of float16, so that only a finite norm decides.
    """
    tensors = [local(parameter) for parameter in parameters]
    return bool(get_total_norm(tensors).isfinite()) or all(map(is_finite, tensors))


def is_finite(parameter: Tensor) -> bool:
    """Whether every number in a tensor, or in this rank's shard of it, is finite."""
    return bool(local(parameter.detach()).isfinite().all())


def local(parameter: Any) -> Tensor:
    """The part of a tensor that this rank holds."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
