"""The losses of candidate sets: what fails skips an update, once with a word, and leaves the training as it was."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from ist import SparseTuner
from ist.probing.repeats import own
from tests.helpers.tiny import snapshot, tiny_batches, tiny_lora, trainable


def train(model: nn.Module, device: str = "cpu", **options: Any) -> tuple[SparseTuner, dict[str, Tensor], list[Any]]:
    """Six steps; the model afterwards and the updates."""
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    updates = []
    with SparseTuner(model, num_active_layers=2, update_interval=2, num_candidates=2, **options) as tuner:
        for batch in tiny_batches(6):
            tuner.begin_step()
            model(**{key: value.to(device) for key, value in batch.items()}).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            updates.append(tuner.end_step(optimizer))
    return tuner, snapshot(model), updates


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_out_of_memory_in_a_probe_skips_the_update() -> None:
    """A real one: the probe's loss asks for a petabyte."""

    def greedy(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        loss = model(**batch).loss
        return loss + torch.empty(2**50, dtype=torch.uint8, device="cuda").sum()

    with pytest.warns(UserWarning, match="out of memory in a probe, so this importance update is skipped") as said:
        tuner, weights, updates = train(
            tiny_lora(lora_dropout=0.1).cuda(), "cuda", probe_batches=tiny_batches(2), loss_function=greedy
        )
    assert len([w for w in said if "out of memory" in str(w.message)]) == 1
    assert updates == [None] * 6
    _, expected, _ = train(tiny_lora(lora_dropout=0.1).cuda(), "cuda", selector="random")
    assert all(torch.equal(weights[name], expected[name]) for name in weights), "training noticed the probes"
    assert tuner.num_steps == 6


def test_a_stream_that_fails_skips_the_update() -> None:
    class Failing:
        """Fails at every second batch, as a loader does whose workers were killed."""

        def __init__(self) -> None:
            self.calls = 0

        def batch(self, index: int) -> Mapping[str, Any]:
            self.calls += 1
            if self.calls % 2:
                raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")
            return tiny_batches(1)[0]

        def close(self) -> None:
            pass

    with pytest.warns(UserWarning, match=r"No probe batch could be read \(DataLoader worker") as said:
        tuner, _, updates = train(tiny_lora(lora_dropout=0.1), probe_batches=Failing())
    assert len([w for w in said if "probe batch" in str(w.message)]) == 1
    assert [update is not None for update in updates] == [False, False, False, True, False, False]
    assert tuner.state_dict()["num_probes"] == 3, "what cannot be read is not tried again"


def test_losses_that_are_not_finite_are_recorded_and_teach_nothing() -> None:
    with pytest.warns(UserWarning, match="losses not finite"):
        tuner, _, updates = train(
            tiny_lora(),
            probe_batches=tiny_batches(1),
            loss_function=lambda model, batch: model(**batch).loss * float("nan"),
        )
    measured = [update for update in updates if update]
    assert len(measured) == 3
    assert all(update.skipped and not update.rewards for update in measured)
    assert tuner.selector.state_dict()["importance"] == [0.0] * 4


def test_an_error_of_the_users_loss_is_not_hidden() -> None:
    def wrong(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        raise RuntimeError("a mistake")

    with warnings.catch_warnings(), pytest.raises(RuntimeError, match="a mistake"):
        train(tiny_lora(), probe_batches=tiny_batches(1), loss_function=wrong)


class Pair(NamedTuple):
    ids: Tensor
    labels: list[Tensor]


def test_a_batch_is_copied_at_any_depth() -> None:
    batch = {"pair": Pair(torch.ones(2), [torch.ones(3)]), "name": "rows"}
    copied = own(batch)
    assert isinstance(copied["pair"], Pair)
    copied["pair"].ids.zero_()
    copied["pair"].labels[0].zero_()
    assert batch["pair"].ids.sum() == 2
    assert batch["pair"].labels[0].sum() == 3
    assert copied["name"] == "rows"
