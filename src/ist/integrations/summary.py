"""What a training reports of its choice of layers, and what it is told where nothing can be learned."""

from __future__ import annotations

from logging import getLogger
from typing import Any

import torch

from ..method.registry import LearnedSelector
from ..probing.watch import VISIBLE, nearly_uniform
from ..tuner import SparseTuner

__all__ = ["summarize", "warn_of_no_update", "warn_of_uniform_choice"]

logger = getLogger(__name__)


def summarize(tuner: SparseTuner) -> dict[str, float]:
    """The state of the choice in a few numbers, for reporters."""
    summary: dict[str, float] = {"ist/num_steps": tuner.num_steps}
    update = tuner.last_update
    if update is not None:
        scores = torch.tensor(update.importance)
        summary["ist/importance_min"] = scores.min().item()
        summary["ist/importance_max"] = scores.max().item()
        summary["ist/importance_std"] = scores.std().item()
        summary["ist/most_important_layer"] = int(scores.argmax())
        if update.skipped is None:
            summary["ist/probe_loss"] = sum(update.losses) / len(update.losses)
        summary["ist/probe_seconds"] = tuner.probe_seconds
        summary["ist/probe_share"] = tuner.probe_share
    return summary


def warn_of_no_update(tuner: SparseTuner, selector: Any, num_steps: int) -> None:
    """Say where the training ends before anything is learned of the layers."""
    if selector == "ist" and tuner.config.update_interval > num_steps and tuner.ranks.is_main:
        logger.warning(
            "IST measures importance every %d steps and this training has %d, so its layers are chosen at random "
            "throughout: set update_interval to a smaller number, or train longer.",
            tuner.config.update_interval,
            num_steps,
        )


def warn_of_uniform_choice(tuner: SparseTuner) -> None:
    """Say at the end of a training that its scores have hardly moved, where nothing has said it before."""
    update, mu = tuner.last_update, tuner.config.mu
    if update is None or mu == 0 or tuner._measurement.watch.said or not isinstance(tuner.selector, LearnedSelector):
        return
    reach = max(map(abs, update.importance))
    if reach < VISIBLE and tuner.ranks.is_main:
        logger.warning(nearly_uniform(int(tuner.selector.state_dict()["num_updates"]), reach, mu))
