"""Sampling of layer sets: against naive twins and exact distributions."""

import itertools
import math
from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ist.method.sampling import sample_candidates, sample_cost_aware, sample_layers, step_cost
from ist.runtime.randomness import keyed_generator, keyed_seed

POLICIES = ("uniform", "proportional")
NUM_DRAWS = 5000
BOUND = 4.5
"""Standard deviations that a simulated frequency may be off: a fair one is further off once in 150,000 times."""


def sigmoid(score: float) -> float:
    return 1 / (1 + math.exp(-score))


def as_scores(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def naive_sample(scores: list[float], num_layers: int, uniform: list[float], policy: str) -> tuple[int, ...]:
    """Both policies from their definitions, on plain probabilities.

    `uniform` is eq. 6 and 7. `proportional` is a race: layer i arrives after a time that is exponentially distributed
    with rate sigmoid(I_i), and the first ones win, which draws without replacement in proportion to the rates.
    """
    if policy == "uniform":
        drawn = [u * sigmoid(score) for u, score in zip(uniform, scores, strict=True)]
    else:
        drawn = [math.log(u) / sigmoid(score) for u, score in zip(uniform, scores, strict=True)]
    best_first = sorted(range(len(scores)), key=lambda layer: -drawn[layer])
    return tuple(sorted(best_first[:num_layers]))


def assert_frequency(count: int, num_draws: int, exact: float) -> None:
    """A count is within BOUND standard deviations of its exact expectation (and within one draw of certainty)."""
    tolerance = BOUND * math.sqrt(exact * (1 - exact) / num_draws) + 1 / num_draws
    assert abs(count / num_draws - exact) <= tolerance


# Reference


@pytest.mark.parametrize("policy", POLICIES)
def test_equals_the_naive_twin_on_the_same_draws(policy):
    source = torch.Generator().manual_seed(1)
    for step in range(200):
        total = 2 + step % 31
        scores = torch.randn(total, generator=source, dtype=torch.float64) * (0.1, 1, 10)[step % 3]
        num_layers = 1 + step % total
        uniform = torch.rand(total, generator=keyed_generator(0, "test", step), dtype=torch.float64)
        expected = naive_sample(scores.tolist(), num_layers, uniform.tolist(), policy)
        assert sample_layers(scores, num_layers, keyed_generator(0, "test", step), policy) == expected


def exact_activity(score: float, total: int, num_layers: int, policy: str) -> float:
    """P(layer active) with its score at `score` and all others at 0, by summation instead of simulation."""
    weight = sigmoid(score)
    if policy == "proportional":
        missed = 1.0
        for drawn in range(num_layers):
            missed *= 1 - weight / (weight + 0.5 * (total - 1 - drawn))
        return 1 - missed

    def fewer_above(p: float) -> float:
        """P(fewer than num_layers of the others, uniform on (0, 1/2), are above p)."""
        above = max(0.0, 1 - 2 * p)
        others = total - 1
        return sum(math.comb(others, k) * above**k * (1 - above) ** (others - k) for k in range(num_layers))

    points = 4000
    return sum(fewer_above((i + 0.5) / points * weight) for i in range(points)) / points


# Score of the lone layer, then P(active) to three decimals by eq. 6 and 7, and by draws in proportion to the sigmoid.
ACTIVITY = [
    (-3.0, 0.000, 0.027),
    (-1.0, 0.000, 0.144),
    (-0.5, 0.043, 0.196),
    (-0.25, 0.144, 0.223),
    (0.0, 0.250, 0.250),
    (0.5, 0.398, 0.300),
    (1.0, 0.487, 0.341),
    (3.0, 0.606, 0.417),
]


@pytest.mark.parametrize(
    ("policy", "score", "printed"),
    [(policy, row[0], row[1 + column]) for column, policy in enumerate(POLICIES) for row in ACTIVITY],
)
def test_a_lone_layer_is_active_as_often_as_theory_says(policy, score, printed):
    total, num_layers = 32, 8
    exact = exact_activity(score, total, num_layers, policy)
    assert exact == pytest.approx(printed, abs=5.1e-4)
    if policy == "uniform" and score >= 0:
        assert exact == pytest.approx(1 - (1 - num_layers / total) / (2 * sigmoid(score)), abs=1e-6)
    scores = torch.zeros(total, dtype=torch.float64)
    scores[5] = score
    generator = keyed_generator(0, policy, 0)
    count = sum(5 in sample_layers(scores, num_layers, generator, policy) for _ in range(NUM_DRAWS))
    assert_frequency(count, NUM_DRAWS, exact)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_proportional_has_the_distribution_of_draws_without_replacement(num_layers):
    scores = (-1.0, 0.0, 2.0)
    weights = [sigmoid(score) for score in scores]
    exact: dict[tuple[int, ...], float] = defaultdict(float)
    for order in itertools.permutations(range(3), num_layers):
        probability, left = 1.0, sum(weights)
        for layer in order:
            probability *= weights[layer] / left
            left -= weights[layer]
        exact[tuple(sorted(order))] += probability
    assert sum(exact.values()) == pytest.approx(1)
    generator = keyed_generator(0, "enumeration", 0)
    drawn = Counter(
        sample_layers(as_scores(*scores), num_layers, generator, "proportional") for _ in range(2 * NUM_DRAWS)
    )
    assert set(drawn) == set(exact)
    for layers, probability in exact.items():
        assert_frequency(drawn[layers], 2 * NUM_DRAWS, probability)


# Determinism


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_key_gives_the_same_sets_and_the_global_generator_is_neither_read_nor_moved(policy):
    scores = as_scores(0.3, -0.2, 0.0, 1.0, 0.1, -1.0)

    def draw():
        generator = keyed_generator(3, "active", 17)
        layers = [sample_layers(scores, 3, generator, policy) for _ in range(20)]
        return layers, sample_candidates(scores, 3, 4, generator, policy)

    before = torch.get_rng_state()
    first = draw()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12345)
    try:
        assert draw() == first
    finally:
        torch.set_rng_state(before)
    assert len(set(first[0])) > 1


