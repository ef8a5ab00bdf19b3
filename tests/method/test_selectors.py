"""The choosers: the paper's against hand computation and a naive twin, and the baselines."""

import functools
import itertools
import json
import math
import warnings
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from ist.config import PRESETS, ISTConfig
from ist.method.registry import (
    SELECTORS,
    FixedSelector,
    LearnedSelector,
    Measure,
    RandomSelector,
    Selector,
    selector_factory,
)
from ist.runtime.randomness import keyed_generator

EFFECTS = (0.01, 0.3, 0.0, 0.02, 0.35, 0.0, 0.01, 0.25)
"""Nats that suppressing each layer of the simulated model costs."""


class AdditiveModel:
    """A `measure` whose loss is a base plus the effects of the layers that do not keep their response."""

    def __init__(self, effects: Sequence[float] = EFFECTS, base: float = 0.5) -> None:
        self.effects, self.base = effects, base
        self.asked: list[tuple[tuple[int, ...], ...]] = []

    def __call__(self, candidates: Sequence[tuple[int, ...]]) -> Tensor:
        self.asked.append(tuple(candidates))
        losses = [
            self.base + sum(effect for layer, effect in enumerate(self.effects) if layer not in kept)
            for kept in candidates
        ]
        return torch.tensor(losses, dtype=torch.float64)


def fixed_losses(*losses: float) -> Measure:
    return lambda candidates: torch.tensor(losses[: len(candidates)], dtype=torch.float64)


# The paper's chooser: reference


@pytest.mark.parametrize(
    ("options", "kept_by_first_alone", "kept_by_second_alone"),
    [
        # Likelihoods 1/2 and 1/4 give rewards 1/8 and -1/8; mu is 10, and p (1 - p) is 1/4 at score 0.
        ({"preset": "paper"}, 1.25, -1.25),
        ({"preset": "authors"}, 0.3125, -0.3125),
        ({"preset": "paper", "candidate_set": "suppressed"}, 1.25, -1.25),
        ({"preset": "authors", "candidate_set": "unsuppressed"}, 0.3125, -0.3125),
        ({"preset": "paper", "mu": 100.0}, 12.5, -12.5),
    ],
    ids=str,
)
def test_the_first_update_by_hand(options, kept_by_first_alone, kept_by_second_alone):
    """The kept layers earn what their set earns. Where the suppressed ones pay instead, a layer that only the second
    set suppresses earns by that what the first set earns: the update is the same."""
    config = ISTConfig(**options, num_candidates=2, num_active_layers=2, update_interval=5)
    selector = LearnedSelector(config, 6)
    update = selector.learn(5, fixed_losses(math.log(2), math.log(4)))
    assert update is not None
    first, second = (set(kept) for kept in update.candidates)
    assert len(first) == len(second) == 3
    assert first != second
    expected = [
        kept_by_first_alone * (layer in first - second) + kept_by_second_alone * (layer in second - first)
        for layer in range(6)
    ]
    assert selector.importance.tolist() == pytest.approx(expected, abs=1e-12)
    assert update.importance == tuple(selector.importance.tolist())
    assert update.losses == (math.log(2), math.log(4))
    assert update.rewards == pytest.approx((0.125, -0.125), abs=1e-12)
    assert update.skipped is None


