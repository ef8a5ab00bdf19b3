"""How far an accuracy can be from the truth by chance."""

from __future__ import annotations

import math
from statistics import NormalDist

__all__ = ["wilson_interval"]


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share (Wilson, 1927): it stays in [0, 1] and holds for few answers too.

    Args:
        correct: right answers.
        total: all answers.
        confidence: how often such intervals contain the truth.

    Raises:
        ValueError: there are no answers, more right ones than answers, or a confidence outside of (0, 1).
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} right of {total} answers is no share: give at least one answer.")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} is not between 0 and 1: write 0.95 for 95%.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / total
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    # Rounding would otherwise leave a bound a hair off 0 or 1.
    return (0.0 if correct == 0 else centre - half), (1.0 if correct == total else centre + half)
