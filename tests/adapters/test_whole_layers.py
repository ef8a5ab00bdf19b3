"""Layers that train whole: where they are found, that frozen ones hold still, and that nothing is computed for them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from ist import IST, SparseTuner
from ist.adapters import view
from ist.adapters.view import view_model
from ist.adapters.whole_layers import discover_whole_layers
from ist.step.activation import LayerActivation
from tests.helpers.models import Stack
from tests.helpers.moves import Moves, Step, in_blocks, train_sparsely
from tests.helpers.tiny import (
    checkpoint_activations,
    moved_layers,
    snapshot,
    tiny_batches,
    tiny_llama,
    tiny_lora,
    tiny_rows,
    traces,
)

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def gpt2() -> GPT2LMHeadModel:
    """Its head is tied to its embeddings."""
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=3, n_head=2, n_positions=32))


def t5() -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))


class HeldWeights(nn.Module):
    """A block with a weight of its own and a child that is computed with past its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))
        self.inner = nn.Linear(8, 8)
        self.past = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * nn.functional.linear(self.inner(x).tanh(), self.past.weight)


def tied_blocks() -> Stack:
    model = Stack(blocks=nn.ModuleList(HeldWeights() for _ in range(3)))
    blocks: Any = model.blocks
    blocks[2].inner.weight = blocks[0].inner.weight
    return model


def two_stacks() -> Stack:
    return Stack(a=nn.ModuleList(HeldWeights() for _ in range(2)), b=nn.ModuleList(HeldWeights() for _ in range(2)))


HELD = ("scale", "inner.weight", "inner.bias", "past.weight", "past.bias")
# fmt: off
FOUND: dict[str, tuple[Callable[[], nn.Module], str | None, list[str], set[str]]] = {
    "Llama": (tiny_llama, None, [f"model.layers.{i}" for i in range(4)],
              {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}),
    "GPT-2, tied head": (gpt2, None, [f"transformer.h.{i}" for i in range(3)],
                         {f"transformer.{n}" for n in ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")}),
    "T5": (t5, None, [f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)],
           {"shared.weight", "encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"}),
    "weights of a block's own": (lambda: Stack(blocks=nn.ModuleList(HeldWeights() for _ in range(2))), None,
                                 ["blocks.0", "blocks.1"], set()),
    "weights that two blocks share": (tied_blocks, None, [f"blocks.{i}" for i in range(3)], {"blocks.0.inner.weight"}),
    "one of two stacks": (two_stacks, "b", ["b.0", "b.1"], {f"a.{i}.{name}" for i in range(2) for name in HELD}),
}
# fmt: on


@pytest.mark.parametrize("name", FOUND)
def test_where_layers_are_found_and_what_trains_besides(name: str) -> None:
    make, stacks, blocks, outside = FOUND[name]
    model = make()
    layers = discover_whole_layers(model, stacks)
    assert [layer.name for layer in layers] == blocks
    assert [layer.index for layer in layers] == list(range(len(layers)))
    assert all(layer.module is model.get_submodule(layer.name) and not layer.adapters for layer in layers)
    owned = {id(p) for layer in layers for p in layer.parameters}
    assert {n for n, p in model.named_parameters() if id(p) not in owned} == outside


def test_a_head_of_linear_modules_is_no_stack() -> None:
    model: Any = BertForSequenceClassification(BertConfig(vocab_size=64, **SMALL))
    model.classifier = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 2))
    assert [layer.name for layer in discover_whole_layers(model)] == [f"bert.encoder.layer.{i}" for i in range(3)]


def frozen_llama() -> LlamaForCausalLM:
    return tiny_llama().requires_grad_(False)


REFUSED: list[tuple[Callable[[], nn.Module], dict[str, Any], str]] = [
    (tiny_lora, {"selector": "lisa"}, "this model has adapters: give the model without them"),
    (tiny_lora, {"selector": "full"}, "this model has adapters: give the model without them"),
    (tiny_llama, {"selector": "ist"}, "LlamaForCausalLM has no adapters: wrap it first"),
    (tiny_llama, {"selector": "random"}, "LlamaForCausalLM has no adapters: wrap it first"),
    (frozen_llama, {"selector": "lisa"}, "No weight of the model requires a gradient"),
    (lambda: nn.Linear(2, 2), {"selector": "full"}, "Found no stack of at least 2 blocks with trainable weights in "),
    (
        lambda: AlbertForMaskedLM(AlbertConfig(vocab_size=64, embedding_size=8, **SMALL)),
        {"selector": "lisa"},
        "Found no stack of at least 2 blocks with trainable weights in AlbertForMaskedLM",
    ),
    (two_stacks, {"selector": "lisa"}, "Trainable weights were found in 2 stacks of blocks: 'a' (2"),
    (tiny_llama, {"selector": "lisa", "layers": "h"}, "layers='h' names no stack of at least 2 blocks with trainable"),
    (tiny_llama, {"selector": "lisa", "num_active_layers": 5}, "num_active_layers=5 is more than the 4 layers"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "options", "message"), REFUSED, ids=[m for _, _, m in REFUSED])