class NaiveTwin:
    """The algorithm straight from its equations and, for `authors`, from the list of what the authors' code does."""

    def __init__(self, preset: str, num_layers: int, active: int, kept: int, mu: float, seed: int) -> None:
        self.preset, self.num_layers, self.active, self.kept, self.mu, self.seed = (
            preset, num_layers, active, kept, mu, seed,
        )  # fmt: skip
        self.scores = [0.0] * num_layers

    def draw(self, scores: list[float], size: int, generator: torch.Generator) -> tuple[int, ...]:
        uniform = torch.rand(self.num_layers, generator=generator, dtype=torch.float64).tolist()
        sigmoids = [1 / (1 + math.exp(-score)) for score in scores]
        if self.preset == "paper":
            drawn = [u * p for u, p in zip(uniform, sigmoids, strict=True)]
        else:  # the first arrivals, with rates in proportion to p: draws without replacement
            drawn = [math.log(u) / p for u, p in zip(uniform, sigmoids, strict=True)]
        return tuple(sorted(sorted(range(self.num_layers), key=lambda layer: -drawn[layer])[:size]))

    def choose(self, step: int) -> tuple[int, ...]:
        return self.draw(self.scores, self.active, keyed_generator(self.seed, "active", step))

    def learn(self, step: int, measure: AdditiveModel) -> None:
        generator = keyed_generator(self.seed, "candidates", step)
        reference = self.preset == "authors"
        scores = [-score for score in self.scores] if reference else self.scores
        size = self.num_layers - self.kept if reference else self.kept
        drawn: list[tuple[int, ...]] = []
        while len(drawn) < 3:
            candidate = self.draw(scores, size, generator)
            if candidate not in drawn:
                drawn.append(candidate)
        everything = set(range(self.num_layers))
        kept = [tuple(sorted(everything - set(candidate))) for candidate in drawn] if reference else drawn
        likelihoods = [math.exp(-loss) for loss in measure(kept).tolist()]
        rewards = [likelihood - sum(likelihoods) / 3 for likelihood in likelihoods]
        before = list(self.scores)
        for candidate, reward in zip(drawn, rewards, strict=True):
            for layer in candidate:
                p = 1 / (1 + math.exp(-before[layer]))
                self.scores[layer] += -self.mu * reward * p * (1 - p) if reference else self.mu * reward


@pytest.mark.parametrize("preset", PRESETS)
def test_equals_a_naive_twin_over_100_updates(preset):
    config = ISTConfig(preset=preset, num_active_layers=3, num_unsuppressed_layers=4, update_interval=2, mu=1.0, seed=5)
    selector, twin = LearnedSelector(config, 8), NaiveTwin(preset, 8, 3, 4, mu=1.0, seed=5)
    measured, expected = AdditiveModel(), AdditiveModel()
    for step in range(201):
        assert selector.choose(step) == twin.choose(step)
        update = selector.learn(step, measured)
        assert (update is not None) == (step > 0 and step % 2 == 0)
        if update is not None:
            twin.learn(step, expected)
            assert update.candidates == measured.asked[-1] == tuple(expected.asked[-1])
            assert selector.importance.tolist() == pytest.approx(twin.scores, abs=1e-9)
    assert len(measured.asked) == 100


@pytest.mark.parametrize("interval", [1, 3, 10])
def test_measures_every_t_c_steps_and_not_at_step_0(interval):
    selector, measure = LearnedSelector(ISTConfig(update_interval=interval), 8), AdditiveModel()
    learned = [step for step in range(31) if selector.learn(step, measure) is not None]
    assert learned == list(range(interval, 31, interval))
    assert len(measure.asked) == len(learned)


# Determinism and the state


@pytest.mark.parametrize("preset", PRESETS)
def test_a_state_that_went_through_json_continues_identically(preset):
    config = ISTConfig(preset=preset, update_interval=1, mu=3.0, seed=2)

    def go_on(selector: LearnedSelector, steps: range) -> list[object]:
        return [(selector.choose(step), selector.learn(step, AdditiveModel())) for step in steps]

    whole = LearnedSelector(config, 8)
    first, second = go_on(whole, range(20)), go_on(whole, range(20, 40))
    interrupted = LearnedSelector(config, 8)
    assert go_on(interrupted, range(20)) == first
    saved = json.loads(json.dumps(interrupted.state_dict(), allow_nan=False))
    resumed = LearnedSelector(config, 8)
    resumed.load_state_dict(saved)
    assert go_on(resumed, range(20, 40)) == second
    assert resumed.state_dict() == whole.state_dict()
    assert whole.state_dict()["num_updates"] == 39
    assert torch.equal(resumed.importance, whole.importance)
    assert resumed.importance.dtype == torch.float64


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ([0.0] * 3, "has 3 scores, and this model has 4 layers"),
        ([0.0] * 5, "has 5 scores, and this model has 4 layers"),
        ([], "has 0 scores, and this model has 4 layers"),
        ([0.0, math.nan, 0.0, 0.0], "not finite numbers: the checkpoint is damaged"),
        ([0.0, 0.0, 0.0, -math.inf], "not finite numbers: the checkpoint is damaged"),
    ],
)
def test_scores_of_another_model_or_not_finite_are_refused(scores, said):
    selector = LearnedSelector(ISTConfig(update_interval=1), 4)
    selector.learn(1, AdditiveModel(EFFECTS[:4]))
    before = selector.state_dict()
    with pytest.raises(ValueError, match=said):
        selector.load_state_dict({"importance": scores, "num_updates": 2})
    assert selector.state_dict() == before
    assert any(before["importance"])


