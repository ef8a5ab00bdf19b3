"""Outputs of Liger's RMSNorm that are made again instead of kept, on a GPU: to the same bits, and with less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ist import SparseTuner
from ist.step.fused import few
from ist.step.fused.again import recipe_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROWS, TOKENS, WIDTH, LAYERS = 4, 512, 512, 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("width", [256, 896, 4096, 5000])
@pytest.mark.parametrize(("casting", "offset"), [("llama", 0.0), ("gemma", 1.0)])
def test_a_norm_has_ligers_bits(dtype: torch.dtype, width: int, casting: str, offset: float) -> None:
    rms_norm: Any = pytest.importorskip("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 300, width, device="cuda")).to(dtype).requires_grad_()
    weight = torch.randn(width, device="cuda").to(dtype)
    y: Tensor = rms_norm.apply(x, weight, 1e-6, offset, casting, True)
    recipe = recipe_of(y, norms=True)
    assert recipe is not None
    assert torch.equal(recipe().view_as(y), y)


def step(monkeypatch: pytest.MonkeyPatch, recompute: Any, dropout: float) -> tuple[dict[str, Tensor], int]:
    """The gradients of a step on all layers of a Llama with Liger, and the bytes that its forward leaves."""
    liger = pytest.importorskip("liger_kernel.transformers")
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=1024, num_hidden_layers=LAYERS, num_attention_heads=4, vocab_size=512
    )
    base: Any = LlamaForCausalLM(shape)
    base.to("cuda", torch.bfloat16)
    liger.apply_liger_kernel_to_llama(model=base)
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=16, target_modules=targets, lora_dropout=dropout, init_lora_weights=False)
    model: Any = get_peft_model(base, config).train()
    ids = torch.randint(512, (ROWS, TOKENS), device="cuda")
    found: dict[str, Tensor] = {}
    held = 0
    with monkeypatch.context() as patch, SparseTuner(model, selector="all", recompute=recompute) as tuner:
        patch.setattr(few, "MOST_ROWS", 0)
        for _ in range(2):  # The first one compiles.
            torch.manual_seed(1)
            tuner.begin_step()
            model.zero_grad()
            before = torch.cuda.memory_allocated()
            loss = model(input_ids=ids, labels=ids).loss
            held = torch.cuda.memory_allocated() - before
            loss.backward()
            found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            tuner.end_step()
    return found, held


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_keeps_no_norms_output(monkeypatch: pytest.MonkeyPatch, dropout: float) -> None:
    """But that of the lowest layer's attention, whose norm has no gradient to bring; gradients have the same bits."""
    now, held = step(monkeypatch, "norms", dropout)
    before, held_before = step(monkeypatch, "none", dropout)
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in now)
    one = ROWS * TOKENS * WIDTH * 2
    assert held_before - held == pytest.approx((2 * LAYERS - 1) * one, rel=0.02)
