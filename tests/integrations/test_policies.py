"""Several adapters, mixtures and shared weights: what trains when, what is suppressed; the rows of docs/policies.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from ist import SparseTuner
from ist.adapters.layers import discover_layers, parameters_outside
from ist.probing.suppression import suppress
from tests.helpers.models import Stack, ToyBlock, randomise, wrap
from tests.helpers.moves import Step, in_blocks, train_sparsely
from tests.helpers.tiny import layer_of, snapshot, tiny_batches, tiny_llama, tiny_lora

TARGETS = ["q_proj", "down_proj"]
ALL = {0, 1, 2, 3}

# peft warns of second adapters, of tied weights, and of biases that disabling an adapter does not undo.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "target_modules": TARGETS, "init_lora_weights": False, **options})


def two_loras() -> Any:
    model = wrap(tiny_llama(), lora())
    model.add_adapter("second", lora())
    return model


def names_with(model: nn.Module, *parts: str) -> set[str]:
    return {name for name, _ in model.named_parameters() if any(part in name for part in parts)}


def check(steps: list[Step], own: set[str], always: set[str] | frozenset[str] = frozenset()) -> None:
    """Each step moves the active layers' part of `own`, and all of `always`; several layers had their turn."""
    assert own
    for step in steps:
        assert step.moved == in_blocks(own, step.blocks) | always
    assert len(set().union(*(step.blocks for step in steps))) > 1


def suppressed_equals(model: Any, names: tuple[str, ...], beta: float = 0.0) -> bool:
    """Whether suppressing all layers by 0 gives the outputs of the model without the adapters `names`."""
    batch = {"input_ids": tiny_batches(1)[0]["input_ids"]}
    layers = discover_layers(model)
    with torch.no_grad():
        full = model(**batch).logits
        with suppress(layers, [], beta):
            suppressed = model(**batch).logits
        for module in model.modules():
            if hasattr(module, "_disable_adapters") and set(module.active_adapters) & set(names):
                module._disable_adapters = True
        without = model(**batch).logits
    assert not torch.allclose(full, without)
    return torch.allclose(suppressed, without, atol=1e-5)


# ---- Several adapters


def test_an_adapter_that_is_not_active_never_moves_and_is_not_damped() -> None:
    model = two_loras()
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".second." in name)
    check(train_sparsely(model, tiny_batches(2)), names_with(model, ".default."))
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".second." in name)
    assert suppressed_equals(model, ("default",))


def test_two_active_adapters_train_and_are_damped_together() -> None:
    model = two_loras()
    model.base_model.set_adapter(["default", "second"])
    check(train_sparsely(model, tiny_batches(2)), names_with(model, ".default.", ".second."))
    assert suppressed_equals(model, ("default", "second"))


def test_an_active_adapter_that_does_not_train_is_damped_and_stays() -> None:
    """Eq. 8 suppresses what a layer's adapters add together; which of them train is the user's to say."""
    model = two_loras()
    model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if ".second." in name:
            parameter.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    before = snapshot(model)
    with SparseTuner(model, num_active_layers=2, probe_batches=tiny_batches(1)) as tuner:
        for batch in tiny_batches(4):
            tuner.begin_step()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tuner.end_step()
    moved = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    assert moved
    assert moved <= names_with(model, ".default.")
    assert suppressed_equals(model, ("default", "second"))


def test_another_adapter_is_trained_after_the_first() -> None:
    model = two_loras()
    check(train_sparsely(model, tiny_batches(2)), names_with(model, ".default."))
    model.set_adapter("second")
    check(train_sparsely(model, tiny_batches(2)), names_with(model, ".second."))


def test_adapters_on_other_layers_each() -> None:
    """Only the layers of the active adapter are chosen from."""
    model = wrap(tiny_llama(), lora(layers_to_transform=[0, 1]))
    model.add_adapter("second", lora(layers_to_transform=[2, 3]))
    assert [layer.name.rsplit(".", 1)[1] for layer in discover_layers(model)] == ["0", "1"]
    model.set_adapter("second")
    assert [layer.name.rsplit(".", 1)[1] for layer in discover_layers(model)] == ["2", "3"]
    check(train_sparsely(model, tiny_batches(2)), names_with(model, ".second."))


@pytest.mark.parametrize("targets", [TARGETS, ["k_proj"]])
def test_mixed_tuner_types(targets: list[str]) -> None:
    """`PeftMixedModel`: adapters of two types, in one module or in different ones, are one layer's adapters."""
    model: Any = get_peft_model(tiny_llama(), lora(), mixed=True)  # type: ignore[arg-type]
    model.add_adapter("second", LoHaConfig(r=2, target_modules=targets))
    model.set_adapter(["default", "second"])
    randomise(model)
    check(train_sparsely(model, tiny_batches(2)), names_with(model, ".default", ".second"))
    assert suppressed_equals(model, ("default", "second"))


def test_what_is_refused_by_peft_is_not_ours_to_mix() -> None:
    model: Any = get_peft_model(tiny_llama(), lora(), mixed=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not compatible"):
        model.add_adapter("second", IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]))


# ---- Patterns


def test_ranks_and_factors_of_each_layer_its_own() -> None:
    model = wrap(
        tiny_llama(), lora(rank_pattern={r"layers\.0\..*": 6}, alpha_pattern={r"layers\.1\..*": 32, "down_proj": 4})
    )
    layers = discover_layers(model)
    assert layers[0].parameters[0].shape[0] == 6
    assert layers[1].parameters[0].shape[0] == 2
    before = [dict(adapter.scaling) for layer in layers for adapter in layer.adapters.values()]  # type: ignore[call-overload]
    assert len({value for scaling in before for value in scaling.values()}) > 1
    check(train_sparsely(model, tiny_batches(2)), names_with(model, "lora_"))
    assert suppressed_equals(model, ("default",))


