"""Layers are found from structure: which blocks, which adapters, what trains in each and what trains outside."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import (
    AdaLoraConfig,
    LilyConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    VBLoRAConfig,
    inject_adapter_in_model,
)
from torch import nn

from ist import discover_layers
from ist.adapters.layers import Layer, parameters_outside
from tests.helpers.models import ARCHITECTURES, Stack, ToyBlock, ToyModel, make_batch, make_lora, make_model, wrap

BASE = "base_model.model"
QV = ["q_proj", "v_proj"]

# Architecture, target modules (None: those of models.py), layers, first block, adapters in the first block.
DISCOVERY: list[tuple[str, Any, int, str, int]] = [
    ("gpt2", "all-linear", 3, "transformer.h.0", 4),
    ("opt", "all-linear", 3, "model.decoder.layers.0", 6),
    ("gptj", "all-linear", 3, "transformer.h.0", 6),
    ("bloom", "all-linear", 3, "transformer.h.0", 4),
    ("llama", "all-linear", 3, "model.layers.0", 7),
    ("mistral", "all-linear", 3, "model.layers.0", 7),
    ("qwen2", "all-linear", 3, "model.layers.0", 7),
    ("qwen3", "all-linear", 3, "model.layers.0", 7),
    ("gemma", "all-linear", 3, "model.layers.0", 7),
    ("phi", "all-linear", 3, "model.layers.0", 6),
    ("gpt-neox", "all-linear", 3, "gpt_neox.layers.0", 4),
    ("falcon", "all-linear", 3, "transformer.h.0", 4),
    ("mixtral", ["q_proj", "k_proj", "v_proj", "o_proj"], 3, "model.layers.0", 4),
    ("bert", ["query", "key", "value"], 3, "bert.encoder.layer.0", 3),
    ("vit", None, 3, "vit.layers.0", 4),
    ("t5", "all-linear", 5, "encoder.block.0", 6),
    ("swin", None, 3, "swin.encoder.layers.0", 8),
    ("llama", ["q_proj"], 3, "model.layers.0", 1),
    ("llama", r".*layers\.(0|2)\.mlp\.up_proj", 2, "model.layers.0", 1),
    ("gpt2", ["mlp.c_proj"], 3, "transformer.h.0", 1),
    ("t5", r"encoder.*SelfAttention\.q", 3, "encoder.block.0", 1),
    ("t5", r"decoder.*EncDecAttention\.(q|v)", 2, "decoder.block.0", 2),
]


def names(layers: tuple[Layer, ...]) -> list[str]:
    """The blocks' names without PEFT's own part."""
    assert all(layer.name.startswith(f"{BASE}.") for layer in layers)
    return [layer.name.removeprefix(f"{BASE}.") for layer in layers]


def trainable_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def names_inside(model: nn.Module, layers: tuple[Layer, ...]) -> set[str]:
    """Names of the parameters that the layers own."""
    owned = {id(parameter) for layer in layers for parameter in layer.parameters}
    return {name for name, parameter in model.named_parameters() if id(parameter) in owned}


def make_table_model(name: str, targets: Any) -> PeftModel:
    return make_lora(name) if targets is None else make_lora(name, target_modules=targets)


@pytest.mark.parametrize(("name", "targets", "num_layers", "first", "num_adapters"), DISCOVERY)
def test_layers_are_the_blocks_of_the_outermost_stack(
    name: str, targets: Any, num_layers: int, first: str, num_adapters: int
) -> None:
    model = make_table_model(name, targets)
    layers = discover_layers(model)
    assert len(layers) == num_layers
    assert [layer.index for layer in layers] == list(range(num_layers))
    assert names(layers)[0] == first
    assert len(layers[0].adapters) == num_adapters
    for layer in layers:
        assert layer.module is model.get_submodule(layer.name)
        assert layer.adapters
        for adapter_name, adapter in layer.adapters.items():
            assert adapter is model.get_submodule(adapter_name)
            assert adapter_name.startswith(f"{layer.name}.")


@pytest.mark.parametrize(("name", "targets"), [row[:2] for row in DISCOVERY])
def test_every_adapter_parameter_is_in_exactly_one_layer(name: str, targets: Any) -> None:
    """A layer owns what trains under its name, and nothing trains elsewhere."""
    model = make_table_model(name, targets)
    layers = discover_layers(model)
    for layer in layers:
        under = [p for n, p in model.named_parameters() if p.requires_grad and n.startswith(f"{layer.name}.")]
        assert list(map(id, layer.parameters)) == list(map(id, under))
    owned = [id(parameter) for layer in layers for parameter in layer.parameters]
    assert len(set(owned)) == len(owned) == len(trainable_names(model))
    assert parameters_outside(model, layers) == {}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_order_is_that_of_the_forward_pass(name: str) -> None:
    model = make_lora(name)
    layers = discover_layers(model, "encoder.layers.*.blocks" if name == "swin" else None)
    calls: list[int] = []
    for layer in layers:
        layer.module.register_forward_pre_hook(lambda *_, index=layer.index: calls.append(index))
    model(**make_batch(name))
    assert calls == list(range(len(layers)))


def test_encoder_comes_before_decoder() -> None:
    expected = [f"encoder.block.{i}" for i in range(3)] + [f"decoder.block.{i}" for i in range(2)]
    assert names(discover_layers(make_lora("t5"))) == expected


def test_two_discoveries_agree() -> None:
    model = make_lora("t5")
    first, second = discover_layers(model), discover_layers(model)
    assert names(first) == names(second)
    assert [list(layer.adapters) for layer in first] == [list(layer.adapters) for layer in second]
    assert [list(map(id, a.parameters)) for a in first] == [list(map(id, b.parameters)) for b in second]


@pytest.mark.parametrize(
    ("parameters", "num_parameters"), [(["gate_up_proj"], 2), (["down_proj"], 2), (["gate_up_proj", "down_proj"], 4)]
)
def test_experts_with_adapted_parameters_belong_to_their_layer(parameters: list[str], num_parameters: int) -> None:
    """Two wrappers around one module stand one inside the other: only the outer one is listed."""
    targets = [f"mlp.experts.{parameter}" for parameter in parameters]
    model = make_lora("mixtral", target_modules=QV, target_parameters=targets)
    layers = discover_layers(model)
    assert names(layers) == [f"model.layers.{i}" for i in range(3)]
    for layer in layers:
        parts = [name.removeprefix(f"{layer.name}.") for name in layer.adapters]
        assert parts == ["self_attn.q_proj", "self_attn.v_proj", "mlp.experts"]
        assert len(layer.parameters) == 4 + num_parameters
    assert names_inside(model, layers) == trainable_names(model)


def test_lists_of_experts_are_no_layers() -> None:
    blocks = nn.ModuleList(Stack(experts=nn.ModuleList(nn.Linear(4, 4) for _ in range(5))) for _ in range(3))
    model = wrap(Stack(blocks=blocks), LoraConfig(r=2, target_modules=r".*experts\.\d"))
    layers = discover_layers(model)
    assert names(layers) == ["blocks.0", "blocks.1", "blocks.2"]
    assert [len(layer.adapters) for layer in layers] == [5, 5, 5]


# ---- Containers


CONTAINERS: dict[str, tuple[Callable[[], nn.Module], list[str], list[str]]] = {
    "Sequential of blocks": (
        lambda: Stack(body=nn.Sequential(ToyBlock(), ToyBlock(), ToyBlock())),
        ["up"],
        ["body.0", "body.1", "body.2"],
    ),
    "Sequential of linear modules": (
        lambda: Stack(body=nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8))),
        ["body.0", "body.2"],
        ["body.0", "body.2"],
    ),
    "ModuleList of linear modules": (
        lambda: Stack(body=nn.ModuleList(nn.Linear(8, 8) for _ in range(3))),
        ["body.0", "body.1", "body.2"],
        ["body.0", "body.1", "body.2"],
    ),
    "the model is a Sequential": (lambda: nn.Sequential(ToyBlock(), ToyBlock()), ["up"], ["0", "1"]),
    "Sequential with named parts": (
        lambda: Stack(body=nn.Sequential(OrderedDict(first=ToyBlock(), second=ToyBlock()))),
        ["up"],
        ["body.first", "body.second"],
    ),
}


@pytest.mark.parametrize(("build", "targets", "expected"), CONTAINERS.values(), ids=CONTAINERS)
def test_containers(build: Callable[[], nn.Module], targets: list[str], expected: list[str]) -> None:
    model = wrap(build(), LoraConfig(r=2, target_modules=targets))
    layers = discover_layers(model)
    assert names(layers) == expected
    assert names_inside(model, layers) == trainable_names(model)


def test_a_block_may_be_an_adapter_itself() -> None:
    body = nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 8))
    layers = discover_layers(wrap(Stack(body=body), LoraConfig(r=2, target_modules=["0", "2"])))
    for layer in layers:
        assert layer.adapters == {layer.name: layer.module}


def test_a_model_without_peft_wrapper() -> None:
    model = inject_adapter_in_model(LoraConfig(r=2, target_modules=["up"]), ToyModel(num_blocks=3))
    layers = discover_layers(model)
    assert [layer.name for layer in layers] == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_block_used_twice_is_one_layer() -> None:
    shared, last = ToyBlock(), ToyBlock()
    model = wrap(Stack(body=nn.ModuleList([shared, shared, last])), LoraConfig(r=2, target_modules=["up"]))
    layers = discover_layers(model)
    assert names(layers) == ["body.0", "body.2"]
    assert names_inside(model, layers) == trainable_names(model)


# ---- What counts


@pytest.mark.parametrize("transformed", [[0, 2], [1, 2]])
def test_layers_without_adapters_are_left_out(transformed: list[int]) -> None:
    model = make_lora("llama", layers_to_transform=transformed)
    layers = discover_layers(model)
    assert names(layers) == [f"model.layers.{i}" for i in transformed]
    assert [layer.index for layer in layers] == [0, 1]


def test_only_what_trains_counts() -> None:
    """Of two adapters the active one; and it alone says which blocks are layers."""
    model = make_lora("llama", target_modules=["q_proj"])
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1, 2]))

    layers = discover_layers(model)
    assert names(layers) == [f"model.layers.{i}" for i in (0, 1, 2)]
    assert names_inside(model, layers) == {n for n in trainable_names(model) if ".default." in n}

    model.set_adapter("second")
    layers = discover_layers(model)
    assert names(layers) == ["model.layers.1", "model.layers.2"]
    assert [len(layer.parameters) for layer in layers] == [2, 2]
    assert all(".second." in name for name in names_inside(model, layers))

    model.base_model.set_adapter(["default", "second"])  # pyright: ignore[reportCallIssue]
    assert [len(layer.parameters) for layer in discover_layers(model)] == [2, 4, 4]


def test_a_frozen_parameter_of_an_adapter_does_not_count() -> None:
    """As where only B trains (LoRA-FA)."""
    model = make_lora("llama", target_modules=["q_proj"])
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad = False
    layers = discover_layers(model)
    assert [len(layer.parameters) for layer in layers] == [1, 1, 1]
    assert all("lora_B" in name for name in names_inside(model, layers))


@pytest.mark.parametrize(
    ("config", "num_parameters"),
    [
        (AdaLoraConfig(init_r=4, total_step=10, target_modules=["up", "down"]), 6),
        (LoHaConfig(r=2, target_modules=["up", "down"]), 8),
        (LoraConfig(r=2, target_modules=["up", "down"], use_dora=True), 6),
    ],
    ids=["AdaLoRA", "LoHa", "DoRA"],
)
def test_parameters_of_other_methods(config: Any, num_parameters: int) -> None:
    model = wrap(ToyModel(num_blocks=3), config)
    layers = discover_layers(model)
    assert [len(layer.parameters) for layer in layers] == [num_parameters] * 3
    assert names_inside(model, layers) == trainable_names(model)


# ---- What trains outside of the layers


def norms(template: str) -> set[str]:
    return {f"model.layers.{i}.{template}" for i in range(3)}


OUTSIDE: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "head in modules_to_save": (
        "bert",
        {"modules_to_save": ["classifier"]},
        {"classifier.modules_to_save.default.weight", "classifier.modules_to_save.default.bias"},
    ),
    "norm in modules_to_save": (
        "llama",
        {"modules_to_save": ["input_layernorm"]},
        norms("input_layernorm.modules_to_save.default.weight"),
    ),
    "trainable tokens": (
        "llama",
        {"trainable_token_indices": {"embed_tokens": [1, 2]}},
        {"model.embed_tokens.token_adapter.trainable_tokens_delta.default"},
    ),
    "LoRA on the embedding": (
        "llama",
        {"target_modules": ["embed_tokens", "q_proj"]},
        {f"model.embed_tokens.lora_embedding_{matrix}.default" for matrix in "AB"},
    ),
    "LoRA on the head": (
        "llama",
        {"target_modules": ["lm_head", "q_proj"]},
        {f"lm_head.lora_{matrix}.default.weight" for matrix in "AB"},
    ),
    "biases of adapted modules": ("llama", {"target_modules": QV, "bias": "lora_only"}, set()),
    "all biases": (
        "llama",
        {"target_modules": QV, "bias": "all"},
        norms("self_attn.k_proj.bias") | norms("self_attn.o_proj.bias"),
    ),
}


@pytest.mark.parametrize(("name", "options", "expected"), OUTSIDE.values(), ids=OUTSIDE)
def test_what_trains_outside_of_the_layers(name: str, options: dict[str, Any], expected: set[str]) -> None:
    model = make_lora(name, **options)
    layers = discover_layers(model)
    outside = parameters_outside(model, layers)
    assert set(outside) == {f"{BASE}.{parameter}" for parameter in expected}
    assert all(parameter is model.get_parameter(key) for key, parameter in outside.items())
    assert len(layers) == 3
    assert names_inside(model, layers) == trainable_names(model) - set(outside)


def test_biases_of_adapted_modules_belong_to_their_layer() -> None:
    model = make_lora("llama", target_modules=["q_proj"], bias="lora_only")
    inside = names_inside(model, discover_layers(model))
    assert {name.removeprefix(f"{BASE}.") for name in inside if "lora_" not in name} == norms(
        "self_attn.q_proj.base_layer.bias"
    )


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            VBLoRAConfig(r=2, num_vectors=8, vector_length=8, target_modules=QV),
            {"model.layers.0.self_attn.q_proj.vblora_vector_bank.default"},
        ),
        (
            LilyConfig(r=2, target_modules=["q_proj"]),
            {"model.layers.0.self_attn.q_proj.lily_B.default.weight"},
        ),
    ],
    ids=["VB-LoRA", "Lily"],
)
def test_a_bank_shared_by_the_layers_is_outside(config: Any, expected: set[str]) -> None:
    model = wrap(make_model("llama"), config)
    layers = discover_layers(model)
    outside = parameters_outside(model, layers)
    assert {name.removeprefix(f"{BASE}.") for name in outside} == expected
    assert names_inside(model, layers) == trainable_names(model) - set(outside)
    assert all(layer.parameters for layer in layers)


def test_a_parameter_tied_between_two_layers_is_outside() -> None:
    model = wrap(ToyModel(num_blocks=3), LoraConfig(r=2, target_modules=["up"]))
    first, second = (model.get_submodule(f"{BASE}.blocks.{i}.up.lora_A.default") for i in (0, 1))
    second.weight = first.weight
    layers = discover_layers(model)
    assert [len(layer.parameters) for layer in layers] == [1, 1, 2]
    assert list(parameters_outside(model, layers)) == [f"{BASE}.blocks.0.up.lora_A.default.weight"]


def test_a_parameter_tied_within_a_layer_is_its_own() -> None:
    model = wrap(
        Stack(body=nn.Sequential(*(ToyBlock(8, 8) for _ in range(2)))), LoraConfig(r=2, target_modules=["up", "down"])
    )
    for block in ("0", "1"):
        up, down = (model.get_submodule(f"{BASE}.body.{block}.{part}.lora_A.default") for part in ("up", "down"))
        down.weight = up.weight
    layers = discover_layers(model)
    assert [len(layer.parameters) for layer in layers] == [3, 3]
    assert parameters_outside(model, layers) == {}


# ---- Which stack


def two_towers() -> PeftModel:
    towers = {
        "vision": Stack(layers=nn.ModuleList(ToyBlock() for _ in range(3))),
        "text": Stack(layers=nn.ModuleList(ToyBlock() for _ in range(2))),
    }
    return wrap(Stack(**towers), LoraConfig(r=2, target_modules=["up"]))


VISION = [f"vision.layers.{i}" for i in range(3)]
TEXT = [f"text.layers.{i}" for i in range(2)]
STAGES = [f"swin.encoder.layers.{i}" for i in range(3)]
SWIN_BLOCKS = [f"swin.encoder.layers.{i}.blocks.{j}" for i, depth in enumerate((2, 2, 3)) for j in range(depth)]

CHOICES: list[tuple[Callable[[], PeftModel], Any, list[str]]] = [
    (two_towers, f"{BASE}.vision.layers", VISION),
    (two_towers, "vision.layers", VISION),
    (two_towers, "text.layers", TEXT),
    (two_towers, ["text.layers"], TEXT),
    (two_towers, ["vision.layers", "text.layers"], VISION + TEXT),
    (two_towers, ["text.layers", "vision.layers"], VISION + TEXT),
    (two_towers, ("text.layers", "text.layers"), TEXT),
    (two_towers, "*.layers", VISION + TEXT),
    (lambda: make_lora("t5"), "encoder.block", [f"encoder.block.{i}" for i in range(3)]),
    (lambda: make_lora("t5"), "decoder.block", [f"decoder.block.{i}" for i in range(2)]),
    (lambda: make_lora("swin"), None, STAGES),
    (lambda: make_lora("swin"), "encoder.layers", STAGES),
    (lambda: make_lora("swin"), "layers.*.blocks", SWIN_BLOCKS),
    (lambda: make_lora("swin"), f"{BASE}.swin.encoder.layers.*.blocks", SWIN_BLOCKS),
    (lambda: make_lora("swin"), "*.blocks", SWIN_BLOCKS),
    (lambda: make_lora("swin"), "layers.2.blocks", SWIN_BLOCKS[4:]),
]


@pytest.mark.parametrize(("build", "choice", "expected"), CHOICES, ids=[str(row[1]) for row in CHOICES])
def test_choosing_stacks(build: Callable[[], PeftModel], choice: Any, expected: list[str]) -> None:
    layers = discover_layers(build(), choice)
    assert names(layers) == expected
    assert [layer.index for layer in layers] == list(range(len(expected)))


def test_the_other_stack_trains_outside() -> None:
    model = two_towers()
    outside = parameters_outside(model, discover_layers(model, "text.layers"))
    assert set(outside) == {name for name in trainable_names(model) if name.startswith(f"{BASE}.vision.")}
    assert len(outside) == 6


# ---- Errors


def merged() -> nn.Module:
    model = make_lora("llama", target_modules=["q_proj"])
    model.merge_adapter()
    return model


def prompt(config: Any) -> Callable[[], nn.Module]:
    return lambda: wrap(make_model("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=2))


def one_trained_layer() -> nn.Module:
    model = make_lora("llama", target_modules=["q_proj"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "layers.1." in name and "lora_" in name
    return model


def q_lora(**options: Any) -> Callable[[], nn.Module]:
    return lambda: make_lora("llama", target_modules=["q_proj"], **options)


# Model, layers=, and what the message must name: what is wrong and what to do.
ERRORS: dict[str, tuple[Callable[[], nn.Module], Any, list[str]]] = {
    "no adapters": (lambda: make_model("llama"), None, ["LlamaForCausalLM", "no adapters", "get_peft_model"]),
    "merged": (merged, None, ["model.layers.0.self_attn.q_proj", "merged", "unmerge_adapter"]),
    "frozen": (q_lora(inference_mode=True), None, ["requires a gradient", "is_trainable=True"]),
    "prompt tuning": (prompt(PromptTuningConfig), None, ["PROMPT_TUNING", "LoRA"]),
    "prefix tuning": (prompt(PrefixTuningConfig), None, ["PREFIX_TUNING", "LoRA"]),
    "one layer": (
        lambda: wrap(make_model("llama", num_hidden_layers=1), LoraConfig(target_modules=["q_proj"])),
        None,
        ["LlamaForCausalLM", "at least 2", "target_modules"],
    ),
    "one adapted layer": (q_lora(layers_to_transform=[1]), None, ["at least 2", "layers_to_transform"]),
    "one trained layer": (one_trained_layer, None, ["Only one layer", "model.layers", "at least 2"]),
    "no stack": (
        lambda: wrap(Stack(first=ToyBlock(), second=ToyBlock()), LoraConfig(target_modules=["up"])),
        None,
        ["Stack", "at least 2"],
    ),
    "two towers": (
        two_towers,
        None,
        [f"'{BASE}.vision.layers' (3 blocks)", f"'{BASE}.text.layers' (2 blocks)", f"layers='{BASE}.vision.layers'"],
    ),
    "unknown name": (two_towers, "audio.layers", ["layers='audio.layers'", f"'{BASE}.text.layers' (2 blocks)"]),
    "part of a name": (two_towers, "ext.layers", ["layers='ext.layers'", f"'{BASE}.text.layers' (2 blocks)"]),
    "a block": (two_towers, "text.layers.0", ["layers='text.layers.0'", f"'{BASE}.text.layers' (2 blocks)"]),
    "one unknown of two": (two_towers, ["text.layers", "audio"], ["layers='audio'", "text.layers"]),
    "nested": (
        lambda: make_lora("swin"),
        ["encoder.layers", "layers.0.blocks"],
        ["swin.encoder.layers.0.blocks", "name one of the two"],
    ),
    "nested by wildcard": (lambda: make_lora("swin"), "*", ["swin.encoder.layers.0.blocks", "name one of the two"]),
}


@pytest.mark.parametrize(("build", "choice", "fragments"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_and_how(build: Callable[[], nn.Module], choice: Any, fragments: list[str]) -> None:
    with pytest.raises(ValueError, match=re.escape(fragments[0])) as caught:
        discover_layers(build(), choice)
    message = str(caught.value)
    assert [fragment for fragment in fragments if fragment not in message] == []
    assert "\n" not in message


def test_an_adapter_loaded_for_inference_is_refused_and_a_trainable_one_is_not(tmp_path: Path) -> None:
    model = wrap(ToyModel(num_blocks=3), LoraConfig(r=2, target_modules=["up"]))
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="is_trainable=True"):
        discover_layers(PeftModel.from_pretrained(ToyModel(num_blocks=3), tmp_path))  # type: ignore[arg-type]
    loaded = PeftModel.from_pretrained(ToyModel(num_blocks=3), tmp_path, is_trainable=True)  # type: ignore[arg-type]
    assert len(discover_layers(loaded)) == 3


def test_unmerging_repairs() -> None:
    model = make_lora("llama", target_modules=["q_proj"])
    model.merge_adapter()
    model.unmerge_adapter()
    assert len(discover_layers(model)) == 3


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("layers", "layers='layers' fits 2 stacks of blocks: .*in full, a list of them, or '\\*.layers' for all"),
        ([], r"layers=\[\] is not a name or a list of names of stacks"),
        (3, r"layers=3 is not a name or a list of names of stacks: .* How many layers to train is num_active_layers"),
    ],
)
def test_names_that_do_not_choose(names: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        discover_layers(two_towers(), names)
    assert "\n" not in str(caught.value)


def test_a_stack_with_one_adapted_block_is_not_passed_over() -> None:
    """Its parts (attention, feed-forward) would otherwise be taken for layers without a word."""
    with pytest.raises(ValueError, match=r"Only one layer of .*encoder\.block"):
        discover_layers(make_lora("t5", target_modules=r".*encoder\.block\.0\..*\.(q|v)"))
