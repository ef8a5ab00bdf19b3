"""The gradient probe: the gradients that adapters would have, without adapters, and a model that it leaves alone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoConfig,
    OlmoForCausalLM,
)

from ist import layer_scores
from ist.adapters.layers import discover_layers
from ist.adapters.responses import scaled_response
from ist.probing.gradients import FirstMatrices, Target, adapter_gradients
from ist.probing.suppression import model_loss
from ist.probing.trained import gate_scores, removal_scores
from tests.helpers.models import make_batch, make_model
from tests.helpers.tiny import VOCABULARY, tiny_batches, tiny_llama, tiny_lora

RANK, ALPHA = 4, 8
SEED = 3


def targets(model: nn.Module, ends: tuple[str, ...]) -> dict[str, Target]:
    return {name: Target(RANK, ALPHA / RANK) for name, _ in model.named_modules() if name.endswith(ends)}


def blocks(model: Any) -> list[nn.Module]:
    return list(model.model.layers)


def lora_gradients(model: nn.Module, ends: tuple[str, ...], batches: list[Any]) -> dict[str, Tensor]:
    """`∂L/∂B` by PEFT and autograd, with the probe's `A`; `L` is the mean over the batches."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(ends), fan_in_fan_out="c_attn" in ends)
    adapted: Any = get_peft_model(model, config).eval()
    matrices = FirstMatrices(SEED)
    found = {}
    for name, module in adapted.base_model.model.named_modules():
        if hasattr(module, "lora_A"):
            weight = module.lora_A["default"].weight
            weight.data.copy_(matrices.like(torch.empty(1, weight.shape[1], dtype=weight.dtype), RANK))
            found[name] = module.lora_B["default"].weight
    for batch in batches:
        (adapted(**batch).loss / len(batches)).backward()
    return {name: weight.grad for name, weight in found.items()}


@pytest.mark.parametrize(
    ("architecture", "ends"),
    [
        ("llama", ("q_proj", "down_proj")),
        ("gpt2", ("c_attn", "mlp.c_fc")),
        ("t5", ("q", "wi")),
        ("mixtral", ("q_proj", "v_proj")),
        ("bert", ("query", "output.dense")),
        ("vit", ("q_proj", "v_proj")),
    ],
)
def test_gradients_are_those_of_lora_at_its_start(architecture: str, ends: tuple[str, ...]) -> None:
    model = make_model(architecture)
    batch = make_batch(architecture)
    suffixes = tuple(f".{end}" for end in ends)
    found = adapter_gradients(model, targets(model, suffixes), [batch], seed=SEED)
    expected = lora_gradients(model, ends, [batch])
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert found[name].squared_norm == pytest.approx(gradient.square().sum().item(), rel=1e-4)
        assert found[name].absolute_sum == pytest.approx(gradient.abs().sum().item(), rel=1e-4)


def test_a_model_may_change_the_outputs_in_place() -> None:
    """OLMo clamps its queries so."""
    config = OlmoConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64, clip_qkv=0.01
    )
    model = OlmoForCausalLM(config)
    found = adapter_gradients(model, targets(model, ("q_proj",)), tiny_batches(1), blocks=blocks(model), seed=SEED)
    for name, gradient in lora_gradients(model, ("q_proj",), tiny_batches(1)).items():
        assert found[name].squared_norm == pytest.approx(gradient.square().sum().item(), rel=1e-4)


def test_batches_are_averaged_and_no_more_are_read() -> None:
    model, ends = tiny_llama(), ("q_proj", "up_proj")
    batches = tiny_batches(3)

    def endless() -> Any:
        yield from batches
        raise AssertionError("a fourth batch was read")

    found = adapter_gradients(model, targets(model, ends), endless(), num_batches=3, seed=SEED)
    expected = lora_gradients(model, ends, batches)
    for name, gradient in expected.items():
        assert found[name].squared_norm == pytest.approx(gradient.square().sum().item(), rel=1e-4)


def test_recomputed_blocks_give_the_same_gradients_and_keep_less() -> None:
    model = tiny_llama()
    batch = tiny_batches(1)
    all_targets = targets(model, ("q_proj", "up_proj"))
    kept: dict[bool, int] = {}
    found = {}
    for again in (False, True):
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        def loss(model: nn.Module, batch: Mapping[str, Any], pack: Any = pack) -> Tensor:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                return model_loss(model, batch)

        found[again] = adapter_gradients(
            model, all_targets, batch, blocks=blocks(model) if again else [], loss_function=loss
        )
        kept[again] = sum(sizes)
    assert found[True] == found[False]
    assert kept[True] < kept[False] / 3


def test_same_seed_same_gradients_and_no_global_randomness() -> None:
    model = tiny_llama()
    model.config.attention_dropout = 0.5
    all_targets = targets(model, ("q_proj",))
    before = torch.random.get_rng_state()
    first, again, other = (
        adapter_gradients(model, all_targets, tiny_batches(1), seed=seed, blocks=blocks(model)) for seed in (0, 0, 1)
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert first == again
    assert first != other


def everything(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    state["flags"] = [parameter.requires_grad for parameter in model.parameters()]
    state["gradients"] = [parameter.grad for parameter in model.parameters()]
    state["modes"] = [module.training for module in model.modules()]
    state["hooks"] = sum(len(module._forward_hooks) for module in model.modules())
    state["forwards"] = sum("forward" in module.__dict__ for module in model.modules())
    state["cache"] = model.config.use_cache  # type: ignore[union-attr]
    return state


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key]
        for key, value in one.items()
    )


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    model = tiny_llama().train()
    model.model.embed_tokens.requires_grad_(False)
    before = everything(model)

    def loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        value = model_loss(model, batch)
        if fails:
            raise RuntimeError("as a user's loss may")
        return value

    call = lambda: adapter_gradients(  # noqa: E731
        model, targets(model, ("q_proj",)), tiny_batches(1), blocks=blocks(model), loss_function=loss
    )
    if fails:
        with pytest.raises(RuntimeError, match="as a user's"):
            call()
    else:
        call()
    assert same(before, everything(model))


