"""Focused training: the layers and ranks that come out, as PEFT reads them, and a training with them."""

from __future__ import annotations

import copy
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftModel,
    PromptTuningConfig,
    ShiraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ist
import ist.focusing
from ist import BottleneckConfig, SparseTuner, discover_layers, focus, layer_scores
from ist.focusing import find_focus
from ist.method.spreading import best_of_parts
from ist.probing.gradients import FirstMatrices
from tests.helpers.models import make_batch, make_model
from tests.helpers.processes import run
from tests.helpers.tiny import layer_of, tiny_batches, tiny_llama, tiny_lora

LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]
SCORES = (1, 5, 2, 2, 3, 9)
"""Of six layers; of three parts of two, the second, third and sixth are the best (of equal ones the first)."""
KEPT = [1, 2, 5]


def adapted_layers(model: Any) -> list[int]:
    """The numbers of the blocks that have adapters."""
    return [int(layer.name.rpartition(".")[2]) for layer in discover_layers(model)]


def trained(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "LoRA": (LoraConfig(r=4, target_modules=LINEAR), {"r": 8, "lora_alpha": pytest.approx(8 * 2**0.5)}),
    "LoRA, all-linear": (LoraConfig(r=4, target_modules="all-linear"), {"r": 8, "layers_to_transform": KEPT}),
    "LoRA by expression": (
        LoraConfig(r=4, target_modules=r".*\.(q_proj|down_proj)"),
        {"r": 8, "layers_to_transform": KEPT, "target_modules": {"q_proj", "down_proj"}},
    ),
    "rsLoRA": (LoraConfig(r=4, use_rslora=True, target_modules=LINEAR), {"r": 8, "lora_alpha": 8}),
    "DoRA": (LoraConfig(r=4, use_dora=True, target_modules=LINEAR), {"r": 8}),
    "PiSSA": (
        LoraConfig(r=4, init_lora_weights="pissa", target_modules=LINEAR),
        {"r": 8, "init_lora_weights": "pissa"},
    ),
    "LoRA and head": (
        LoraConfig(r=4, target_modules=[*LINEAR, "lm_head"]),
        {"r": 8, "rank_pattern": {"lm_head": 4}, "alpha_pattern": {"lm_head": 8}},
    ),
    "LoRA with patterns": (
        LoraConfig(r=4, target_modules=LINEAR, rank_pattern={"q_proj": 2}),
        {"r": 8, "rank_pattern": {"q_proj": 4}},
    ),
    "LoHa": (LoHaConfig(r=2, target_modules=LINEAR), {"r": 4, "alpha": pytest.approx(8 * 2**0.5)}),
    "LoKr": (LoKrConfig(r=1, target_modules=LINEAR), {"r": 3}),
    "AdaLoRA": (
        AdaLoraConfig(init_r=4, target_r=2, total_step=100, target_modules=LINEAR),
        {"init_r": 8, "target_r": 4},
    ),
    "series": (BottleneckConfig(bottleneck_size=8), {"bottleneck_size": 16, "scaling": pytest.approx(0.5**0.5)}),
    "parallel": (BottleneckConfig(mode="parallel", bottleneck_size=8), {"bottleneck_size": 16}),
    "IA3": (IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), {}),
    "VeRA": (VeraConfig(r=8, target_modules=["q_proj"]), {"r": 8}),
    "HRA": (HRAConfig(r=4, target_modules=LINEAR), {"r": 4}),
}
KEEP_THEIR_SIZE = ("IA3", "VeRA", "HRA")


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_out_adapts_these_layers_with_as_many_parameters(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given, expected = copy.deepcopy(KINDS[kind])
    before = given.to_dict()
    base = tiny_llama(6)
    found = find_focus(base, given, num_layers=3, scores=SCORES)
    assert given.to_dict() == before, "the configuration that was given has changed"
    assert type(found.config) is type(given)
    assert list(found.layers) == KEPT
    for field, value in expected.items():
        have = getattr(found.config, field)
        assert (set(have) if isinstance(value, set) else have) == value, field

    full = trained(get_peft_model(tiny_llama(6), copy.deepcopy(given)))
    model = get_peft_model(base, found.config)
    assert adapted_layers(model) == KEPT
    outside = trained(model) - sum(p.numel() for layer in discover_layers(model) for p in layer.parameters)
    assert found.num_parameters == trained(model) - outside
    assert found.num_parameters_before == full - outside
    kept = [record for record in caplog.records if "keep their size" in record.message]
    assert bool(kept) == (kind in KEEP_THEIR_SIZE)
    if kind not in KEEP_THEIR_SIZE:
        assert 0.92 * full < trained(model) <= full

    # Plain PEFT: saved, loaded and answering the same.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_E" not in name:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    if kind != "PiSSA":  # whose base weights change with it
        model.save_pretrained(tmp_path, save_embedding_layers=False)
        loaded = PeftModel.from_pretrained(tiny_llama(6), tmp_path).eval()
        (batch,) = tiny_batches(1)
        torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits)


