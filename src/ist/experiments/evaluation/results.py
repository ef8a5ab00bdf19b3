"""What an evaluation found: a share of right answers with its interval, a mean score, or a loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from ..statistics import t_quantile
from .interval import wilson_interval

__all__ = ["Accuracy", "Loss", "Score", "TaskResult"]

MANY = 200
"""Values from which Student's t is as good as normal, within 1%."""


@dataclass(frozen=True)
class Accuracy:
    """Right answers among all."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """The share of right answers."""
        return self.correct / self.total

    def to_dict(self) -> dict[str, float]:
        """With the 95% interval of Wilson, as in `ist_eval.json`."""
        low, high = wilson_interval(self.correct, self.total)
        return {"accuracy": self.accuracy, "low": low, "high": high, "correct": self.correct, "total": self.total}

    def __str__(self) -> str:
        low, high = wilson_interval(self.correct, self.total)
        return f"{self.accuracy:.1%} ({low:.1%} to {high:.1%}), {self.correct} of {self.total}"


@dataclass(frozen=True)
class Loss:
    """A mean over tokens."""

    loss: float
    """In nats a token."""
    tokens: int

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where a float cannot hold it."""
        return math.exp(self.loss) if self.loss < 709 else math.inf

    def to_dict(self) -> dict[str, float]:
        """As in `ist_eval.json`."""
        return {"loss": self.loss, "perplexity": self.perplexity, "tokens": self.tokens}

    def __str__(self) -> str:
        return f"loss {self.loss:.4f} nats a token, perplexity {self.perplexity:.2f}, {self.tokens} tokens"


@dataclass(frozen=True)
class Score:
    """A mean over rows of a metric that is not a share of right answers."""

    score: float
    deviation: float
    """The standard deviation over rows, with n - 1."""
    total: int

    def to_dict(self) -> dict[str, Any]:
        """With the 95% interval of a mean, score ± t · deviation/√n, as in `ist_eval.json`; a single row has none."""
        half = None if self.total < 2 else quantile(self.total) * self.deviation / math.sqrt(self.total)
        low, high = (None, None) if half is None else (self.score - half, self.score + half)
        return {"score": self.score, "low": low, "high": high, "total": self.total}

    def __str__(self) -> str:
        found = self.to_dict()
        between = "" if self.total < 2 else f" ({found['low']:.4g} to {found['high']:.4g})"
        return f"score {self.score:.4g}{between}, mean of {self.total}"


def quantile(total: int) -> float:
    """Standard errors from a mean of `total` values, at least 2, to the ends of its 95% interval, by Student's t."""
    return t_quantile(0.975, total - 1) if total <= MANY else NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Metrics:
    """What lm-evaluation-harness reports for a task, where that is no share of right answers."""

    values: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """As in `ist_eval.json`."""
        return dict(self.values)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in self.values.items() if isinstance(value, float))


TaskResult = Accuracy | Loss | Score | Metrics
