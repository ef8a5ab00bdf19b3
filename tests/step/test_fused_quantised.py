"""LoRA as one function on bases that bitsandbytes quantised, in 4 and in 8 bits: PEFT's training within rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ist import SparseTuner
from tests.helpers.quantised import load_quantised, save_llama
from tests.helpers.tiny import tiny_batches, trainable

pytest.importorskip("bitsandbytes", reason="bitsandbytes, which quantises bases, is not installed")

# A library of its own warns at its import.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

NUM_LAYERS, MODULES = 4, ("q_proj", "v_proj", "up_proj")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), NUM_LAYERS)


def quantised(folder: Path, bits: str) -> Any:
    """With random LoRA on it, in training."""
    base = load_quantised(folder, bits)
    torch.manual_seed(1)
    lora = LoraConfig(r=4, target_modules=list(MODULES), init_lora_weights=False)
    return get_peft_model(base, lora).train()


def train(model: nn.Module, steps: int, **options: Any) -> tuple[list[float], list[list[Tensor]], SparseTuner]:
    """The losses and the gradients of some steps, in which nothing is updated."""
    losses, gradients = [], []
    with SparseTuner(model, num_active_layers=2, probe_batches=tiny_batches(1), seed=3, **options) as tuner:
        for batch in tiny_batches(steps):
            tuner.begin_step()
            loss = model(**batch).loss
            loss.backward()
            losses.append(loss.item())
            gradients.append([p.grad.float().clone() for p in trainable(model) if p.grad is not None])
            model.zero_grad()
            tuner.end_step()
    return losses, gradients, tuner


@pytest.mark.parametrize("bits", ["4 bits", "8 bits"])
def test_trains_as_peft_does(bits: str, folder: Path) -> None:
    model = quantised(folder, bits)
    expected_losses, expected, plain = train(model, 3, fused=False)
    losses, gradients, lean = train(model, 3)
    number = NUM_LAYERS * len(MODULES)
    assert (plain.num_fused, lean.num_fused, dict(lean.not_fused)) == (0, number, {})
    assert losses == pytest.approx(expected_losses, rel=5e-3)
    for found, theirs in zip(gradients, expected, strict=True):
        assert len(found) == len(theirs) == number  # half of the layers, A and B of each
        for ours, other in zip(found, theirs, strict=True):
            assert (ours - other).norm() < 0.05 * other.norm()  # activations are bfloat16


@pytest.mark.parametrize("bits", ["4 bits", "8 bits"])
def test_layers_computed_again_change_no_bit(bits: str, folder: Path) -> None:
    model = quantised(folder, bits)
    losses, gradients, _ = train(model, 2)
    again, recomputed, _ = train(model, 2, recompute="frozen")
    assert losses == again
    assert all(
        torch.equal(*pair) for both in zip(gradients, recomputed, strict=True) for pair in zip(*both, strict=True)
    )
