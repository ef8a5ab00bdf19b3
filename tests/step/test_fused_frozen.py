"""Frozen modules that compute as one function, in the models and states that users bring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ist import SparseTuner
from ist.step.fused import products
from tests.helpers.tiny import layer_of, snapshot, tiny_batches, tiny_lora, trainable

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip


def train(model: Any, fused: bool, max_norm: float = 0.05) -> tuple[dict[str, Any], list[float], set[int | None]]:
    """Weights, norms before clipping, and the layers that held gradients."""
    optimizer = torch.optim.AdamW(trainable(model), lr=5e-3)
    norms, layers = [], set()
    with SparseTuner(model.train(), selector="fixed:1", fused=fused) as tuner:
        for batch in tiny_batches(4):
            tuner.begin_step()
            model(**batch).loss.backward()
            layers |= {layer_of(name) for name, weight in model.named_parameters() if weight.grad is not None}
            norms.append(float(torch.nn.utils.clip_grad_norm_(trainable(model), max_norm)))
            optimizer.step()
            optimizer.zero_grad()
            tuner.end_step(optimizer)
    return snapshot(model), norms, layers


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_trainable_biases_of_frozen_modules_stay_out_of_the_graph(bias: str) -> None:
    """Their gradients would count for the norm to clip by, and under DDP on each rank in its own way."""

    def model() -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, bias=bias)  # type: ignore
        return peft.get_peft_model(Qwen2ForCausalLM(Qwen2Config(**SHAPE)), config)

    (weights, norms, layers), (expected, expected_norms, _) = train(model(), True), train(model(), False)
    assert layers <= ({1} if bias == "lora_only" else {1, 0, 2, 3, None})
    assert norms == pytest.approx(expected_norms, rel=1e-6)
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_input_in_the_dtype_of_autocast_and_a_float32_weight(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As attention gives to its output projection; wide ones, of many rows, are added up in place."""
    monkeypatch.setattr(products, "FEW_ROWS", 4)
    torch.manual_seed(0)
    model: Any = MistralForCausalLM(MistralConfig(**{**SHAPE, "head_dim": 4}))
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False))
    losses = []
    for fused in (False, True):
        with SparseTuner(model.train(), selector="fixed:1", fused=fused) as tuner:
            tuner.begin_step()
            with torch.autocast("cpu", dtype):
                losses.append(model(**tiny_batches(1)[0]).loss)
            losses[-1].backward()
            with torch.no_grad(), torch.autocast("cpu", dtype):
                assert float(model(**tiny_batches(1)[0]).loss) == pytest.approx(float(losses[-1].detach()), rel=1e-6)
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-3, atol=0)


def loss_of(model: Any) -> float:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return float(model(**tiny_batches(1)[0]).loss)


@pytest.mark.parametrize("write", [lambda b: b.data.zero_(), lambda b: setattr(b, "data", torch.zeros_like(b))])
def test_writes_that_no_counter_sees_are_seen_after_an_update(write: Callable[[Any], Any]) -> None:
    model = tiny_lora().train()
    batch = tiny_batches(1)[0]
    with SparseTuner(model, selector="fixed:0", probe_batches=[batch]) as tuner:
        tuner.begin_step()
        before = loss_of(model)
        tuner.end_step()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                write(parameter)
        with torch.autocast("cpu", torch.bfloat16):
            tuner._measure([(0,)])
        tuner.begin_step()
        without = loss_of(model)
        with model.disable_adapter():
            assert without == pytest.approx(loss_of(model), rel=1e-6) != before


def test_an_adapter_that_the_tuner_has_not_seen_trains_as_peft_trains_it() -> None:
    gradients = {}
    for fused in (True, False):
        model: Any = tiny_lora().train()
        torch.manual_seed(1)
        model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
        with SparseTuner(model, selector="fixed:1", fused=fused) as tuner:
            tuner.begin_step()
            model.set_adapter("other")
            model(**tiny_batches(1)[0]).loss.backward()
        gradients[fused] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients[True].keys() == gradients[False].keys() != {}
    assert {layer_of(name) for name in gradients[True]} == {0, 1, 2, 3}
