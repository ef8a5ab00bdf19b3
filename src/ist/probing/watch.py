"""Whether an importance loop can learn anything: losses at which `exp(−L)` leaves the choice nearly uniform."""

from __future__ import annotations

import math

from torch import Tensor

from ..method.importance import candidate_rewards

__all__ = ["LearningWatch"]

VISIBLE = 0.1
"""A score below it changes its layer's probability of being chosen, `sigmoid(I)`, by less than 5%."""
ANY_TRAINING = 1000
"""More importance updates than a training has."""
ENOUGH = 20
"""Updates after which the rest is foreseen, where their number is not known."""
LONG = 10
"""How many times longer a training of an unknown length may be."""


class LearningWatch:
    """Sums up how far the scores can have moved, and says once where the choice stays nearly uniform.

    An update moves a score by `μ·max_j |r_j|` at most (eq. 9 and 10), and `|r_j| <= exp(−min_k L_k)`: losses of a dozen
    nats teach nothing, whatever the layers are. Otherwise the bound is extrapolated to the end of the training.

    Args:
        mu: step size of the scores.
    """

    def __init__(self, mu: float) -> None:
        self.num_expected: int | None = None
        """Updates of the whole training, where that is known."""
        self._mu = mu
        self._num = 0
        self._reach = 0.0
        self._done = mu == 0  # Scores that are to stay.

    def see(self, losses: Tensor) -> str | None:
        """What there is to say after an update with these losses, float64 of shape `[N_c]` in nats; once at most."""
        if self._done or not bool(losses.isfinite().all()):
            return None
        self._num += 1
        self._reach += self._mu * float(candidate_rewards(losses).abs().max())
        if self._mu * math.exp(-max(float(losses.min()), 0.0)) * ANY_TRAINING < VISIBLE:
            self._done = True
            return (
                f"The losses are about {float(losses.mean()):.4g} nats, and exp(-loss) is then so small that no "
                "importance is learned and the choice of layers stays uniform: pass a loss_function that returns a "
                "mean over tokens or scales the loss to a few nats, or choose without measuring with selector='random'."
            )
        if self._num < (ENOUGH if self.num_expected is None else max(1, self.num_expected // 2)):
            return None
        self._done = True
        ahead = LONG if self.num_expected is None else self.num_expected / self._num
        if self._reach * ahead >= VISIBLE:
            return None
        least = 10 ** math.ceil(math.log10(self._mu * VISIBLE / (self._reach * ahead))) if self._reach else None
        raised = f"raise mu={self._mu:g} to {least:g} or more, " if least else ""
        return (
            f"After {self._num} importance updates no score can have moved by more than {self._reach:.2g}, so the "
            f"choice of layers stays nearly uniform: {raised}measure more often (update_interval), or save the "
            "measuring with selector='random'."
        )