def test_what_does_not_fit_is_refused_and_left_as_it_was(
    make: Callable[[], nn.Module], options: dict[str, Any], message: str
) -> None:
    model = make()
    before = traces(model)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        SparseTuner(model, **options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert traces(model) == before


def test_sharded_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "is_sharded", lambda model: True)
    with pytest.raises(ValueError, match="the model's weights are sharded by FSDP, which was not tried"):
        SparseTuner(tiny_llama(), selector="lisa")


# ---- What moves


def check_moves(steps: list[Step], model: nn.Module) -> None:
    """Every weight of the active layers moves and all that is outside, and nothing else."""
    names = {name for name, _ in model.named_parameters()}
    for step in steps:
        assert step.moved == in_blocks(names, step.blocks) | in_blocks(names, {None})  # type: ignore[arg-type]


def test_lisa_trains_a_set_of_whole_layers_for_a_period() -> None:
    model = tiny_llama()
    batches = tiny_batches(4)
    steps = train_sparsely(model, batches, 12, selector="lisa", num_active_layers=2, update_interval=3, seed=3)
    check_moves(steps, model)
    sets = [tuple(sorted(step.blocks)) for step in steps]
    assert all(len(chosen) == 2 for chosen in sets)
    assert all(len(set(sets[start : start + 3])) == 1 for start in range(0, 12, 3))
    assert len(set(sets)) >= 3


def test_full_fine_tuning_is_that_of_the_model_alone() -> None:
    batches = tiny_batches(4)
    model, alone = tiny_llama(), tiny_llama()
    check_moves(train_sparsely(model, batches, 5, selector="full"), model)
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.01, weight_decay=0.5)
    stream = iter(batches * 3)
    for _ in range(5):
        for _ in range(2):
            alone(**next(stream)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(snapshot(model).values(), snapshot(alone).values(), strict=True))


def test_a_tied_head_trains_at_every_step() -> None:
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    check_moves(train_sparsely(model, tiny_batches(4), 6, selector="lisa", num_active_layers=1), model)


@pytest.mark.parametrize(
    ("checkpointing", "recompute"),
    [(None, "none"), (False, "none"), (True, "none"), (None, "frozen"), (None, "all")],
    ids=["plain", "checkpointing", "reentrant checkpointing", "recompute frozen", "recompute all"],
)
def test_active_gradients_are_those_of_full_training_and_frozen_ones_none(
    checkpointing: bool | None, recompute: str
) -> None:
    model, batch = tiny_llama(), tiny_batches(1)[0]
    model(**batch).loss.backward()
    full = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if checkpointing is not None:
        checkpoint_activations(model, use_reentrant=checkpointing)
    with SparseTuner(model, selector="lisa", num_active_layers=2, recompute=recompute) as tuner:
        active = set(tuner.begin_step())
        model(**batch, use_cache=False).loss.backward()
        own = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(own) == in_blocks(full, active | {None})  # type: ignore[arg-type]
    assert all(torch.equal(own[name], full[name]) for name in own)


def graph_leaves(loss: Tensor) -> set[int]:
    """The ids of the parameters that the backward accumulates into."""
    leaves, seen, waiting = set(), set(), [loss.grad_fn]
    while waiting:
        node: Any = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        waiting += [parent for parent, _ in node.next_functions]
    return leaves