def test_a_saved_adapter_answers_without_this_library(tmp_path: Path) -> None:
    base = tiny_llama(6)
    base.save_pretrained(tmp_path / "base")
    config = focus(base, LoraConfig(r=4, target_modules="all-linear"), tiny_batches(2), num_layers=2)
    model: Any = get_peft_model(base, config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    model.save_pretrained(tmp_path / "adapter")
    (batch,) = tiny_batches(1)
    torch.save((batch["input_ids"], model.eval()(**batch).logits), tmp_path / "expected.pt")
    code = (
        "import sys, torch, transformers, peft\n"
        "folder = sys.argv[1]\n"
        "base = transformers.AutoModelForCausalLM.from_pretrained(folder + '/base')\n"
        "model = peft.PeftModel.from_pretrained(base, folder + '/adapter')\n"
        "ids, logits = torch.load(folder + '/expected.pt')\n"
        "torch.testing.assert_close(model.eval()(input_ids=ids).logits, logits)\n"
        "merged = model.merge_and_unload()\n"
        "torch.testing.assert_close(merged(input_ids=ids).logits, logits, atol=1e-4, rtol=1e-4)\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'ist'])\n"
    )
    done = run(code, tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_ranks_stop_at_the_smaller_side_and_the_rest_goes_to_the_others() -> None:
    """Keys of 16 outputs cannot use rank 24, as 128 cannot use 256."""
    base = tiny_llama(6)
    found = find_focus(base, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]), num_layers=2, scores=SCORES)
    ranks = {name.rpartition(".")[2]: rank for name, rank in found.ranks.items()}
    # 6 layers of 8·(32 + 32) and 8·(32 + 16) are 5376 parameters; two layers of 16·48 leave 1920 for each query.
    assert ranks == {"q_proj": 30, "v_proj": 16}
    assert found.num_parameters == 2 * (30 * 64 + 16 * 48) == found.num_parameters_before
    assert found.config.rank_pattern == {"v_proj": 16}


@pytest.mark.parametrize(
    ("rank", "scaling", "expected"),
    [
        ("moved", "sqrt", (8, 8 * 2**0.5)),
        ("moved", "same", (8, 16)),
        ("moved", "inverse", (8, 8)),
        ("kept", "sqrt", (4, 8)),
        (16, "sqrt", (16, 16)),
        (4, "same", (4, 8)),
    ],
)
def test_rank_and_alpha_are_as_asked(rank: Any, scaling: str, expected: tuple[int, float]) -> None:
    given = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    config = focus(tiny_llama(6), given, num_layers=3, scores=SCORES, rank=rank, scaling=scaling)
    assert (config.r, config.lora_alpha) == pytest.approx(expected)


def test_uneven_ranks_follow_the_scores_and_reach_the_modules() -> None:
    base = tiny_llama(6)
    given = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    found = find_focus(base, given, num_layers=3, scores=[1, 4, 1, 1, 1, 16], rank="uneven")
    model: Any = get_peft_model(base, found.config)
    ranks = [model.base_model.model.model.layers[layer].self_attn.q_proj.r["default"] for layer in (1, 2, 5)]
    assert ranks == [6, 3, 13]  # In proportion to 2, 1 and 4, the roots of the scores, rounded down.
    assert 0.9 * found.num_parameters_before < found.num_parameters <= found.num_parameters_before


