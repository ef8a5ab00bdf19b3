"""Whether an importance loop can learn anything: losses at which `exp(−L)` leaves the choice nearly uniform."""

from __future__ import annotations

from torch import Tensor

from ..method.importance import candidate_rewards

__all__ = ["VISIBLE", "LearningWatch", "nearly_uniform"]

VISIBLE = 0.1
"""A score below it changes its layer's probability of being chosen, `sigmoid(I)`, by less than 5%."""
MANY_UPDATES = 1000
"""More importance updates than a training has."""
ENOUGH = 20
"""Updates after which the rest of the training is foreseen."""
AHEAD = 10
"""How many times as far the scores may come until its end."""


def nearly_uniform(num_updates: int, reach: float, mu: float) -> str:
    """What there is to say of scores that moved by at most `reach`, with the step size `mu`."""
    return (
        f"After {num_updates} importance updates no score has moved by more than {reach:.2g}, so the choice of layers "
        f"is nearly uniform: raise mu (it is {mu:g}; the paper has 100 for short trainings), measure more often "
        "(update_interval), or save the measuring with selector='random'."
    )


class LearningWatch:
    """Sums up how far the scores can have moved, and says once where the choice stays nearly uniform.

    An update moves a score by `μ·Σ_j |r_j| / 2` at most, since rewards sum up to 0 (eq. 9 and 10), and by no more than
    `μ·Σ_j exp(−L_j)`: losses of a dozen nats teach nothing, whatever the layers are. Otherwise it is foreseen after
    `ENOUGH` updates.

    Args:
        mu: step size of the scores.
    """

    def __init__(self, mu: float) -> None:
        self.said = False
        """Whether something was reported."""
        self.reach = 0.0
        """How far a score can have moved since the start, or since the run was resumed."""
        self._mu = mu
        self._num = 0
        self._foresees = True

    def resume(self) -> None:
        """Foresee nothing: the scores had moved before."""
        self._foresees = False

    def see(self, losses: Tensor) -> str | None:
        """What there is to say after an update with these losses, float64 of shape `[N_c]` in nats; once at most."""
        if self.said or self._mu == 0 or not bool(losses.isfinite().all()):
            return None
        self._num += 1
        self.reach += self._mu * float(candidate_rewards(losses).abs().sum()) / 2
        if self._mu * float((-losses).exp().sum()) * MANY_UPDATES < VISIBLE:
            self.said = True
            return (
                f"The losses are about {float(losses.mean()):.4g} nats, and exp(-loss) is then so small that no "
                "importance is learned and the choice of layers stays uniform: pass a loss_function that returns a "
                "mean over tokens or scales the loss to a few nats, or choose without measuring with selector='random'."
            )
        if self._foresees and self._num == ENOUGH and self.reach * AHEAD < VISIBLE:
            self.said = True
            return nearly_uniform(self._num, self.reach, self._mu)
        return None