def test_layers_without_adapters_are_not_chosen_from() -> None:
    model = wrap(tiny_llama(), lora(layers_to_transform=[1, 3]))
    steps = train_sparsely(model, tiny_batches(2))
    check(steps, names_with(model, "lora_"))
    assert set().union(*(step.blocks for step in steps)) == {1, 3}


# ---- What belongs to no layer, and trains at every step


@pytest.mark.parametrize(
    ("options", "always"),
    [
        ({"modules_to_save": ["lm_head"]}, ("modules_to_save",)),
        ({"modules_to_save": ["input_layernorm"]}, ("modules_to_save",)),
        ({"trainable_token_indices": [1, 2, 3]}, ("trainable_tokens_delta",)),
        ({"target_modules": [*TARGETS, "embed_tokens"]}, ("lora_embedding",)),
        ({"target_modules": [*TARGETS, "lm_head"]}, ("lm_head.lora_",)),
    ],
    ids=["a head", "a norm in each layer", "rows of the embedding", "an adapted embedding", "an adapted head"],
)
def test_outside_of_the_layers(options: dict[str, Any], always: tuple[str, ...]) -> None:
    """A module that is trained whole adds no response, within a block too."""
    model = wrap(tiny_llama(), lora(**options))
    outside = names_with(model, *always)
    assert set(parameters_outside(model, discover_layers(model))) == outside
    own = names_with(model, "lora_") - outside
    assert {layer_of(name) for name in own} == ALL
    steps = train_sparsely(model, tiny_batches(4))
    if "trainable_token_indices" in options:  # A row moves when its token occurs, or by weight decay once it is not 0.
        steps = [Step(step.blocks, step.moved | outside) for step in steps]
    check(steps, own, outside)


def test_biases() -> None:
    """`bias="lora_only"` trains the biases of the adapted modules: within an adapter, so they belong to its layer."""
    model = wrap(
        Stack(blocks=nn.ModuleList(ToyBlock() for _ in range(4))), LoraConfig(target_modules=["up"], bias="lora_only")
    )
    layers = discover_layers(model)
    assert all(any(p.ndim == 1 for p in layer.parameters) for layer in layers)
    assert parameters_outside(model, layers) == {}


# ---- Shared weights


def tied_loras() -> PeftModel:
    """Layers 0 and 1 hold the same LoRA matrices in their query projections."""
    model = wrap(tiny_llama(), lora())
    first, second = (model.get_submodule(f"base_model.model.model.layers.{i}.self_attn.q_proj") for i in (0, 1))
    for part in ("lora_A", "lora_B"):
        getattr(second, part)["default"].weight = getattr(first, part)["default"].weight
    return model


def test_parameters_that_two_layers_share_train_at_every_step() -> None:
    """Freezing one of the owners must not freeze the other."""
    model = tied_loras()
    shared = {name for name in names_with(model, "lora_") if "layers.0.self_attn.q_proj" in name}
    assert len(shared) == 2
    check(train_sparsely(model, tiny_batches(2)), names_with(model, "lora_") - shared, shared)


def test_a_module_that_two_blocks_call_trains_at_every_step_and_is_not_damped() -> None:
    """Suppressing it in one block would suppress it in the other too."""
    stack = Stack(blocks=nn.ModuleList(ToyBlock() for _ in range(3)))
    model = wrap(stack, LoraConfig(r=2, target_modules=["up", "down"]))
    blocks: Any = model.get_submodule("base_model.model.blocks")
    blocks[2].up = blocks[0].up
    layers = discover_layers(model)
    assert [sorted(name.rsplit(".", 1)[1] for name in layer.adapters) for layer in layers] == [
        ["down"],
        ["down", "up"],
        ["down"],
    ]
    assert len(parameters_outside(model, layers)) == 2


def test_a_block_that_is_used_for_all_layers_is_no_choice() -> None:
    """As ALBERT does: one block, many times."""
    block = ToyBlock()
    model = wrap(Stack(blocks=nn.ModuleList([block] * 4)), LoraConfig(target_modules=["up", "down"]))
    with pytest.raises(ValueError, match="at least 2"):
        discover_layers(model)


@pytest.mark.parametrize("tie", [False, True])
def test_tied_embeddings_with_an_adapter_on_the_head(tie: bool) -> None:
    """The adapter on the head belongs to no layer, whether its weight is the embedding's or not."""
    base = tiny_llama()
    if tie:
        base.lm_head.weight = base.model.embed_tokens.weight
    model = wrap(base, lora(target_modules=[*TARGETS, "lm_head"]))
    outside = names_with(model, "lm_head.lora_")
    check(train_sparsely(model, tiny_batches(2)), names_with(model, "lora_") - outside, outside)


def test_two_models_do_not_disturb_each_other() -> None:
    """A teacher and a student, say: hooks stay on their model."""
    first, second = tiny_lora(), tiny_lora(seed=1)
    with SparseTuner(first, num_active_layers=1, probe_batches=tiny_batches(1)) as tuner:
        tuner.begin_step()
        second(**tiny_batches(1)[0]).loss.backward()
    trained = [p for p in second.parameters() if p.requires_grad]
    assert all(isinstance(p.grad, Tensor) for p in trained)


def test_every_row_of_the_page_is_a_test_of_this_file() -> None:
    page = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")
    named = {part.split("`")[0] for part in page.split("`test_")[1:]}
    assert named
    assert {f"test_{name}" for name in named} <= set(globals())
