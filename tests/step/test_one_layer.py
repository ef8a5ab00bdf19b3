"""A focused training of a single layer: everything trains, nothing is chosen."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ist import IST, SparseTuner, focus
from tests.helpers.models import ToyModel, toy_batch
from tests.helpers.tiny import moved_layers, snapshot, tiny_batches, tiny_llama, trainable
from tests.helpers.trainers import make_trainer


class Pipeline(ToyModel):
    """Blocks in an `nn.Sequential`, of which one with adapters might be a pipeline's."""

    def __init__(self) -> None:
        super().__init__(num_blocks=4)
        self.blocks = nn.Sequential(*self.blocks)  # type: ignore[assignment]


def focused_to_one(base: nn.Module, batches: list[Any], targets: list[str]) -> Any:
    config = focus(base, LoraConfig(r=2, target_modules=targets), batches, num_layers=1)
    return get_peft_model(base, config).train()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "batch", "targets"),
    [(lambda: tiny_llama(4), tiny_batches(1)[0], ["q_proj"]), (Pipeline, toy_batch(torch.float32), ["up", "down"])],
    ids=["ModuleList", "Sequential"],
)
def test_a_focus_on_one_layer_trains_as_peft_does(make: Any, batch: Any, targets: list[str]) -> None:
    ends = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = focused_to_one(make(), [batch], targets)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        context: Any = SparseTuner(model, selector="all") if sparse else nullcontext()
        with context as tuner:
            for _ in range(3):
                with tuner.step(optimizer) if tuner else nullcontext((0,)) as active:
                    assert active == (0,)
                    model(**batch)["loss"].backward()
                    optimizer.step()
                    optimizer.zero_grad()
        ends.append(snapshot(model))
    torch.testing.assert_close(ends[0], ends[1])
    assert any("lora_B" in name and value.any() for name, value in ends[0].items())


def test_a_focus_on_one_layer_trains_in_a_trainer(tmp_path: Path) -> None:
    model = focused_to_one(tiny_llama(4), tiny_batches(1), ["q_proj"])
    before = snapshot(model)
    make_trainer(tmp_path, IST(selector="all"), model=model, max_steps=2, save_steps=9).train()
    assert len(moved_layers(before, snapshot(model))) == 1


def test_choosing_needs_more_than_one_layer() -> None:
    model = focused_to_one(tiny_llama(4), tiny_batches(1), ["q_proj"])
    for call in (lambda: SparseTuner(model), lambda: SparseTuner(model, selector="random")):
        with pytest.raises(ValueError, match=r"needs at least 2: .* or train this one with selector='all'"):
            call()
