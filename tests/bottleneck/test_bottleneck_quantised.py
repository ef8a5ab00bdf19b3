"""Adapters on bases that bitsandbytes quantised, in 4 and in 8 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn

from ist import SparseTuner
from ist.adapters.layers import discover_layers
from ist.adapters.responses import has_exact_factor, scaled_response
from ist.bottleneck import BottleneckConfig, BottleneckLayer, prune_adapter
from ist.probing.suppression import suppress
from tests.helpers.quantised import BITS, load_quantised, save_llama
from tests.helpers.tiny import snapshot, tiny_batches, trainable

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes, which quantises bases, is not installed")

# A library of its own warns at its import.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")

KINDS = {"4 bits": "Linear4bit", "4 bits, nested": "Linear4bit", "8 bits": "Linear8bitLt"}
SERIES, PARALLEL, HE = {"mode": "series"}, {"mode": "parallel"}, {"mode": "parallel", "placement": "he"}
PLACES = pytest.mark.parametrize("options", [SERIES, PARALLEL, HE], ids=["series", "parallel", "he"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"), 2)


@pytest.fixture(params=BITS)
def bits(request: pytest.FixtureRequest) -> str:
    return request.param


def load(folder: Path, bits: str) -> Any:
    model = load_quantised(folder, bits)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == KINDS[bits]
    return model


def adapted(folder: Path, bits: str, **options: Any) -> Any:
    base = load(folder, bits)
    torch.manual_seed(1)
    model = get_peft_model(base, BottleneckConfig(**{"bottleneck_size": 4, **options}))
    assert isinstance(model, PeftModel)
    return model.train()


def randomise(model: nn.Module) -> Any:
    """Move every trainable parameter away from its start."""
    generator = torch.Generator().manual_seed(2)
    for parameter in trainable(model):
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_batches(1)[0]["input_ids"]).logits


@PLACES
def test_untrained_adapter_changes_nothing_and_one_step_moves_it_alone(folder, bits, options):
    expected = logits(load(folder, bits))
    model = adapted(folder, bits, **options)
    assert torch.equal(logits(model), expected)
    parameters = trainable(model)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    before = snapshot(model)
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    for batch in tiny_batches(2):  # W_down learns from the second step on
        model(**batch).loss.backward()
        assert all(parameter.grad is not None for parameter in parameters)
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert logits(model).dtype == torch.bfloat16
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@PLACES
def test_output_equals_the_equation_on_the_bases_own_output(folder, bits, options):
    model = randomise(adapted(folder, bits, **options))
    layers = [module for module in model.modules() if isinstance(module, BottleneckLayer)]
    assert layers
    for layer in layers:
        x = torch.randn(2, 5, 64 if layer.in_features == 64 else 128, dtype=torch.bfloat16)
        down: Any = layer.bottleneck_down["default"]
        up: Any = layer.bottleneck_up["default"]
        w_down, w_up = down.weight.T, up.weight.T

        def response(h: Tensor, w_down: Tensor = w_down, w_up: Tensor = w_up) -> Tensor:
            return ((h.float() @ w_down).clamp(min=0) @ w_up).to(torch.bfloat16)

        base = layer.base_layer
        with torch.no_grad():
            expected = {
                "input": lambda x=x, base=base: base(x + response(x)),
                "output": lambda x=x, base=base: base(x) + response(base(x)),
                "parallel": lambda x=x, base=base: base(x) + response(x),
            }[layer.bottleneck_position["default"]]()
            assert not torch.equal(expected, base(x))
            torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


@PLACES
def test_save_and_load(folder, bits, options, tmp_path):
    model = randomise(adapted(folder, bits, sparsity=0.5, **options))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(folder, bits), tmp_path, is_trainable=True).train()
    assert torch.equal(logits(loaded), logits(model))
    assert {parameter.dtype for parameter in trainable(loaded)} == {torch.float32}


def test_prepare_model_for_kbit_training(folder, bits):
    base = prepare_model_for_kbit_training(load(folder, bits), gradient_checkpointing_kwargs={"use_reentrant": False})
    expected = logits(base)
    model = get_peft_model(base, BottleneckConfig(bottleneck_size=4)).train()
    assert torch.equal(logits(model), expected)
    assert model.is_gradient_checkpointing
    model(**tiny_batches(1)[0]).loss.backward()
    ups = [p for name, p in model.named_parameters() if "bottleneck_up" in name]
    assert len(ups) == 4
    assert all(p.grad is not None and p.grad.any() for p in ups)
    assert all(p.grad is None for name, p in model.named_parameters() if "bottleneck" not in name)


def test_pruning_by_data(folder):
    model = adapted(folder, "8 bits")
    before = logits(model)
    prune_adapter(model, tiny_batches(2), 0.5)
    assert model.training
    assert torch.equal(logits(model), before)


# --- under the importance loop ---


@pytest.mark.parametrize("adapter", ["lora", "series", "parallel"])
@pytest.mark.parametrize("beta", [0.0, 0.25])
def test_suppressed_response_is_the_bases_output_and_beta_times_the_rest(folder, bits, adapter, beta):
    model = load(folder, bits)
    if adapter == "lora":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    else:
        model = get_peft_model(model, BottleneckConfig(mode=adapter, bottleneck_size=4))
    randomise(model.train())
    for layer in discover_layers(model):
        module: Any
        for module in layer.adapters.values():
            assert has_exact_factor(module)
            calls: list[int] = []
            handle = module.base_layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
            x = torch.randn(2, 5, module.in_features, dtype=torch.bfloat16)
            with torch.no_grad(), scaled_response(module, beta):
                suppressed = module(x)
            assert len(calls) == 1  # the factor alone: the base is not run once more
            handle.remove()
            with torch.no_grad():
                full, base = module(x).float(), module.base_layer(x).float()
            assert not torch.equal(full, base)
            if getattr(module, "bottleneck_position", {}).get("default") == "input":
                inside = x + (beta * module.response("default", x)).to(x.dtype)
                assert torch.equal(suppressed, module.base_layer(inside))
            else:
                bound = 0.02 * full.abs().max().item()  # bfloat16 carries 8 bits
                torch.testing.assert_close(suppressed.float(), base + beta * (full - base), rtol=0, atol=bound)


@pytest.mark.parametrize("adapter", ["lora", "series"])
def test_a_sparse_training_on_a_quantised_base(folder, adapter):
    model = load(folder, "8 bits")
    config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    model = get_peft_model(model, config if adapter == "lora" else BottleneckConfig(bottleneck_size=4)).train()
    expected = logits(model)
    with suppress(discover_layers(model), (), 0.0):
        assert torch.equal(logits(model), expected)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
    with SparseTuner(model, num_active_layers=1, num_unsuppressed_layers=1, update_interval=2) as tuner:
        for batch in tiny_batches(4):
            (active,) = tuner.begin_step()
            before = snapshot(model)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            moved = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
            assert moved
            assert all(f".layers.{active}." in name for name in moved)
            tuner.end_step(optimizer)
        assert tuner.last_update is not None


@pytest.mark.parametrize("name", ["4 bits", "8 bits"])
def test_gradients_still_pass_after_the_layers_were_measured(folder: Path, name: str) -> None:
    """On some CPUs bitsandbytes repacks a 4-bit weight when it evaluates, and torch then finds no gradient for it."""
    model = get_peft_model(load(folder, name), LoraConfig(target_modules=["q_proj", "down_proj"]))  # type: ignore[arg-type]
    batches = tiny_batches(2)
    with SparseTuner(model, num_active_layers=2, update_interval=1, probe_batches=batches) as tuner:
        for batch in batches:
            tuner.begin_step()
            model(**batch).loss.backward()
            assert all(parameter.grad is not None for parameter in trainable(model))
            model.zero_grad()
            tuner.end_step()
        assert tuner.last_update is not None