def test_the_best_of_each_part_by_the_gradients_of_lora() -> None:
    base, batches = tiny_llama(6), tiny_batches(4)
    given = LoraConfig(r=4, target_modules=LINEAR)
    scores = layer_scores(base, given, batches)
    assert len(scores) == 6
    config = focus(base, given, batches, num_layers=3)
    assert config.layers_to_transform == list(best_of_parts(scores, 3))
    assert focus(base, given, iter(batches), num_layers=3).layers_to_transform == config.layers_to_transform
    assert layer_scores(base, given, batches[:1], num_batches=4) == layer_scores(base, given, batches, num_batches=1)


@pytest.mark.parametrize("criterion", ["relative_gradient", "first_step", "activation"])
def test_other_criteria_have_the_same_interface(criterion: Any) -> None:
    base, batches = tiny_llama(6), tiny_batches(2)
    given = LoraConfig(r=4, target_modules=LINEAR)
    scores = layer_scores(base, given, batches, criterion=criterion)
    config = focus(base, given, batches, num_layers=2, criterion=criterion)
    assert config.layers_to_transform == list(best_of_parts(scores, 2))


def test_scores_of_trained_adapters_choose_layers() -> None:
    model = tiny_lora(6)
    for criterion in ("gate", "removal"):
        scores = layer_scores(model, None, tiny_batches(2), criterion=criterion)  # type: ignore[arg-type]
        config = focus(tiny_llama(6), LoraConfig(r=4, target_modules=LINEAR), num_layers=2, scores=scores)
        assert config.layers_to_transform == list(best_of_parts(scores, 2))


def test_half_of_the_layers_are_the_default_and_even_needs_no_data() -> None:
    base, given = tiny_llama(6), LoraConfig(r=4, target_modules=LINEAR)
    assert len(focus(base, given, tiny_batches(1)).layers_to_transform) == 3
    assert focus(base, given, spread="even").layers_to_transform == [1, 3, 5]
    assert focus(base, given, spread="even", num_layers=1 / 3).layers_to_transform == [1, 4]
    assert focus(base, given, scores=SCORES, num_layers=1).layers_to_transform == [5]


def test_layers_that_the_configuration_names_already_are_chosen_among() -> None:
    given = LoraConfig(r=4, target_modules=LINEAR, layers_to_transform=[0, 2, 3, 5])
    found = find_focus(tiny_llama(6), given, scores=[1, 2, 4, 3])
    assert found.names == ("model.layers.0", "model.layers.2", "model.layers.3", "model.layers.5")
    assert found.config.layers_to_transform == [2, 3]
    assert found.config.r == 8


def test_a_wrong_spread_is_refused_before_anything_is_measured() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise AssertionError("measured")

    with pytest.raises(ValueError, match="spread='wide' is unknown"):
        focus(tiny_llama(6), LoraConfig(target_modules=LINEAR), tiny_batches(1), spread="wide", loss_function=loss)