# What cannot be learned from


@pytest.mark.parametrize("options", [{"num_unsuppressed_layers": 4}, {"num_unsuppressed_layers": 1.0}], ids=str)
def test_nothing_to_suppress_warns_and_never_measures(options):
    with pytest.warns(UserWarning, match="num_unsuppressed_layers=4 leaves no layer to suppress.*give fewer"):
        selector = LearnedSelector(ISTConfig(**options, update_interval=1), 4)
    measure = AdditiveModel(EFFECTS[:4])
    assert [selector.learn(step, measure) for step in range(20)] == [None] * 20
    assert measure.asked == []
    assert selector.importance.tolist() == [0.0] * 4
    assert len({selector.choose(step) for step in range(50)}) == 4


def test_a_count_of_all_layers_warns_under_the_reference_preset_too():
    with pytest.warns(UserWarning, match="leaves no layer to suppress"):
        LearnedSelector(ISTConfig(preset="authors", num_unsuppressed_layers=4), 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("preset", PRESETS)
def test_losses_that_are_not_finite_skip_the_update_with_one_warning(preset, bad):
    selector = LearnedSelector(ISTConfig(preset=preset, update_interval=1), 8)
    selector.learn(1, AdditiveModel())
    before = selector.state_dict()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        updates = [selector.learn(step, fixed_losses(0.5, bad, 0.25)) for step in range(2, 7)]
    assert [str(warning.message) for warning in caught] == [
        f"An importance update was skipped (losses not finite: 0.5, {bad:g}, 0.25); training continues."
    ]
    assert selector.state_dict() == before
    for update in updates:
        assert update is not None
        assert update.skipped == f"losses not finite: 0.5, {bad:g}, 0.25"
        assert update.rewards == ()
        assert update.losses[::2] == (0.5, 0.25)
        assert update.importance == tuple(before["importance"])
    after = selector.learn(7, AdditiveModel())
    assert after is not None
    assert after.skipped is None
    assert selector.state_dict()["num_updates"] == before["num_updates"] + 1


def test_losses_so_low_that_rewards_overflow_leave_the_scores_finite():
    selector = LearnedSelector(ISTConfig(update_interval=1), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        selector.learn(1, fixed_losses(-800.0, -1.0, 0.0))
    assert bool(torch.isfinite(selector.importance).all())


def test_no_batch_learns_nothing():
    selector = LearnedSelector(ISTConfig(update_interval=1), 8)
    assert selector.learn(1, lambda candidates: None) is None
    assert selector.state_dict() == LearnedSelector(ISTConfig(), 8).state_dict()


# Convergence and properties


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        *({"preset": preset} for preset in PRESETS),
        {"preset": "paper", "candidate_set": "suppressed"},
        {"preset": "authors", "candidate_set": "unsuppressed"},
    ],
    ids=str,
)
def test_the_layers_that_matter_rise_and_are_chosen_more_often(options, seed):
    """Importance has one sign whatever the sets are called: a layer whose suppression costs much ends above zero and
    above every layer whose suppression costs nothing, and is trained more often."""
    effects = (0.0, 0.0, 0.0, 0.6, 0.0, 0.0)
    selector = LearnedSelector(ISTConfig(**options, num_active_layers=2, update_interval=1, mu=1.0, seed=seed), 6)
    for step in range(1, 101):
        selector.learn(step, AdditiveModel(effects))
    scores = selector.importance
    assert int(scores.argmax()) == 3
    assert float(scores[3]) > 0
    trained = sum(3 in selector.choose(step) for step in range(300))
    assert trained > 300 * 2 / 6 + 4.5 * math.sqrt(300 * (1 / 3) * (2 / 3))


@pytest.mark.parametrize("num_layers", range(2, 6))
@pytest.mark.parametrize("preset", PRESETS)
def test_small_models_measure_every_set_that_exists(preset, num_layers):
    for kept in range(1, num_layers):
        config = ISTConfig(preset=preset, num_unsuppressed_layers=kept, num_candidates=20, update_interval=1)
        update = LearnedSelector(config, num_layers).learn(1, AdditiveModel(EFFECTS[:num_layers]))
        assert update is not None
        assert sorted(update.candidates) == list(itertools.combinations(range(num_layers), kept))


