"""What is read to measure leaves training as it is: its loaders, samplers, datasets and Accelerate's accumulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SubsetRandomSampler

from ist import IST, SparseTuner, layer_scores
from tests.helpers.tiny import tiny_batches, tiny_llama, tiny_lora, tiny_rows, trainable
from tests.helpers.trainers import make_trainer


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class Augmented(Dataset[Any]):
    """Rows that are changed at random when they are read."""

    def __init__(self, num_rows: int = 40) -> None:
        self._rows, self._random = tiny_rows(num_rows), np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (self._rows[index]["input_ids"] + int(self._random.integers(0, 64))) % 64
        return {"input_ids": ids, "labels": ids}


def sampled() -> DataLoader[Any]:
    rows = tiny_rows(40)
    order = RandomSampler(rows, generator=torch.Generator().manual_seed(3))
    return DataLoader(rows, batch_sampler=BatchSampler(order, 4, False), collate_fn=collate)  # type: ignore[arg-type]


LOADERS: dict[str, Callable[[], DataLoader[Any]]] = {
    "shuffled": lambda: DataLoader(tiny_rows(40), batch_size=4, shuffle=True, collate_fn=collate),  # type: ignore[arg-type]
    "a dataset with a generator": lambda: DataLoader(Augmented(), batch_size=4, collate_fn=collate),
    "a batch sampler with a generator": sampled,
}


@pytest.mark.parametrize("kind", LOADERS)
def test_training_sees_the_same_batches_whether_it_measures_or_not(kind: str) -> None:
    seen = []
    for interval in (2, 10**6):
        torch.manual_seed(0)
        model, loader = tiny_lora(), LOADERS[kind]()
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        ids = []
        with SparseTuner(model, num_active_layers=2, update_interval=interval, probe_batches=loader, mu=0) as tuner:
            for batch in (batch for _ in range(2) for batch in loader):
                ids.append(batch["input_ids"])
                with tuner.step(optimizer):
                    model(**batch).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
            assert (tuner.last_update is not None) == (interval == 2)
        seen.append(torch.cat(ids))
    assert torch.equal(*seen)


def test_a_trainer_sees_the_same_rows_of_a_dataset_with_a_generator(tmp_path: Path) -> None:
    losses = []
    for interval in (2, 1000):
        trainer = make_trainer(
            tmp_path / str(interval),
            IST(update_interval=interval, mu=0),
            max_steps=8,
            save_strategy="no",
            logging_steps=1,
        )
        trainer.train_dataset, trainer.data_collator = Augmented(), collate
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 8


@pytest.mark.parametrize("kind", LOADERS)
def test_scores_leave_a_loader_as_it_was_and_are_the_same_again(kind: str) -> None:
    loader, untouched = LOADERS[kind](), LOADERS[kind]()
    config = LoraConfig(r=2, target_modules=["q_proj"])
    first, second = (layer_scores(tiny_llama(4), config, loader, seed=1) for _ in range(2))
    assert first == second
    torch.manual_seed(0)
    after = [batch["input_ids"] for batch in loader]
    torch.manual_seed(0)
    assert torch.equal(torch.cat(after), torch.cat([batch["input_ids"] for batch in untouched]))


def test_a_loader_with_a_generator_of_its_own_is_not_advanced_by_scores() -> None:
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(tiny_rows(40), batch_size=4, shuffle=True, collate_fn=collate, generator=generator)  # type: ignore[arg-type]
    before = generator.get_state()
    layer_scores(tiny_llama(4), LoraConfig(r=2, target_modules=["q_proj"]), loader)
    assert torch.equal(generator.get_state(), before)


def test_rows_that_a_sampler_leaves_out_are_not_measured_on() -> None:
    read: set[int] = set()

    class Watched(Augmented):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            read.add(index)
            return super().__getitem__(index)

    loader = DataLoader(Watched(), batch_size=4, sampler=SubsetRandomSampler(range(20)), collate_fn=collate)
    model = tiny_lora()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    with SparseTuner(model, num_active_layers=2, update_interval=1, probe_batches=loader) as tuner:
        for batch in tiny_batches(10):
            with tuner.step(optimizer):
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        assert tuner.last_update is not None
    assert read == set(range(20))


# ---- Accelerate's loaders, the last begun of which ends an accumulation


@pytest.fixture
def accelerator() -> Accelerator:
    Accelerator(cpu=True).gradient_state._reset_state()
    return Accelerator(cpu=True, gradient_accumulation_steps=4)


@pytest.mark.parametrize("probes", ["batches", "a prepared loader", "the training's own loader"])
def test_measuring_does_not_end_an_accumulation(probes: str, accelerator: Accelerator) -> None:
    def prepared(rows: list[Any]) -> Any:
        return accelerator.prepare(DataLoader(rows, batch_size=4, collate_fn=collate))  # type: ignore[arg-type]

    model: Any = tiny_lora()
    optimizer: Any = torch.optim.AdamW(trainable(model), lr=1e-3)
    model, optimizer = accelerator.prepare(model, optimizer)
    loader = prepared(tiny_rows(72))  # 18 micro-batches an epoch
    given = {
        "batches": tiny_batches(6),
        "a prepared loader": prepared(tiny_rows(12)),
        "the training's own loader": loader,
    }
    steps = []
    with SparseTuner(model, num_active_layers=2, update_interval=1, probe_batches=given[probes]) as tuner:
        for _ in range(2):
            for number, batch in enumerate(loader):
                with tuner.step(optimizer), accelerator.accumulate(model):
                    accelerator.backward(model(**batch).loss)
                    optimizer.step()
                    optimizer.zero_grad()
                if accelerator.sync_gradients:
                    steps.append(number)
        assert tuner.last_update is not None
    assert steps == [3, 7, 11, 15, 17] * 2


def test_scores_end_no_accumulation_either(accelerator: Accelerator) -> None:
    loader = accelerator.prepare(DataLoader(tiny_rows(40), batch_size=4, collate_fn=collate))  # type: ignore[arg-type]
    layer_scores(tiny_llama(4), LoraConfig(r=2, target_modules=["q_proj"]), loader)
    assert not accelerator.gradient_state.in_dataloader


# ---- Rows that cannot be read


def test_one_bad_row_costs_the_updates_that_read_it_and_no_others(tmp_path: Path) -> None:
    rows = tiny_rows(16)

    class Bad(Dataset[Any]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> Any:
            if index == 5:
                raise ValueError("a damaged row")
            return rows[index]

    ist = IST(update_interval=2, probe_dataset=Bad())
    trainer = make_trainer(tmp_path, ist, max_steps=40, save_strategy="no")
    with pytest.warns(UserWarning, match="a damaged row"):
        trainer.train()
    assert ist.tuner is not None
    assert ist.tuner.selector.state_dict()["num_updates"] == 15  # of 20; four batches are an epoch