ARCHITECTURES = {
    "gpt2": (["c_attn"], None, "h."),
    "t5": (["q", "v"], None, "encoder.block."),
    "bert": (["query", "value"], None, "encoder.layer."),
    "vit": (["q_proj", "v_proj"], None, "layers."),
    "mixtral": (["q_proj", "v_proj"], None, "model.layers."),
    "whisper": (["q_proj", "v_proj"], None, "encoder.layers."),
    "llava": ("all-linear", "language_model.layers", "language_model.layers."),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture(name: str) -> None:
    """A layer in each part of each model, two stacks and two towers included, and a step of training."""
    targets, layers, place = ARCHITECTURES[name]
    base = make_model(name)
    found = find_focus(base, LoraConfig(r=2, target_modules=targets), [make_batch(name)], layers=layers)
    assert any(place in name for name in found.names)
    assert len(found.layers) == -(-len(found.names) // 2)
    found.config.fan_in_fan_out = name == "gpt2"
    model = get_peft_model(base, found.config)
    adapted = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_A" in name}
    blocks = {found.names[layer] for layer in found.layers}
    for module in adapted:
        inside = [block for block in found.names if f"{block}." in module]
        assert not inside or inside[0] in blocks, module
    assert all(any(f"{block}." in module for module in adapted) for block in blocks)
    model(**make_batch(name)).loss.backward()


BAD = [
    ({"num_layers": 0}, "num_layers=0"),
    ({"num_layers": 7}, "num_layers=7 is more than the 6 layers"),
    ({"num_layers": 1.5}, "num_layers=1.5"),
    ({"num_layers": "half"}, "num_layers='half'"),
    ({"num_layers": True}, "num_layers=True"),
    ({"rank": 0}, "rank=0"),
    ({"rank": "bigger"}, "rank='bigger' is unknown: choose one of 'moved', 'kept', 'uneven'"),
    ({"scaling": "log"}, "scaling='log' is unknown"),
    ({"spread": "wide"}, "spread='wide' is unknown"),
    ({"criterion": "loss"}, "criterion='loss' is unknown"),
    ({"criterion": "gate"}, "needs adapters that were trained a little"),
    ({"num_batches": 0}, "num_batches=0"),
    ({"scores": [1, 2]}, "scores has 2 numbers, and 6 layers"),
    ({"scores": [1, 2, 3, 4, 5, float("nan")]}, "score of layer 5 is nan"),
    ({"scores": {1: 2.0, 2: 1.0}}, "scores is a dict and no list of numbers: give one for each of the 6 layers"),
    ({"scores": {1, 2, 3, 4, 5, 6}}, "scores is a set"),
    ({"scores": "123456"}, "scores is a str"),
    ({"scores": 5}, "scores is a int"),
    ({"scores": [None] * 6}, "scores is a list and no list of numbers"),
    ({"scores": torch.ones(6, 2)}, "scores is a Tensor and no list of numbers"),
    ({"scores": SCORES, "criterion": "loss"}, "criterion='loss' is unknown"),
    ({"loss_function": 3}, "loss_function=3 is no function"),
    ({"seed": 1.5}, "seed=1.5 is not a whole number"),
    ({"seed": None}, "seed=None is not a whole number"),
    ({"batches": None}, "batches are needed to measure importance"),
    ({"batches": []}, "batches gave no batch"),
    ({"batches": ["a text"]}, "gave a row and not a batch"),
    ({"batches": [{"input_ids": [1, 2], "labels": [1, 2]}]}, "gave a row and not a batch"),
    ({"batches": [{"input_ids": torch.tensor([1, 2])}]}, "DataLoader"),
    ({"batches": [{"ids": torch.ones(1)}]}, "ids"),
    ({"peft_config": {"r": 4}}, "peft_config is a dict"),
    ({"peft_config": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)}, "prompt-learning"),
    ({"peft_config": LoraConfig(target_modules=["query"])}, "query"),
    ({"layers": "decoder"}, "layers='decoder' names no stack"),
    ({"peft_config": LoraConfig(target_modules=LINEAR, layer_replication=[(0, 4), (2, 6)])}, "layer_replication="),
    ({"peft_config": ShiraConfig(r=2, target_modules=LINEAR)}, "ShiraConfig makes its adapters from the values"),
    ({"rank": "uneven", "peft_config": LoKrConfig(r=2, target_modules=LINEAR)}, "LOKR lacks"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_input_is_one_line_and_changes_nothing(options: dict[str, Any], message: str) -> None:
    base = tiny_llama(6)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    arguments: dict[str, Any] = {
        "peft_config": LoraConfig(r=4, target_modules=LINEAR),
        "batches": tiny_batches(1),
        **options,
    }
    with pytest.raises((ValueError, TypeError), match=message) as error:
        focus(base, arguments.pop("peft_config"), arguments.pop("batches"), **arguments)
    assert "\n" not in str(error.value)
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in before.items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in base.parameters())
    assert not any(module._forward_hooks for module in base.modules())
    assert not hasattr(base, "peft_config")


@pytest.mark.parametrize("options", [{}, {"spread": "even"}, {"criterion": "activation"}, {"rank": "kept"}])
def test_adapters_on_parameters_of_experts_are_refused(options: dict[str, Any]) -> None:
    """Their gradient is not that of their module, and PEFT numbers no parameters."""
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(ValueError, match=r"adapter on a parameter of model.layers.0.mlp.experts \(target_parameters\)"):
        find_focus(make_model("mixtral"), config, [make_batch("mixtral")], **options)
    with pytest.raises(ValueError, match="target_parameters"):
        layer_scores(make_model("mixtral"), config, [make_batch("mixtral")])


def test_trainable_tokens_are_given_no_rank() -> None:
    config = LoraConfig(r=4, target_modules=LINEAR, trainable_token_indices=[1])
    found = find_focus(tiny_llama(6), config, scores=SCORES)
    assert found.config.rank_pattern == found.config.alpha_pattern == {}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The following (rank|alpha)_pattern keys")
        model = get_peft_model(tiny_llama(6), found.config)
    assert adapted_layers(model) == KEPT


def test_what_all_layers_share_is_counted_in_none() -> None:
    """VB-LoRA's bank of vectors trains whichever layers are kept."""
    config = VBLoRAConfig(r=2, num_vectors=8, vector_length=8, target_modules=["q_proj", "o_proj"])
    found = find_focus(tiny_llama(6), config, scores=SCORES)
    for given, count in ((config, found.num_parameters_before), (found.config, found.num_parameters)):
        layers = discover_layers(get_peft_model(tiny_llama(6), copy.deepcopy(given)))
        assert count == sum(parameter.numel() for layer in layers for parameter in layer.parameters)


@pytest.mark.parametrize("criterion", ["gradient", "activation"])
def test_a_loader_that_shuffles_gives_the_same_scores_and_draws_from_no_global_generator(criterion: Any) -> None:
    rows = [{name: value[0] for name, value in batch.items()} for batch in tiny_batches(12, size=1)]
    loader = DataLoader(rows, batch_size=2, shuffle=True)  # type: ignore[arg-type]

    def noisy(model: nn.Module, batch: Any) -> Tensor:
        return model(**batch).loss * torch.rand(())

    def measure(global_seed: int, **options: Any) -> tuple[float, ...]:
        model = tiny_llama()
        torch.manual_seed(global_seed)
        state = torch.get_rng_state()
        config = LoraConfig(r=2, target_modules=LINEAR)
        scores = layer_scores(model, config, loader, criterion=criterion, loss_function=noisy, num_batches=2, **options)
        assert torch.equal(torch.get_rng_state(), state)
        return scores

    assert measure(1) == measure(2)
    assert measure(1, seed=1) != measure(1)


def test_a_model_with_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="has adapters already"):
        focus(tiny_lora(), LoraConfig(r=4, target_modules=LINEAR), tiny_batches(1))


def test_what_was_chosen_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ist"):
        focus(tiny_llama(6), LoraConfig(r=4, target_modules=LINEAR), num_layers=3, scores=SCORES)
    assert [record.message for record in caplog.records] == [
        "Focused on 3 of 6 layers (1, 2, 5), rank 8: 6,528 trainable parameters in their adapters, where all layers "
        "had 6,528."
    ]


def test_a_focused_model_learns_in_the_cheap_step() -> None:
    base, batches = tiny_llama(6), tiny_batches(40)
    model: Any = get_peft_model(base, focus(base, LoraConfig(r=4, target_modules=LINEAR), batches))
    tuner = SparseTuner(model, selector="all")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses: list[Tensor] = []
    for batch in batches:
        with tuner.step(optimizer):
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
    tuner.close()
    assert torch.stack(losses[-5:]).mean() < torch.stack(losses[:5]).mean() - 0.2


@pytest.mark.parametrize("own_step", [False, True], ids=["PEFT's step", "own step"])
def test_nothing_is_computed_backwards_below_the_lowest_part(own_step: bool) -> None:
    (batch,) = tiny_batches(1)
    base = tiny_llama(8)
    scores = [9.0] * 4 + [1.0] * 4
    found = find_focus(base, LoraConfig(r=4, target_modules=LINEAR), scores=scores, num_layers=2, min_depth=0.5)
    assert found.layers == (4, 6), "spread over the upper half, whatever the lower half scores"
    model: Any = get_peft_model(base, found.config)
    tuner = SparseTuner(model, selector="all") if own_step else None
    if tuner:
        tuner.begin_step()
    back: list[int] = []
    for number, block in enumerate(model.base_model.model.model.layers):

        def watch(module: nn.Module, args: Any, output: Any, number: int = number) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: back.append(number))

        block.register_forward_hook(watch)
    model(**batch).loss.backward()
    assert sorted(back) == [4, 5, 6, 7]
    if tuner:
        tuner.close()