def test_sampling_advances_the_generator_by_one_number_a_layer():
    for policy in POLICIES:
        used, counted = keyed_generator(0, "count", 0), keyed_generator(0, "count", 0)
        sample_layers(torch.zeros(7, dtype=torch.float64), 2, used, policy)
        torch.rand(7, generator=counted, dtype=torch.float64)
        assert torch.equal(used.get_state(), counted.get_state())


def test_keys_are_distinct_63_bit_numbers():
    purposes = ("active", "candidates", "probe", "probe order", "probe epoch")
    keys = [(seed, purpose, step) for seed in range(4) for purpose in purposes for step in range(500)]
    seeds = [keyed_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    first_bits = sum(seed >> 62 for seed in seeds)
    assert_frequency(first_bits, len(seeds), 0.5)


def test_keys_are_fixed_for_ever():
    """A run that resumes under a later version of the library must go on with the same choices."""
    assert keyed_seed(0, "active", 0) == 5696217714287364647
    scores = as_scores(*range(8))
    assert sample_layers(scores, 3, keyed_generator(0, "active", 0)) == (4, 5, 6)
    assert sample_layers(scores, 3, keyed_generator(0, "active", 0), "proportional") == (0, 4, 5)


# Convergence and properties


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("low", "high"), [(-50, 50), (-2e3, -1e3), (-2e6, -1e6), (-1e308, -1e6)])
def test_far_apart_scores_give_the_best_layers_for_certain(low, high, policy):
    """Also where the sigmoids of both are 0 in float64."""
    scores = as_scores(low, high, low, high, low)
    drawn = {sample_layers(scores, 2, keyed_generator(0, "certain", step), policy) for step in range(200)}
    assert drawn == {(1, 3)}


@pytest.mark.parametrize("policy", POLICIES)
def test_raising_a_score_keeps_a_drawn_layer_drawn(policy):
    """With the same draws a layer that is raised stays in the set, and pushes out one layer at most."""
    scores = as_scores(0.5, -1.0, 2.0, 0.0, 0.1, -0.3)
    num_entered = 0
    for step in range(300):
        layer = step % len(scores)
        raised = scores.clone()
        raised[layer] += 0.7
        before = set(sample_layers(scores, 3, keyed_generator(0, "raise", step), policy))
        after = set(sample_layers(raised, 3, keyed_generator(0, "raise", step), policy))
        assert after == before or (after - before == {layer} and len(before - after) == 1)
        num_entered += layer in after - before
    assert num_entered > 0


EXTREMES = (0.0, 1e6, -1e6, 1e308, -1e308)


@settings(derandomize=True, database=None, deadline=None, max_examples=150)
@given(
    scores=st.lists(st.sampled_from(EXTREMES) | st.floats(-1e308, 1e308, allow_nan=False), min_size=2, max_size=12),
    share=st.floats(0, 1),
    policy=st.sampled_from(POLICIES),
    seed=st.integers(0, 1000),
)
def test_any_finite_scores_give_exactly_the_number_of_layers_asked_for(scores, share, policy, seed):
    num_layers = max(1, round(share * len(scores)))
    layers = sample_layers(as_scores(*scores), num_layers, keyed_generator(seed, "property", 0), policy)
    assert len(set(layers)) == len(layers) == num_layers
    assert list(layers) == sorted(layers)
    assert set(layers) <= set(range(len(scores)))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_scores_that_are_equal_still_give_exactly_the_number_asked_for(policy, extreme):
    scores = torch.full((32,), extreme, dtype=torch.float64)
    assert all(
        len(set(sample_layers(scores, 8, keyed_generator(0, "extreme", step), policy))) == 8 for step in range(20)
    )


