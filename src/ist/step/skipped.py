"""Steps that a GradScaler skips: a few find its scale, and a long row of them is a training that trains nothing."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

from ..adapters.view import ModelView
from ..runtime.part import Part
from .boundary import Boundary
from .finite import NotFiniteError

__all__ = ["MOST_SKIPPED", "SkippedError", "SkippedSteps", "check_skipped"]

MOST_SKIPPED = 50
"""Steps in a row. A GradScaler halves its scale at each, from 2¹⁶ to 2⁻³⁴: smaller ones let no gradient overflow."""
ADVICE = (
    "Give bf16 for fp16, gradient clipping (max_grad_norm=1.0) or a lower learning rate, or look for rows whose loss "
    "is NaN."
)


class SkippedError(NotFiniteError):
    """A GradScaler skips every step: the weights are as good as they were before."""


class SkippedSteps(Part):
    """Counts the steps that were begun and got no update.

    Those that a GradScaler skips are seen at its `step`, and the training stops. A loop may also skip steps by itself,
    or drop gradients for reasons of its own: where they are gone when the next step begins, a warning is given, once.

    Args:
        view: the model in training. Gradients that are sharded are not looked at: a rank may hold nothing of a tensor,
            and without synchronisation there are none before the last micro-batch.
        boundary: sees updates and skipped steps.
    """

    def __init__(self, view: ModelView, boundary: Boundary) -> None:
        self.optimizer: Any = None
        """As the user gave it, perhaps wrapped by Accelerate."""
        self._layers = () if view.sharded else view.layers
        self._boundary = boundary
        self._num_begun = self._num_lost = 0
        self._warned = False
        self._active: Collection[int] = ()

    def begin(self, active: Collection[int], step: int) -> None:
        """A step begins, or continues."""
        self._active = active
        self.continues()

    def continues(self) -> None:
        """A step is begun or begun once more: the micro-batch before it ended without an update.

        Raises:
            SkippedError: too many were skipped.
        """
        self._num_begun += 1
        # Accelerate's flag stays through the micro-batches of the next step, which have gradients from the second on.
        if self._num_begun > 1 and getattr(self.optimizer, "step_was_skipped", False) and self._cleared():
            self._boundary.ask(self.optimizer)
        check_skipped(self._boundary)
        if self._num_begun == 1 or self._boundary.num_skipped or not self._cleared():
            return
        self._num_lost += 1
        if self._num_lost >= MOST_SKIPPED and not self._warned:
            self._warned = True
            warnings.warn(
                f"The last {self._num_lost} steps ended without an update by the optimizer, and without gradients, so "
                "nothing trains: loops that clear gradients without optimizer.step() do so, and those that skip steps "
                f"whose gradients are NaN or infinite. {ADVICE}",
                stacklevel=2,
            )

    def end(self) -> None:
        """The optimizer has stepped."""
        self._num_begun = self._num_lost = 0

    def give_up(self) -> None:
        """An exception is no skipped step."""
        self._num_begun = 0

    def close(self) -> None:
        """Let the optimizer go."""
        self.optimizer = None

    def _cleared(self) -> bool:
        """Whether the gradients are gone that an update would take. To see zeros waits for the device: only late."""
        if not self._layers or not self._active:
            return False
        gradients = [parameter.grad for parameter in self._layers[max(self._active)].parameters]
        present = [gradient for gradient in gradients if gradient is not None]
        if not present:
            return True
        if self._num_begun < MOST_SKIPPED:
            return False
        return not any(bool(gradient.any()) for gradient in present)


def check_skipped(boundary: Boundary) -> None:
    """Raise SkippedError where so many steps in a row were skipped that no more will be made; it counts anew then."""
    num_skipped = boundary.num_skipped
    if num_skipped >= MOST_SKIPPED:
        boundary.count_anew()
        raise SkippedError(
            f"The gradients were NaN or infinite in the last {num_skipped} steps, which the GradScaler has skipped: "
            f"the weights are as they were before. {ADVICE}"
        )
