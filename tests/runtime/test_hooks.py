"""Hooks on the model: they go with their owner, and are nothing to a copy of the model."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from ist import SparseTuner
from ist.runtime.hooks import WeakHook
from tests.helpers.tiny import tiny_batches, tiny_lora


class Counter:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def count(self, *arguments: Any) -> int:
        self.seen.append(arguments)
        return len(self.seen)


def test_a_hook_calls_while_its_object_lives() -> None:
    counter = Counter()
    hook, alive = WeakHook(counter.count), weakref.ref(counter)
    assert [hook("a", 1), hook()] == [1, 2]
    assert counter.seen == [("a", 1), ()]
    del counter
    assert alive() is None
    assert hook("b") is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda hook: pickle.loads(pickle.dumps(hook))])
def test_a_copy_does_nothing(duplicate: Any) -> None:
    counter = Counter()
    assert duplicate(WeakHook(counter.count))("a") is None
    assert counter.seen == []


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"recompute": "frozen"}], ids=str)
@pytest.mark.parametrize("in_step", [False, True])
def test_a_model_is_saved_whole_while_a_tuner_is_open(options: dict[str, Any], in_step: bool) -> None:
    model = tiny_lora()
    batch = tiny_batches(1)[0]
    with SparseTuner(model, num_active_layers=1, **options) as tuner:
        tuner.begin_step()
        expected = model(**batch).loss
        if not in_step:
            tuner.end_step()
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        for again in (torch.load(file, weights_only=False), copy.deepcopy(model)):
            assert isinstance(again.get_base_model(), PreTrainedModel)
            torch.testing.assert_close(again(**batch).loss, expected)