def test_the_scores_sum_to_zero_for_ever():
    """Eq. 10 with sets of one size conserves their sum, and they start at 0."""
    selector = LearnedSelector(ISTConfig(update_interval=1), 8)
    for step in range(1, 51):
        selector.learn(step, AdditiveModel())
        assert float(selector.importance.sum()) == pytest.approx(0, abs=1e-9)
    assert float(selector.importance.abs().max()) > 1


# Baselines


@pytest.mark.parametrize("preset", PRESETS)
def test_random_draws_the_sets_of_the_papers_chooser_without_learning(preset):
    config = ISTConfig(preset=preset, mu=0, update_interval=1, seed=4, num_active_layers=3)
    learned, chance = LearnedSelector(config, 8), RandomSelector(config, 8)
    measure = AdditiveModel()
    sets = []
    for step in range(50):
        sets.append(chance.choose(step))
        assert learned.choose(step) == sets[-1]
        learned.learn(step, measure)
        assert chance.learn(step, fixed_losses()) is None
    assert len(measure.asked) == 49
    assert len(set(sets)) > 20
    assert all(len(set(layers)) == 3 for layers in sets)
    other = RandomSelector(ISTConfig(preset=preset, seed=5, num_active_layers=3), 8)
    assert [other.choose(step) for step in range(50)] != sets


def test_random_trains_all_layers_alike():
    selector = RandomSelector(ISTConfig(num_active_layers=2), 8)
    counts = [0] * 8
    for step in range(2000):
        for layer in selector.choose(step):
            counts[layer] += 1
    bound = 4.5 * math.sqrt(2000 * 0.25 * 0.75)
    assert max(abs(count - 500) for count in counts) <= bound


def test_random_has_no_state():
    selector = RandomSelector(ISTConfig(), 8)
    before = selector.choose(3)
    assert selector.state_dict() == {}
    selector.load_state_dict({})
    assert selector.choose(3) == before


@pytest.mark.parametrize(
    ("layers", "expected"), [((1,), (1,)), ((3, 0), (0, 3)), ([2, 2, 1], (1, 2)), (range(4), (0, 1, 2, 3))]
)
def test_fixed_trains_the_given_layers_at_every_step(layers, expected):
    selector = FixedSelector(ISTConfig(), 4, layers)
    assert {selector.choose(step) for step in range(20)} == {expected}
    assert selector.learn(10, fixed_losses()) is None
    state = json.loads(json.dumps(selector.state_dict()))
    selector.load_state_dict(state)
    assert selector.choose(0) == expected


@pytest.mark.parametrize("layers", [(), (-1,), (4,), (0, 7)])
def test_fixed_refuses_what_is_not_a_layer(layers):
    with pytest.raises(ValueError, match=r"not a set of layers.*give one or more indices from 0 to 3") as error:
        FixedSelector(ISTConfig(), 4, layers)
    assert f"layers={list(layers) or layers!r}" in str(error.value)


@pytest.mark.parametrize("selector", [LearnedSelector, RandomSelector])
def test_choosers_check_the_counts_against_the_model(selector):
    with pytest.raises(ValueError, match="num_active_layers=9 is more than the 8 layers"):
        selector(ISTConfig(num_active_layers=9), 8)


# By name


def test_names_and_factories():
    assert {name: selector_factory(name) for name in SELECTORS} == SELECTORS
    factory = functools.partial(FixedSelector, layers=(1, 2))
    assert selector_factory(factory) is factory
    selectors: list[Selector] = [selector_factory(name)(ISTConfig(), 8) for name in SELECTORS]
    assert [type(selector) for selector in selectors] == [getattr(f, "func", f) for f in SELECTORS.values()]
    assert selector_factory(factory)(ISTConfig(), 8).choose(0) == (1, 2)


@pytest.mark.parametrize(("name", "nearest"), [("lift", ""), ("", ""), ("IST", r" \(did you mean 'ist'\?\)")])
def test_an_unknown_name_is_refused(name, nearest):
    with pytest.raises(ValueError, match=f"selector='{name}' is unknown{nearest}: choose one of 'ist', 'random'"):
        selector_factory(name)