def saved_bytes(model: nn.Module, batch: Any) -> tuple[int, Tensor]:
    """Bytes of activations that a forward keeps, each storage once and no parameter, and its loss."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**batch, use_cache=False).loss
    return sum(held.values()), loss


def test_no_gradient_of_frozen_weights_is_computed_nor_anything_kept_for_it() -> None:
    model, batch = tiny_llama(), tiny_batches(1)[0]
    with SparseTuner(model, selector="full") as tuner:
        tuner.begin_step()
        full_bytes, _ = saved_bytes(model, batch)
    with SparseTuner(model, selector="lisa", num_active_layers=1) as tuner:
        (active,) = tuner.begin_step()
        lisa_bytes, loss = saved_bytes(model, batch)
        outside = {id(p) for name, p in model.named_parameters() if ".layers." not in name}
        assert graph_leaves(loss) == {id(p) for p in tuner.layers[active].parameters} | outside
    assert lisa_bytes < 0.8 * full_bytes


def test_weights_past_a_parts_forward_are_held_by_dropping_their_gradient() -> None:
    model = tied_blocks()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.5)
    activation = LayerActivation(view_model(model, None, "whole layers"))
    activation.begin({1})
    before = snapshot(model)
    model(torch.ones(2, 8)).pow(2).sum().backward()
    optimizer.step()
    moved = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    # The shared weight belongs to no layer.
    own = {"blocks.1.scale", "blocks.1.inner.weight", "blocks.1.inner.bias", "blocks.1.past.weight"}
    assert moved == own | {"blocks.0.inner.weight"}
    activation.close()


@pytest.mark.parametrize(("mode", "held"), [("keep", True), ("reset", False)])
def test_moments_of_frozen_layers_wait_or_go_and_those_outside_stay(mode: str, held: bool) -> None:
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
    past: set[int] = set()
    with SparseTuner(
        model, selector="lisa", num_active_layers=1, update_interval=2, seed=3, optimizer_state=mode
    ) as tuner:
        for number, batch in enumerate(tiny_batches(8), start=1):
            active = set(tuner.begin_step())
            moments = {p: optimizer.state[p]["exp_avg"].clone() for p in model.parameters() if optimizer.state.get(p)}
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            past |= active
            with_moments = {
                layer.index for layer in tuner.layers if all(optimizer.state.get(p) for p in layer.parameters)
            }
            assert with_moments == (past if held else active)
            for layer in tuner.layers:
                if layer.index not in active and held and layer.index in past:
                    assert all(torch.equal(moments[p], optimizer.state[p]["exp_avg"]) for p in layer.parameters)
            assert optimizer.state[model.lm_head.weight]["step"] == number
            tuner.end_step(optimizer)
    assert len(past) > 2


# ---- Undo, resume, the Trainer


def test_close_leaves_no_trace_also_in_the_middle_of_a_step() -> None:
    model = tiny_llama()
    model.model.norm.weight.requires_grad_(False)
    before = traces(model)
    for finish in (True, False):
        tuner = SparseTuner(model, selector="lisa", num_active_layers=1)
        tuner.begin_step()
        model(**tiny_batches(1)[0]).loss.backward()
        assert traces(model)["requires_grad"] == before["requires_grad"]
        if finish:
            tuner.end_step()
        tuner.close()
        assert traces(model) == before


def test_a_resumed_loop_equals_an_uninterrupted_one() -> None:
    options: dict[str, Any] = {"selector": "lisa", "num_active_layers": 1, "update_interval": 3, "seed": 3}
    batches = tiny_batches(10)

    def go(model: Any, optimizer: Any, tuner: SparseTuner, some: list[Any]) -> None:
        for batch in some:
            tuner.begin_step()
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tuner.end_step(optimizer)

    whole = tiny_llama()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.01)
    with SparseTuner(whole, **options) as tuner:
        go(whole, optimizer, tuner, batches[:4])
        saved = [
            {k: v.clone() for k, v in whole.state_dict().items()},
            copy.deepcopy(optimizer.state_dict()),
            tuner.state_dict(),
        ]
        go(whole, optimizer, tuner, batches[4:])
    again = tiny_llama(seed=5)
    again.load_state_dict(saved[0])
    optimizer = torch.optim.AdamW(again.parameters(), lr=0.01)
    optimizer.load_state_dict(saved[1])
    with SparseTuner(again, **options) as tuner:
        tuner.load_state_dict(saved[2])
        go(again, optimizer, tuner, batches[4:])
    assert moved_layers(snapshot(whole), snapshot(again)) == set()


def make_trainer(folder: Path, model: nn.Module, callback: IST, *others: Any, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 0.01, "weight_decay": 0.1, "use_cpu": True,
        "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "logging_steps": 2, **options,
    }  # fmt: skip
    args = TrainingArguments(str(folder), **settings)
    return Trainer(model=model, args=args, train_dataset=tiny_rows(32), callbacks=[callback, *others])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}, {"bf16": True}],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_lisa_in_the_trainer(tmp_path: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    ist = IST(selector="lisa", num_active_layers=2, update_interval=2)
    moves = Moves(ist)
    with caplog.at_level(logging.WARNING, logger="ist"):
        make_trainer(tmp_path, model, ist, moves, **options).train()
    assert len(moves.steps) == 6
    check_moves(moves.steps, model)
    (said,) = caplog.records  # that embeddings and head train is no surprise here
    assert said.getMessage().startswith("IST trains 2 of 4 layers a step, from model.layers.0")


def test_a_resumed_trainer_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"selector": "lisa", "num_active_layers": 1, "update_interval": 4}
    whole, again = tiny_llama(), tiny_llama(seed=5)
    saving = {"save_strategy": "steps", "save_steps": 3}
    make_trainer(tmp_path, whole, IST(**options), **saving).train()
    trainer = make_trainer(tmp_path, again, IST(**options), **saving)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert moved_layers(snapshot(whole), snapshot(again)) == set()
