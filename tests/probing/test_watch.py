"""What is said of losses from which no importance can be learned: once, and never wrongly."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ist.method.importance import candidate_rewards, init_importance, update_importance
from ist.probing.watch import ENOUGH, LearningWatch


def losses(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def messages(given: Tensor, times: int, mu: float = 10.0, resumed: bool = False) -> dict[int, str]:
    """What is said after which of so many updates with the same losses."""
    watch = LearningWatch(mu)
    if resumed:
        watch.resume()
    said = [watch.see(given) for _ in range(times)]
    return {number: text for number, text in enumerate(said, 1) if text}


@pytest.mark.parametrize("level", [4639.0, 800.0, 12.0])
def test_losses_that_vanish_are_said_at_the_first_update(level: float) -> None:
    said = messages(losses(level, level + 1, level + 2), 100)
    assert list(said) == [1]
    assert f"about {level + 1:.4g} nats" in said[1]


@pytest.mark.parametrize(
    ("values", "mu"),
    [((4.0, 4.1, 4.2), 10.0), ((0.5, 0.6, 0.7), 10.0), ((8.0, 8.1, 8.2), 1000.0), ((-3.0, -2.9), 10.0)],
)
def test_losses_that_teach_are_not_spoken_of(values: tuple[float, ...], mu: float) -> None:
    assert not messages(losses(*values), 100, mu)


def test_losses_that_lie_too_close_together_are_said_when_that_is_clear() -> None:
    given = losses(4.0, 4.0001, 4.0002)
    assert list(messages(given, 100)) == [ENOUGH]
    assert not messages(given, 100, mu=1e4)
    assert not messages(given, 100, resumed=True), "scores may have moved before"


def test_no_score_is_beyond_what_the_watch_sums_up() -> None:
    """Also where a layer stands in several sets, whose credits add up."""
    watch, state = LearningWatch(10.0), init_importance(6)
    generator = torch.Generator().manual_seed(1)
    for number in range(ENOUGH):
        given = torch.rand(5, generator=generator, dtype=torch.float64) + 1
        watch.see(given)
        sets = [[0], [0], [0, 1], [1], [2]] if number else [[0], [0], [1], [1], [2]]
        state = update_importance(state, sets, candidate_rewards(given), 10.0)
        assert float(state.scores.abs().max()) <= watch.reach * (1 + 1e-9)


def test_what_is_not_finite_and_what_is_not_to_be_learned_say_nothing() -> None:
    assert not messages(losses(float("nan"), 1.0), 30)
    assert not messages(losses(4000.0, 4001.0), 30, mu=0.0)
