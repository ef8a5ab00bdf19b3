"""Equations 9 and 10, against the printed formulas and their identities."""

import math
import random

import pytest
import torch

from ist.method.importance import ImportanceState, candidate_rewards, init_importance, update_importance

ROUNDING = 1e-12
"""What sums of a few float64 numbers of size 10 may differ by."""


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def draw_problem(seed: int) -> tuple[ImportanceState, list[tuple[int, ...]], torch.Tensor]:
    """A state with unequal scores, candidate sets of one size, and losses of about one nat."""
    generator = random.Random(seed)
    num_layers = generator.randint(2, 12)
    size = generator.randint(1, num_layers)
    num_candidates = generator.randint(2, 6)
    state = ImportanceState(tensor(*(generator.gauss(0, 2) for _ in range(num_layers))), num_updates=seed)
    candidates = [tuple(sorted(generator.sample(range(num_layers), size))) for _ in range(num_candidates)]
    return state, candidates, tensor(*(generator.expovariate(1) for _ in range(num_candidates)))


# Reference


@pytest.mark.parametrize(
    ("likelihoods", "expected"),
    [
        ((0.5, 0.25), (0.125, -0.125)),
        ((1.0, 0.5, 0.0), (0.5, 0.0, -0.5)),
        ((0.75, 0.25, 0.25, 0.75), (0.25, -0.25, -0.25, 0.25)),
        ((0.5, 0.5, 0.5, 0.5), (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_rewards_by_hand(likelihoods, expected):
    losses = tensor(*(-math.log(likelihood) if likelihood else math.inf for likelihood in likelihoods))
    assert candidate_rewards(losses).tolist() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("score_step", "before", "expected"),
    [
        # Layer 0 is in the first set, 1 in both, 2 in the second, 3 in none; rewards 1/8 and -1/8, mu = 8.
        ("additive", (0.0, 0.0, 0.0, 0.0), (1.0, 0.0, -1.0, 0.0)),
        ("additive", (0.5, -2.0, 4.0, 1.0), (1.5, -2.0, 3.0, 1.0)),
        # p (1 - p) is 1/4 at score 0, and 3/16 at log 3, where p = 3/4.
        ("sigmoid_gradient", (0.0, 0.0, 0.0, 0.0), (0.25, 0.0, -0.25, 0.0)),
        (
            "sigmoid_gradient",
            (math.log(3), 1.0, -math.log(3), 2.0),
            (math.log(3) + 3 / 16, 1.0, -math.log(3) - 3 / 16, 2.0),
        ),
    ],
)
def test_one_update_by_hand(score_step, before, expected):
    state = ImportanceState(tensor(*before), num_updates=4)
    after = update_importance(state, [(0, 1), (1, 2)], tensor(0.125, -0.125), 8.0, score_step)
    assert after.scores.tolist() == pytest.approx(expected, abs=1e-15)
    assert after.num_updates == 5


@pytest.mark.parametrize("score_step", ["additive", "sigmoid_gradient"])
def test_equals_a_naive_twin_over_100_updates(score_step):
    generator = random.Random(0)
    num_layers, mu = 9, 10.0
    naive = [0.0] * num_layers
    state = init_importance(num_layers)
    assert state.scores.dtype == torch.float64
    for _ in range(100):
        candidates = [generator.sample(range(num_layers), 4) for _ in range(3)]
        losses = [generator.expovariate(1) for _ in range(3)]
        likelihoods = [math.exp(-loss) for loss in losses]
        rewards = [likelihood - sum(likelihoods) / 3 for likelihood in likelihoods]
        step_sizes = [mu] * num_layers
        if score_step == "sigmoid_gradient":
            sigmoids = [1 / (1 + math.exp(-score)) for score in naive]
            step_sizes = [mu * p * (1 - p) for p in sigmoids]
        for candidate, reward in zip(candidates, rewards, strict=True):
            for layer in candidate:
                naive[layer] += step_sizes[layer] * reward
        state = update_importance(state, candidates, candidate_rewards(tensor(*losses)), mu, score_step)
        assert state.scores.tolist() == pytest.approx(naive, abs=1e-9)
    assert state.num_updates == 100


# Determinism


@pytest.mark.parametrize("score_step", ["additive", "sigmoid_gradient"])
def test_an_update_is_a_value_the_input_is_untouched(score_step):
    state, candidates, losses = draw_problem(3)
    scores_before, losses_before = state.scores.clone(), losses.clone()
    rewards = candidate_rewards(losses)
    rewards_before = rewards.clone()
    first = update_importance(state, candidates, rewards, 10.0, score_step)
    second = update_importance(state, candidates, rewards, 10.0, score_step)
    assert torch.equal(first.scores, second.scores)
    assert not torch.equal(first.scores, scores_before)
    assert state.num_updates == 3
    for now, before in ((state.scores, scores_before), (losses, losses_before), (rewards, rewards_before)):
        assert torch.equal(now, before)


def test_all_layers_begin_alike():
    state = init_importance(5)
    assert state.scores.tolist() == [0.0] * 5
    assert state.num_updates == 0


def test_a_reward_for_each_candidate_is_required():
    with pytest.raises(ValueError, match="zip"):
        update_importance(init_importance(3), [(0,), (1,), (2,)], tensor(0.1, -0.1), 1.0)


# Convergence


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("score_step", "mu"), [("additive", 1.0), ("sigmoid_gradient", 10.0)])
def test_the_layers_that_matter_end_with_the_highest_scores(score_step, mu, seed):
    """Twelve layers; suppressing layer i costs effects[i] nats; each update has another batch loss; uniform sets."""
    effects = [0.01, 0.3, 0.0, 0.02, 0.35, 0.0, 0.01, 0.4, 0.02, 0.0, 0.01, 0.0]
    generator = random.Random(seed)
    state = init_importance(len(effects))
    for _ in range(300):
        candidates = [generator.sample(range(12), 6) for _ in range(3)]
        batch = generator.gauss(1.0, 0.3)
        losses = [
            batch + sum(effect for layer, effect in enumerate(effects) if layer not in kept) for kept in candidates
        ]
        state = update_importance(state, candidates, candidate_rewards(tensor(*losses)), mu, score_step)
    assert set(state.scores.topk(3).indices.tolist()) == {1, 4, 7}


# Properties


@pytest.mark.parametrize("seed", range(10))
def test_rewards_sum_to_zero_and_order_as_the_losses_do(seed):
    _, _, losses = draw_problem(seed)
    rewards = candidate_rewards(losses)
    assert float(rewards.sum()) == pytest.approx(0, abs=ROUNDING)
    assert rewards.argsort(descending=True).tolist() == losses.argsort().tolist()
    assert bool(rewards.all())


@pytest.mark.parametrize("seed", range(10))
def test_sets_of_one_size_conserve_the_sum_of_the_scores(seed):
    state, candidates, losses = draw_problem(seed)
    after = update_importance(state, candidates, candidate_rewards(losses), 10.0)
    assert float(after.scores.sum()) == pytest.approx(float(state.scores.sum()), abs=ROUNDING)


@pytest.mark.parametrize("score_step", ["additive", "sigmoid_gradient"])
@pytest.mark.parametrize("seed", range(10))
def test_rewarding_the_kept_layers_equals_charging_the_suppressed_ones(seed, score_step):
    state, kept, losses = draw_problem(seed)
    layers = range(len(state.scores))
    suppressed = [[layer for layer in layers if layer not in candidate] for candidate in kept]
    rewards = candidate_rewards(losses)
    rewarded = update_importance(state, kept, rewards, 10.0, score_step)
    charged = update_importance(state, suppressed, -rewards, 10.0, score_step)
    assert torch.allclose(rewarded.scores, charged.scores, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("size", [1, 4])
def test_a_step_is_proportional_to_mu(size):
    state = init_importance(4)
    candidates = [tuple(range(size)), (0,)]
    rewards = tensor(0.25, -0.125)
    small = update_importance(state, candidates, rewards, 2.0).scores
    assert torch.equal(update_importance(state, candidates, rewards, 8.0).scores, 4 * small)
    assert torch.equal(update_importance(state, candidates, rewards, 0.0).scores, state.scores)


@pytest.mark.parametrize("losses", [(1e3, 2e3, 3e3), (0.0, 1e308, 5.0), (math.inf, 1.0, 2.0)])
def test_losses_that_are_large_give_finite_rewards(losses):
    rewards = candidate_rewards(tensor(*losses))
    assert bool(torch.isfinite(rewards).all())
    assert float(rewards.sum()) == pytest.approx(0, abs=ROUNDING)
