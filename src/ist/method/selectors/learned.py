"""The paper's selector: sample by importance, measure candidate sets, learn."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ...config import ISTConfig
from ...runtime.randomness import keyed_generator
from ..importance import ImportanceState, candidate_rewards, init_importance, update_importance
from ..sampling import sample_candidates, sample_cost_aware
from .base import ImportanceUpdate, Measure

__all__ = ["LearnedSelector"]


class LearnedSelector:
    """Importance-aware sampling: eq. 6 and 7 choose, eq. 8 to 10 learn every `T_c` steps.

    Args:
        config: hyperparameters.
        num_layers: `N_L`, layers with adapters.
    """

    def __init__(self, config: ISTConfig, num_layers: int) -> None:
        self._config = config
        self._counts = config.layer_counts(num_layers)
        self._state = init_importance(num_layers)
        self._generator = torch.Generator()
        self._warned = False
        if self._counts.distinct_candidates < 2:
            warnings.warn(
                f"num_unsuppressed_layers={self._counts.unsuppressed} leaves no layer to suppress, so nothing is "
                "measured and the choice stays random: give fewer than the model's layers.",
                stacklevel=2,
            )

    @property
    def importance(self) -> Tensor:
        """The scores `I`, float64 of shape `[N_L]`."""
        return self._state.scores

    def choose(self, step: int) -> tuple[int, ...]:
        """The `N_u` layers of a step, eq. 6 and 7."""
        generator = keyed_generator(self._config.seed, "active", step, self._generator)
        return sample_cost_aware(
            self._state.scores, self._counts.active, generator, str(self._config.policy), self._config.cost_exponent
        )

    def learn(self, step: int, measure: Measure) -> ImportanceUpdate | None:
        """Every `T_c` steps: draw `N_c` candidate sets, have them measured, credit their layers."""
        if step == 0 or step % self._config.update_interval or self._counts.distinct_candidates < 2:
            return None
        drawn, candidates = self._draw_candidates(step)
        losses = measure(candidates)
        if losses is None:
            return None
        reward_tensor = candidate_rewards(losses)
        skipped = self._check(losses, reward_tensor)
        rewards: tuple[float, ...] = ()
        if skipped is None:
            rewards = tuple(reward_tensor.tolist())
            # A set of suppressed layers pays for the loss that it causes.
            credit = -reward_tensor if self._config.candidate_set == "suppressed" else reward_tensor
            self._state = update_importance(self._state, drawn, credit, self._config.mu, str(self._config.score_step))
        return ImportanceUpdate(
            candidates, tuple(losses.tolist()), rewards, tuple(self._state.scores.tolist()), skipped
        )

    def _draw_candidates(self, step: int) -> tuple[tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
        """The drawn sets, and for each the layers that keep their response."""
        config, counts = self._config, self._counts
        generator = keyed_generator(config.seed, "candidates", step)
        if config.candidate_set == "unsuppressed":
            drawn = sample_candidates(
                self._state.scores, counts.unsuppressed, config.num_candidates, generator, str(config.policy)
            )
            return drawn, drawn
        drawn = sample_candidates(
            -self._state.scores,
            counts.total - counts.unsuppressed,
            config.num_candidates,
            generator,
            str(config.policy),
        )
        kept = tuple(tuple(sorted(set(range(counts.total)) - set(suppressed))) for suppressed in drawn)
        return drawn, kept

    def _check(self, losses: Tensor, rewards: Tensor) -> str | None:
        """The reason to learn nothing from these losses, said once, or None."""
        if bool(torch.isfinite(losses).all() and torch.isfinite(rewards).all()):
            return None
        reason = f"losses not finite: {', '.join(f'{loss:g}' for loss in losses.tolist())}"
        if not self._warned:
            self._warned = True
            warnings.warn(f"An importance update was skipped ({reason}); training continues.", stacklevel=4)
        return reason

    def state_dict(self) -> dict[str, Any]:
        """Scores and the number of updates."""
        return {"importance": self._state.scores.tolist(), "num_updates": self._state.num_updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take scores over.

        Raises:
            ValueError: they are of another number of layers, or not finite.
        """
        scores = state["importance"]
        if len(scores) != self._counts.total:
            raise ValueError(
                f"The saved importance has {len(scores)} scores, and this model has {self._counts.total} layers with "
                "adapters: resume with the model and the adapter that the run began with."
            )
        if not all(isinstance(score, float) and math.isfinite(score) for score in scores):
            raise ValueError(
                "The saved importance holds values that are not finite numbers: the checkpoint is damaged."
            )
        self._state = ImportanceState(torch.tensor(scores, dtype=torch.float64), int(state["num_updates"]))