SHAPES = [(total, kept) for total in range(2, 6) for kept in range(1, total + 1)]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("total", "kept"), SHAPES)
@pytest.mark.parametrize("height", [0.0, 1.0, 1e6, -1e6])
def test_candidates_are_distinct_and_as_many_as_exist(total, kept, height, policy):
    scores = torch.zeros(total, dtype=torch.float64)
    scores[: total // 2] = height
    scores[total // 2 :] = -height
    for num_candidates in (2, 3, 20):
        generator = keyed_generator(0, "candidates", num_candidates)
        candidates = sample_candidates(scores, kept, num_candidates, generator, policy)
        assert len(candidates) == len(set(candidates)) == min(num_candidates, math.comb(total, kept))
        assert all(candidate in itertools.combinations(range(total), kept) for candidate in candidates)


@pytest.mark.timeout(60)
@settings(derandomize=True, database=None, deadline=None, max_examples=40)
@given(
    scores=st.lists(st.sampled_from((0.0, 1.0, 1e6, -1e6)), min_size=2, max_size=8),
    kept=st.integers(1, 8),
    num_candidates=st.integers(2, 12),
    policy=st.sampled_from(POLICIES),
)
def test_candidates_of_any_scores_are_distinct(scores, kept, num_candidates, policy):
    kept = min(kept, len(scores))
    generator = keyed_generator(0, "property", 0)
    candidates = sample_candidates(as_scores(*scores), kept, num_candidates, generator, policy)
    assert len(set(candidates)) == len(candidates) == min(num_candidates, math.comb(len(scores), kept))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_first_candidate_is_a_draw_of_the_policy(policy):
    scores = as_scores(0.2, 0.4, -0.6, 0.8, 0.0)
    for step in range(20):
        candidates = sample_candidates(scores, 2, 3, keyed_generator(0, "first", step), policy)
        assert candidates[0] == sample_layers(scores, 2, keyed_generator(0, "first", step), policy)


def test_cost_of_a_step_is_the_forward_and_the_backward_down_to_the_lowest_layer():
    """In products of one layer: 8 forward, and 8 − lowest backward, over 16."""
    assert step_cost((0, 7), 8) == 1
    assert step_cost((3, 5), 8) == (8 + 5) / 16
    assert step_cost((7,), 8) == 9 / 16


def test_without_a_cost_exponent_a_set_is_the_policys():
    for step in range(50):
        scores = as_scores(0.3, -0.4, 1.0, 0.0, 2.0)
        drawn = sample_cost_aware(scores, 2, keyed_generator(1, "test", step))
        assert drawn == sample_layers(scores, 2, keyed_generator(1, "test", step))


@pytest.mark.parametrize("exponent", [1.0, 8.0])
def test_sets_are_drawn_by_policy_and_cost(exponent):
    """Six layers all alike: each pair has the same probability under the policy, so the cost alone decides."""
    sets = list(itertools.combinations(range(6), 2))
    weights = [((12 - min(drawn)) / 12) ** -exponent for drawn in sets]
    counts = Counter(
        sample_cost_aware(torch.zeros(6, dtype=torch.float64), 2, keyed_generator(0, "test", step), "uniform", exponent)
        for step in range(NUM_DRAWS)
    )
    assert set(counts) == set(sets)
    for drawn, weight in zip(sets, weights, strict=True):
        p = weight / sum(weights)
        assert abs(counts[drawn] - NUM_DRAWS * p) < BOUND * math.sqrt(NUM_DRAWS * p * (1 - p))


def test_importance_and_cost_exponent_multiply():
    """One layer of three: its probability under the policy over its cost to the power of the exponent."""
    scores, exponent = as_scores(1.5, 0.0, -0.2), 4.0
    shares = [sigmoid(score) for score in scores.tolist()]
    weights = [share * (1 - layer / 6) ** -exponent for layer, share in enumerate(shares)]
    counts = Counter(
        sample_cost_aware(scores, 1, keyed_generator(3, "test", step), "proportional", exponent)
        for step in range(NUM_DRAWS)
    )
    for layer, weight in enumerate(weights):
        p = weight / sum(weights)
        assert abs(counts[layer,] - NUM_DRAWS * p) < BOUND * math.sqrt(NUM_DRAWS * p * (1 - p))