def test_the_lowest_part_holds_for_every_spread_and_leaves_enough() -> None:
    options: dict[str, Any] = {"num_layers": 2, "min_depth": 0.5, "scores": (9, 9, 9, 1, 2, 3)}
    for spread in ("parts", "distance", "even", "anywhere"):
        kept = find_focus(tiny_llama(6), LoraConfig(target_modules=LINEAR), spread=spread, **options).layers
        assert len(kept) == 2
        assert min(kept) >= 3
    with pytest.raises(ValueError, match=r"min_depth=0\.75 leaves 1 of 6 layers, and 3 are to be kept"):
        find_focus(tiny_llama(6), LoraConfig(target_modules=LINEAR), tiny_batches(1), min_depth=0.75)


def test_the_module_does_not_hide_the_function() -> None:
    from ist import focus as again

    assert callable(ist.focus)
    assert again is ist.focusing.focus
    assert isinstance(ist.focusing, type(sys))
    assert not isinstance(ist.focus, nn.Module)


SCORED: dict[str, dict[str, Any]] = {
    "expression": {"target_modules": r".*layers\.[0-2]\..*(q_proj|down_proj)"},
    "without some": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "o_proj"]},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.2.mlp.up_proj": 7}, "alpha_pattern": {"v_proj": 3}},
    "a head": {"modules_to_save": ["lm_head"]},
    "DoRA": {"use_dora": True},
    "rsLoRA": {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
}
SHAPES = ((4, 12), (1, 5), (3, 9))
"""Rows and tokens of three batches."""


