"""A part of an optimizer step: what is done to the model around it, and undone."""

from __future__ import annotations

from collections.abc import Collection

__all__ = ["Part"]


class Part:
    """One thing that a step does. A tuner holds its parts in order and knows none of them by name.

    The moments of a step come in this order: `begin`, the user's forwards and backwards, `before_update`, the
    optimizer's own step, `after_update`, `end`. A part overrides those that it needs.
    """

    def check_length(self, num_steps: int) -> None:
        """Warn where a training of `num_steps` optimizer steps does not fit what this part does."""

    def begin(self, active: Collection[int], step: int) -> None:
        """A step begins.

        Args:
            active: indices of the layers that it trains.
            step: optimizer steps done so far.
        """

    def before_update(self) -> None:
        """The optimizer is about to update the weights."""

    def after_update(self, step: int) -> None:
        """The optimizer has updated the weights, and the gradients are still there.

        Args:
            step: optimizer steps done before this one.
        """

    def end(self) -> None:
        """The step is over: every layer may train."""

    def give_up(self) -> None:
        """The step is given up, as after an exception: every layer may train, and nothing of the step counts."""
        self.end()

    def close(self) -> None:
        """Leave the model as it was."""
