"""Steps that a GradScaler skips: a few find its scale, and a long row of them is a training that trains nothing."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from typing import Any

from ..adapters.layers import Layer
from ..runtime.part import Part
from .boundary import Boundary
from .finite import NotFiniteError, local

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
    """Counts the steps that were begun, lost their gradients, and got no update.

    Fused optimizers and Accelerate's say so themselves, and the training stops. Elsewhere a loop may drop gradients for
    reasons of its own, and a warning is given, once. A loop that clears gradients where the next step begins, and not
    after the optimizer, looks like one that accumulates: there only fused optimizers are seen to skip.

    Args:
        layers: those that train.
        boundary: sees what fused optimizers do.
    """

    def __init__(self, layers: Sequence[Layer], boundary: Boundary) -> None:
        self.optimizer: Any = None
        """As the user gave it, perhaps wrapped by Accelerate."""
        self._layers, self._boundary = layers, boundary
        self._num_begun = self._num_skipped = 0
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
        told, self._boundary.skipped = self._boundary.skipped, False  # Each is counted once.
        if self._num_begun == 1 or not (told or self._cleared()):
            return
        self._num_skipped += 1
        if told or getattr(self.optimizer, "step_was_skipped", False):
            check_skipped(self._num_skipped)
        elif self._num_skipped >= MOST_SKIPPED and not self._warned:
            self._warned = True
            warnings.warn(
                f"The last {self._num_skipped} steps ended without an update by the optimizer, and without gradients: "
                f"a GradScaler skips steps whose gradients are NaN or infinite. Nothing trains. {ADVICE}",
                stacklevel=2,
            )

    def end(self) -> None:
        """The optimizer has stepped."""
        self._num_begun = self._num_skipped = 0

    def give_up(self) -> None:
        """An exception is no skipped step."""
        self._num_begun = 0

    def close(self) -> None:
        """Leave the optimizer alone."""
        self.optimizer = None

    def _cleared(self) -> bool:
        """Whether the gradients are gone that an update would take. To see zeros waits for the device: only late."""
        gradients = [parameter.grad for parameter in self._layers[max(self._active)].parameters]
        present = [local(gradient) for gradient in gradients if gradient is not None]
        if not present:
            return True
        if self._num_begun < MOST_SKIPPED:
            return False
        return not any(bool(gradient.any()) for gradient in present)


def check_skipped(num_skipped: int) -> None:
    """Raise SkippedError where so many steps in a row were skipped that no more will be made."""
    if num_skipped >= MOST_SKIPPED:
        raise SkippedError(
            f"The gradients were NaN or infinite in the last {num_skipped} steps, which the GradScaler has skipped: "
            f"the weights are as they were before. {ADVICE}"
        )