@pytest.mark.parametrize("kind", SCORED)
def test_scores_are_sums_over_pefts_own_gradients(kind: str) -> None:
    """Of batches of different sizes and numbers of labels, each of which counts the same."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": LINEAR, **SCORED[kind]})
    batches = [{name: value[:rows, :length] for name, value in tiny_batches(1)[0].items()} for rows, length in SHAPES]
    batches[0]["labels"] = batches[0]["labels"].clone().index_fill_(1, torch.tensor([1, 2]), -100)
    found = {name: layer_scores(tiny_llama(4), config, batches, criterion=name) for name in ("gradient", "first_step")}
    model: Any = get_peft_model(tiny_llama(4), copy.deepcopy(config)).eval()
    matrices = FirstMatrices(0)
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    for module in adapted:
        weight = module.lora_A["default"].weight
        weight.data.copy_(matrices.like(torch.empty(1, weight.shape[1]), len(weight)))
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    gradients: dict[Any, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if "lora_B" in name and parameter.grad is not None:
            gradients.setdefault(layer_of(name), []).append(parameter.grad)
    assert len(gradients) == (3 if kind == "expression" else 4)
    squares = [sum(float(one.square().sum()) for one in gradients[layer]) for layer in sorted(gradients)]
    sums = [sum(float(one.abs().sum()) for one in gradients[layer]) for layer in sorted(gradients)]
    assert found["gradient"] == pytest.approx(squares, rel=1e-4)
    assert found["first_step"] == pytest.approx(sums, rel=1e-4)
