"""LoRA on some modules and bottlenecks on others, as one adapter: `BottleneckConfig(lora_modules=[…])`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from ist import BottleneckConfig, ISTConfig, SparseTuner
from ist.bottleneck import BottleneckLayer
from ist.focusing import find_focus
from tests.helpers.bottlenecks import randomise
from tests.helpers.tiny import tiny_llama

LORA: dict[str, Any] = {"lora_modules": ["q_proj", "v_proj"], "lora_r": 2, "lora_alpha": 6}
PFEIFFER: dict[str, Any] = {"placement": "pfeiffer", "bottleneck_size": 3, **LORA}
IDS = torch.tensor([[1, 2, 3, 4]])


def mixed(**options: Any) -> Any:
    torch.manual_seed(0)
    return get_peft_model(tiny_llama(2), BottleneckConfig(**{**PFEIFFER, **options}))  # type: ignore[arg-type]


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS).logits


def test_each_module_has_its_own_kind() -> None:
    model = mixed()
    found = {
        name.removeprefix("base_model.model.model.layers."): (
            module.bottleneck_position["default"],
            tuple(module.bottleneck_down["default"].weight.shape),  # type: ignore[union-attr]
            module.scaling["default"],
        )
        for name, module in model.named_modules()
        if isinstance(module, BottleneckLayer)
    }
    assert {name: value for name, value in found.items() if name.startswith("1.")} == {
        "1.self_attn.q_proj": ("parallel", (2, 32), 3.0),
        "1.self_attn.v_proj": ("parallel", (2, 32), 3.0),
        "1.mlp.down_proj": ("output", (3, 32), 1.0),
    }
    assert torch.equal(logits(model), logits(tiny_llama(2)))


def test_it_is_pefts_lora() -> None:
    """With the same A and B, and bottlenecks that add nothing yet, to the bit."""
    lora: Any = get_peft_model(tiny_llama(2), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "v_proj"]))  # type: ignore[arg-type]
    beside = mixed()
    modules = dict(beside.named_modules())
    for name, module in lora.named_modules():
        if hasattr(module, "lora_A"):
            module.lora_B["default"].weight.data.normal_()
            modules[name].bottleneck_down["default"].weight.data.copy_(module.lora_A["default"].weight)
            modules[name].bottleneck_up["default"].weight.data.copy_(module.lora_B["default"].weight)
    assert not torch.equal(logits(lora), logits(tiny_llama(2)))
    assert torch.equal(logits(beside), logits(lora))


@pytest.mark.parametrize("options", [{}, {"placement": "houlsby"}, {"placement": "he", "mode": "parallel"}])
def test_it_is_saved_and_loaded_as_one_adapter(tmp_path: Path, options: dict[str, Any]) -> None:
    model = randomise(mixed(**options))
    model.save_pretrained(str(tmp_path))
    loaded: Any = PeftModel.from_pretrained(tiny_llama(2), str(tmp_path))
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(tiny_llama(2)))


def test_ist_trains_both_of_a_layer_and_suppresses_both() -> None:
    model = randomise(mixed())
    config = ISTConfig(num_active_layers=1, update_interval=1, num_candidates=2)
    batch = {"input_ids": IDS, "labels": IDS}
    with SparseTuner(model, config, probe_batches=[batch]) as tuner:
        assert [len(layer.adapters) for layer in tuner.layers] == [3, 3]
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        with tuner.step(optimizer):
            model(**batch).loss.backward()
            active = tuner.active_layers
            moved = {name.split(".")[4] for name, p in model.named_parameters() if p.grad is not None}
            kinds = {name.split(".")[6] for name, p in model.named_parameters() if p.grad is not None}
            optimizer.step()
            optimizer.zero_grad()
        assert tuner.last_update is not None
    assert (moved, kinds) == ({str(layer) for layer in active or ()}, {"q_proj", "v_proj", "down_proj"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_modules": ["query"]}, "lora_modules has 'query', which LlamaForCausalLM lacks: pass ends of the"),
        ({"lora_modules": ["q_proj", "o_proj"], "placement": "houlsby"}, "o_proj' is to have LoRA and a bottleneck: "),
        ({"lora_modules": "q_proj"}, "lora_modules='q_proj' is not a list of names"),
        ({"lora_r": 0}, "lora_r=0 is not a whole number of at least 1"),
        ({"lora_r": True}, "lora_r=True is not"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan is not a finite number"),
        ({"placement": None, "target_modules": ".*down_proj"}, "lora_modules does not go with a regular expression"),
        ({"lora_modules": ["self_attn"]}, "not a linear module: lora_modules takes linear ones"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        mixed(**options)
    assert "\n" not in str(error.value)


def test_a_second_kind_of_adapter_is_refused_with_what_works() -> None:
    """PEFT would freeze the first and save the second alone."""
    lora: Any = get_peft_model(tiny_llama(2), LoraConfig(r=2, target_modules=["q_proj"]))  # type: ignore[arg-type]
    before = [name for name, _ in lora.named_modules()]
    message = r"already \(lora\), and PEFT saves one kind .* BottleneckConfig\(lora_modules="
    with pytest.warns(UserWarning, match="PEFT for a second time"), pytest.raises(ValueError, match=message):
        get_peft_model(lora.base_model.model, BottleneckConfig())
    assert [name for name, _ in lora.named_modules()] == before
    assert lora.peft_config["default"].peft_type == "LORA"


def test_full_names_get_what_they_name() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    model = mixed(placement=None, target_modules=names, lora_modules=["q_proj"])
    found = [name for name, module in model.named_modules() if isinstance(module, BottleneckLayer)]
    assert [name.removeprefix("base_model.model.") for name in found] == names


@pytest.mark.parametrize("size", ["sqrt", "same", "inverse"])
def test_both_kinds_grow_where_layers_are_focused(size: str) -> None:
    given = BottleneckConfig(placement="pfeiffer", bottleneck_size=4, lora_modules=["q_proj"], lora_r=4, lora_alpha=8)
    found = find_focus(tiny_llama(4), given, num_layers=2, spread="even", scaling=size)
    config = found.config
    assert config.lora_r / 4 == pytest.approx(config.bottleneck_size / 4, abs=0.25)
    assert config.lora_r > 4
    factor = config.lora_alpha / config.lora_r / (8 / 4)
    assert factor == pytest.approx(config.scaling)
    assert (factor == 1) == (size == "same")
    assert 0.8 < found.num_parameters / found.num_parameters_before <= 1
    adapted = get_peft_model(tiny_llama(4), config)
    assert sum(isinstance(module, BottleneckLayer) for module in adapted.modules()) == 4
