"""What an evaluation found: a share of right answers with its interval, a mean score, or a loss."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from .interval import wilson_interval

__all__ = ["Accuracy", "Loss", "Score", "TaskResult"]


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

    def to_dict(self) -> dict[str, float]:
        """With the 95% interval of a mean, score ± 1.96 deviation/√n, as in `ist_eval.json`."""
        half = NormalDist().inv_cdf(0.975) * self.deviation / math.sqrt(self.total)
        return {"score": self.score, "low": self.score - half, "high": self.score + half, "total": self.total}

    def __str__(self) -> str:
        found = self.to_dict()
        return f"score {self.score:.4g} ({found['low']:.4g} to {found['high']:.4g}), mean of {self.total}"


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
