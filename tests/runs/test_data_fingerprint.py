"""A resume on other training data says so; the same data have one fingerprint, which costs the training nothing."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import IterableDataset

from ist.runs.fingerprint import SAMPLED_ROWS, data_fingerprint
from tests.helpers.tiny import tiny_rows
from tests.helpers.trainers import make_trainer


def rows(num: int = 100) -> list[dict[str, Any]]:
    return [
        {"input_ids": [index, index + 1], "labels": None, "text": f"größer {index}", "weight": 0.5}
        for index in range(num)
    ]


def changed(index: int, **values: Any) -> list[dict[str, Any]]:
    data = rows()
    data[index] = {**data[index], **values}
    return data


def test_the_same_rows_have_one_fingerprint() -> None:
    expected = data_fingerprint(rows())
    assert expected is not None
    assert expected.startswith("100 rows, ")
    assert data_fingerprint([dict(reversed(row.items())) for row in rows()]) == expected
    assert data_fingerprint(Dataset.from_list(rows())) == expected


@pytest.mark.parametrize(
    "other",
    [
        rows(99),
        rows(101),
        rows()[::-1],
        changed(0, input_ids=[7, 1]),
        changed(99, text="größer"),
        changed(0, weight=None),
        changed(0, labels=[1]),
        changed(0, input_ids=[[0], [1]]),
        changed(0, input_ids=[0]),
        [{"ids": row["input_ids"]} for row in rows()],
        [],
    ],
    ids=range(11),
)
def test_other_rows_have_another(other: list[Any]) -> None:
    assert data_fingerprint(other) != data_fingerprint(rows())


@pytest.mark.parametrize(
    ("value", "other"),
    [
        (torch.arange(4), torch.arange(4).reshape(2, 2)),
        (torch.arange(4), torch.arange(4).float()),
        (torch.zeros(3, dtype=torch.bfloat16), torch.ones(3, dtype=torch.bfloat16)),
        (torch.tensor(1), torch.tensor(2)),
        (torch.zeros(0), torch.zeros(0, 2)),
        (torch.ones(4).bool(), torch.zeros(4).bool()),
        (np.arange(4), np.arange(4).reshape(2, 2)),
        (np.int64(1), np.int64(2)),
        ("1", 1),
        ("\ud800", "\ud801"),
    ],
    ids=range(10),
)
def test_values_of_every_kind_count(value: Any, other: Any) -> None:
    first = data_fingerprint([{"a": value}])
    assert first is not None
    assert first == data_fingerprint([{"a": value}]) != data_fingerprint([{"a": other}])


class Augmented:
    """Rows with noise of the global generators and of one of its own, read one at a time."""

    def __init__(self) -> None:
        self.own = np.random.default_rng(0)
        self.num_read = 0

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> Any:
        self.num_read += 1
        return {"a": torch.randn(2) + float(self.own.normal()) + random.random() + index}


def test_a_fingerprint_leaves_the_trainings_random_numbers_alone_and_reads_few_rows() -> None:
    data = Augmented()
    torch.manual_seed(0)
    state, own = torch.get_rng_state(), data.own.bit_generator.state
    first = data_fingerprint(data)
    assert first is not None
    assert torch.equal(torch.get_rng_state(), state)
    assert (data.own.bit_generator.state, data.num_read) == (own, 0)  # The count is put back too.
    data[5]
    torch.manual_seed(1)
    assert data_fingerprint(data) == first
    seen = set()

    class Counted(Augmented):
        def __getitem__(self, index: int) -> Any:
            seen.add(index)
            return super().__getitem__(index)

    data_fingerprint(Counted())
    assert len(seen) == SAMPLED_ROWS
    assert {0, 999_999} <= seen


class Streamed(IterableDataset):
    def __iter__(self) -> Any:
        raise AssertionError("a stream was read")

    def __len__(self) -> int:
        return 5


class Broken:
    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        raise RuntimeError("no such row")


@pytest.mark.parametrize("data", [Streamed(), Broken(), None, iter(rows()), [{"a": object()}], {1: 2}], ids=range(6))
def test_what_cannot_be_compared_has_none(data: Any) -> None:
    assert data_fingerprint(data) is None


@pytest.mark.parametrize("which", ["same", "one row less", "other rows"])
def test_a_resume_on_other_data_says_so(tmp_path: Path, which: str) -> None:
    make_trainer(tmp_path, max_steps=3).train()
    trainer = make_trainer(tmp_path, max_steps=3)
    trainer.args.max_steps = 3
    data = {"same": tiny_rows(64), "one row less": tiny_rows(63), "other rows": tiny_rows(64, seed=9)}[which]
    trainer.train_dataset = data
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    said = [str(warning.message) for warning in caught if "began with other arguments" in str(warning.message)]
    assert len(said) == (which != "same")
    if said:
        assert "train_dataset was '64 rows, " in said[0]
        assert f"and is '{len(data)} rows, " in said[0]
