"""What an analysis computes: losses without layers, their order, and how it compares with what was learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ist import discover_layers
from ist.experiments.analysis import (
    batch_weights,
    have_moved,
    importance_intervals,
    loss_increases,
    losses_without,
    rank_correlation,
    removal_order,
    weighted_mean,
)
from tests.helpers.tiny import snapshot, tiny_batches, tiny_lora, traces


def test_a_removed_layer_is_one_without_its_adapter() -> None:
    """The reference: up-projections of that layer set to zero."""
    model, batches = tiny_lora(), tiny_batches(3)
    model.eval()
    before, weights = traces(model), snapshot(model)
    losses = losses_without(model, discover_layers(model), [[], [1], [0, 1, 2, 3]], batches)
    assert traces(model) == before
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
    assert losses.shape == (3, 3)
    with torch.no_grad():
        assert losses[:, 0].tolist() == pytest.approx([float(model(**batch).loss) for batch in batches])
        with model.disable_adapter():
            assert losses[:, 2].tolist() == pytest.approx([float(model(**batch).loss) for batch in batches])
        for name, parameter in model.named_parameters():
            if "layers.1." in name and "lora_B" in name:
                parameter.zero_()
        assert losses[:, 1].tolist() == pytest.approx([float(model(**batch).loss) for batch in batches])


def test_beta_suppresses_instead() -> None:
    model, batches = tiny_lora(), tiny_batches(1)
    layers = discover_layers(model)
    full, suppressed, out = (
        losses_without(model, layers, [[0, 1, 2, 3]], batches, beta).item() for beta in (1, 0.5, 0)
    )
    assert len({full, suppressed, out}) == 3


def test_a_loss_may_take_labels_out_of_its_batch() -> None:
    model, batches = tiny_lora(), tiny_batches(2)

    def popping(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        labels = batch.pop("labels")
        return model(**batch, labels=labels).loss

    layers, removed = discover_layers(model), [[0], [1]]
    losses = losses_without(model, layers, removed, batches, loss_function=popping)
    assert torch.equal(losses, losses_without(model, layers, removed, batches))


def test_batches_count_by_their_tokens() -> None:
    labels = torch.tensor([[5, -100, 7, 8], [9, 9, -100, -100]])  # the first of each row is never predicted
    assert batch_weights([{"labels": labels}, {"input_ids": labels}]).tolist() == [3, 1]
    assert weighted_mean(torch.tensor([1.0, 5.0]).double(), torch.tensor([3.0, 1.0]).double()) == 2


def test_importance_by_hand() -> None:
    losses = torch.tensor([[1.0, 1.5, 0.5], [2.0, 4.5, 2.0]]).double()
    assert loss_increases(losses, torch.tensor([1.0, 3.0]).double()).tolist() == [2.0, -0.125]  # (0.5 + 3 · 2.5) / 4
    assert importance_intervals(losses[:1], torch.ones(1).double()) is None


def test_the_interval_holds_what_every_batch_says() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(20, 1, generator=generator, dtype=torch.float64)
    losses = torch.cat([noise, noise + 0.25, noise + torch.rand(20, 1, generator=generator)], dim=1)
    sure, unsure = importance_intervals(losses, torch.ones(20).double()) or []
    assert sure == pytest.approx((0.25, 0.25))
    assert 0.1 < unsure[1] - unsure[0] < 0.5


@pytest.mark.parametrize(
    ("learned", "tau"), [([1.0, 2.0, 3.0], 1.0), ([3.0, 2.0, 1.0], -1.0), ([2.0, 1.0, 3.0], 1 / 3), ([1.0] * 3, None)]
)
def test_the_rank_correlation(learned: list[float], tau: float | None) -> None:
    increases = torch.tensor([0.1, 0.2, 0.3]).double()
    losses = torch.cat([torch.zeros(5, 1), increases.expand(5, 3)], dim=1)
    found = rank_correlation(losses, torch.ones(5).double(), learned)
    expected = None if tau is None else pytest.approx(tau)
    assert found == {"tau": expected, "low": expected, "high": expected}


def test_greedy_removal_sees_what_layers_do_together() -> None:
    """Layers 0 and 1 each do what the other does: alone neither is missed, and both together most of all."""

    def measure(removed: list[list[int]]) -> list[float]:
        return [10 * ({0, 1} <= set(taken)) + 1.0 * (2 in taken) + 0.1 * (0 in taken) for taken in removed]

    assert removal_order(3, measure, most_important_first=False) == [1, 2, 0]
    assert removal_order(3, measure, most_important_first=True) == [2, 0, 1]


def test_greedy_removal_asks_for_each_layer_that_is_left() -> None:
    asked: list[Any] = []

    def measure(removed: list[list[int]]) -> list[float]:
        asked.append(removed)
        return [float(taken[-1]) for taken in removed]

    assert removal_order(3, measure, most_important_first=False) == [0, 1, 2]
    assert asked == [[[0], [1], [2]], [[0, 1], [0, 2]]]


@pytest.mark.parametrize(
    ("learned", "moved"),
    [
        ([0.0, 0.0, 0.0], False),
        ([2.0, 2.0, 2.0], False),
        ([1e-12, -1e-12, 0.0], False),
        ([1e-4, 0.0, 2e-4], False),
        ([0.0, 0.1, 0.2], True),
        ([-900.0, 900.0, 0.0], True),
        ([], False),
    ],
)
def test_scores_that_never_moved_have_no_correlation(learned: list[float], moved: bool) -> None:
    assert have_moved(learned) is moved
    losses = torch.cat([torch.zeros(5, 1), torch.tensor([0.1, 0.2, 0.3]).expand(5, 3)], dim=1).double()
    if not moved:
        assert rank_correlation(losses, torch.ones(5).double(), learned) == {"tau": None, "low": None, "high": None}


@pytest.mark.parametrize(("num_batches", "has_interval"), [(1, False), (2, False), (4, False), (5, True), (20, True)])
def test_few_batches_give_no_interval(num_batches: int, has_interval: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(num_batches, 4, generator=generator, dtype=torch.float64)
    weights = torch.ones(num_batches).double()
    assert (importance_intervals(losses, weights) is not None) is has_interval
    found = rank_correlation(losses, weights, [1.0, 2.0, 3.0])
    assert found["tau"] is not None
    assert (found["low"] is not None) is has_interval
