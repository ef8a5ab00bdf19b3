"""After a training nothing of the model stays in memory until Python's collector runs, which on a GPU is too late."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model

from ist import SparseTuner
from ist.step.fused import frozen
from ist.step.fused.frozen import frozen_pair
from tests.helpers.tiny import VOCABULARY, tiny_llama

MODULES = ["q_proj", "v_proj", "down_proj"]
ADALORA = {"init_r": 3, "target_r": 2, "tinit": 1, "tfinal": 1, "total_step": 10}


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def make_model(lora: dict[str, Any] | None) -> Any:
    if lora is None:
        return tiny_llama()
    kind = AdaLoraConfig if "init_r" in lora else LoraConfig
    return get_peft_model(tiny_llama(), kind(target_modules=MODULES, **lora))


def what_lives_on(lora: dict[str, Any] | None, how: str, options: dict[str, Any] | None) -> list[str]:
    """What is alive after a training of which nobody holds anything: modules and parameters by name."""
    model = make_model(lora)
    ids = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tuner = None if options is None else SparseTuner(model, update_interval=2, **options)
    for _ in range(4):
        if tuner:
            tuner.begin_step()
        model(**batch).loss.backward()
        optimizer.step()
        if tuner:
            tuner.after_optimizer_step()
        optimizer.zero_grad()
        if tuner:
            tuner.end_step(optimizer)
    if tuner:
        if how == "block":
            with tuner.step(optimizer):
                model(**batch).loss.backward()
                optimizer.step()
        elif how == "in the middle of a step":
            tuner.begin_step()
            model(**batch)
        if how != "not closed":
            tuner.close()
    parts = {**dict(model.named_modules()), **dict(model.named_parameters()), "optimizer": optimizer}
    living = {name: weakref.ref(part) for name, part in parts.items()}
    if tuner:
        living["tuner"] = weakref.ref(tuner)
    del model, optimizer, tuner, parts
    return [name for name, reference in living.items() if reference() is not None]


@pytest.mark.parametrize(
    ("lora", "how", "options"),
    [
        ({}, "closed", {}),
        ({}, "block", {}),
        ({}, "in the middle of a step", {}),
        ({}, "not closed", {}),
        ({}, "closed", {"fused": False}),
        ({}, "closed", {"selector": "all"}),
        ({}, "closed", {"selector": "random"}),
        ({}, "closed", {"recompute": "frozen"}),
        ({}, "closed", {"recompute": "all"}),
        ({}, "closed", {"optimizer_state": "offload"}),
        ({"use_dora": True}, "closed", {}),
        (ADALORA, "closed", {}),
        (None, "closed", {"selector": "lisa", "num_active_layers": 1}),
    ],
)
@pytest.mark.usefixtures("no_collector")
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_closed_training_leaves_nothing(lora: dict[str, Any] | None, how: str, options: dict[str, Any]) -> None:
    assert what_lives_on(lora, how, None) == [], "PEFT and transformers alone"
    assert what_lives_on(lora, how, options) == []


@pytest.mark.parametrize("how", ["closed", "in the middle of a step", "not closed"])
def test_what_was_prepared_of_frozen_matrices_is_freed(
    how: str, no_collector: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another precision than theirs, which is that of most trainings."""
    prepared: list[weakref.ref[Any]] = []

    def noting(*args: Any) -> Any:
        pair = frozen_pair(*args)
        prepared.extend(map(weakref.ref, pair or ()))
        return pair

    monkeypatch.setattr(frozen, "frozen_pair", noting)
    with torch.autocast("cpu", torch.bfloat16):
        assert what_lives_on({}, how, {}) == []
    assert prepared
    assert [pair for pair in prepared if pair() is not None] == []