@pytest.mark.parametrize(
    ("batches", "loss", "message"),
    [
        ([], None, "gave no batch"),
        ("rows.jsonl", None, "give what a training loop would iterate over"),
        ({"input_ids": [1]}, None, "give what a training loop would iterate over"),
        (None, lambda model, batch: model(**batch).logits, "shape"),
        (None, lambda model, batch: model(**batch).loss * float("nan"), "probe batch 0 is nan"),
        (None, lambda model, batch: model(**batch).loss.detach(), "no gradient by any of the 4 modules"),
    ],
)
def test_what_cannot_be_measured_is_one_line(batches: Any, loss: Any, message: str) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=message) as error:
        adapter_gradients(
            model,
            targets(model, ("q_proj",)),
            tiny_batches(1) if batches is None else batches,
            loss_function=loss or model_loss,
        )
    assert "\n" not in str(error.value)


QUANTISED: dict[str, dict[str, Any]] = {"4 bits": {"load_in_4bit": True}, "8 bits": {"load_in_8bit": True}}


@pytest.mark.parametrize("bits", QUANTISED)
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_quantised_models_are_measured_and_left_alone(bits: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes, which quantises bases, is not installed")
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(tmp_path)
    quantised = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**QUANTISED[bits])
    )
    before = everything(quantised)
    ends = ("q_proj", "up_proj")
    found = adapter_gradients(quantised, targets(quantised, ends), tiny_batches(1), blocks=blocks(quantised))
    assert same(before, everything(quantised))
    exact = adapter_gradients(base, targets(base, ends), tiny_batches(1))
    for name, gradient in exact.items():
        assert found[name].squared_norm == pytest.approx(gradient.squared_norm, rel=0.5)


def test_removal_is_what_the_loss_gains_by_each_layer() -> None:
    model = tiny_lora()
    layers = discover_layers(model)
    (batch,) = tiny_batches(1)
    found = removal_scores(model, layers, [batch], model_loss)
    model.eval()
    with torch.no_grad():
        full = model(**batch).loss.item()
        for layer, score in zip(layers, found, strict=True):
            kept = [(weight, weight.clone()) for name, weight in layer.module.named_parameters() if "lora_B" in name]
            for weight, _ in kept:
                weight.zero_()
            assert score == pytest.approx(model(**batch).loss.item() - full, abs=1e-5)
            for weight, value in kept:
                weight.copy_(value)


@pytest.mark.parametrize("criterion", ["gate", "removal", "activation"])
def test_scores_that_are_no_numbers_are_refused(criterion: Any) -> None:
    """A batch whose labels are all ignored has a loss of NaN, and gradients of 0."""
    first, second = tiny_batches(2)
    batches = [first, {**second, "labels": torch.full_like(second["labels"], -100)}]
    model, config = tiny_lora(), None
    if criterion == "activation":
        model, config = tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])
        with torch.no_grad():
            model.get_parameter("model.layers.2.mlp.down_proj.weight").fill_(torch.nan)
    with pytest.raises(ValueError, match=r"The importance of .*layers.\d is nan, so nothing was measured: look at the"):
        layer_scores(model, config, batches, criterion=criterion)


@pytest.mark.parametrize("criterion", ["gate", "removal"])
def test_adapters_that_were_not_trained_are_refused(criterion: Any) -> None:
    with pytest.raises(ValueError, match=f"criterion='{criterion}' says nothing of them: train the adapters"):
        layer_scores(tiny_lora(init_lora_weights=True), None, tiny_batches(1), criterion=criterion)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["LoRA", "DoRA"])
def test_gates_are_gradients_at_the_midpoint(options: dict[str, Any]) -> None:
    """Against the difference quotient of the loss by the factor of each layer, the others at the midpoint."""
    model = tiny_lora(**options).double()
    layers = discover_layers(model)
    (batch,) = tiny_batches(1)

    def double_loss(model: Any, batch: Mapping[str, Any]) -> Tensor:
        logits = model(input_ids=batch["input_ids"]).logits[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())

    found = gate_scores(model, layers, [batch], double_loss)
    assert found == gate_scores(model, layers, [batch, batch], double_loss)

    def loss(factors: list[float]) -> float:
        with ExitStack() as stack, torch.no_grad():
            for layer, factor in zip(layers, factors, strict=True):
                for adapter in layer.adapters.values():
                    stack.enter_context(scaled_response(adapter, factor))
            return double_loss(model, batch).item()

    model.eval()
    for index, score in enumerate(found):
        step = [0.625 + 1e-3 * (other == index) for other in range(len(layers))]
        back = [0.625 - 1e-3 * (other == index) for other in range(len(layers))]
        assert score == pytest.approx(-0.75 * (loss(step) - loss(back)) / 2e-3, rel=1e-3)
