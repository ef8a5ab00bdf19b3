"""What the backward reaches and what it computes again: exact, and no more than needed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import peft
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from ist import SparseTuner
from tests.helpers.tiny import checkpoint_activations, snapshot, tiny_batches, tiny_lora

NUM_LAYERS = 6


class Counts:
    """How often each block computed with a gradient to come, and in which a gradient arrived at its output."""

    def __init__(self, tuner: SparseTuner) -> None:
        self.forwards: Counter[int] = Counter()
        self.backwards: Counter[int] = Counter()
        for layer in tuner.layers:
            norm = layer.module.input_layernorm  # computes again where its block does
            assert isinstance(norm, nn.Module)
            norm.register_forward_hook(lambda *_, index=layer.index: self.forwards.update([index]))
            layer.module.register_forward_hook(lambda *given, index=layer.index: self.watch(given[2], index))

    def watch(self, output: Any, index: int) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: self.backwards.update([index]))


def step(
    model: Any, active: tuple[int, ...], use_cache: bool = False, **options: Any
) -> tuple[Counts, float, dict[str, torch.Tensor]]:
    """One step with the layers `active`: what was computed, the loss, and the gradients."""
    with SparseTuner(model, num_active_layers=len(active), probe_batches=tiny_batches(1), **options) as tuner:
        counts = Counts(tuner)
        tuner.selector.choose = lambda _: active  # type: ignore[method-assign]
        tuner.begin_step()
        torch.manual_seed(4)
        loss = model(**tiny_batches(1)[0], use_cache=use_cache).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        tuner.end_step()
    return counts, loss.item(), gradients


@pytest.mark.parametrize("mode", ["frozen", "all"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_changes_no_bit(mode: str, fused: bool, dtype: torch.dtype) -> None:
    """With dropout in the adapters, and under autocast."""
    found = []
    for recompute in ("none", mode):
        model = tiny_lora(NUM_LAYERS, lora_dropout=0.2)
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found.append(step(model, (2, 4), recompute=recompute, fused=fused)[1:])
    (loss, gradients), (loss_again, gradients_again) = found
    assert loss == loss_again
    assert gradients.keys() == gradients_again.keys()
    assert all(torch.equal(gradients[name], gradients_again[name]) for name in gradients)


@pytest.mark.parametrize(
    ("mode", "twice"), [("none", set()), ("frozen", {3, 5}), ("all", {2, 3, 4, 5})], ids=["none", "frozen", "all"]
)
@pytest.mark.parametrize("input_grads", [False, True])
def test_layers_that_compute_twice(mode: str, twice: set[int], input_grads: bool) -> None:
    model = tiny_lora(NUM_LAYERS)
    if input_grads:
        model.enable_input_require_grads()
    counts, _, _ = step(model, (2, 4), recompute=mode)
    assert {index for index, count in counts.forwards.items() if count == 2} == twice
    assert set(counts.backwards) == {2, 3, 4, 5}


@pytest.mark.parametrize("enable_after", [False, True], ids=["before", "after the tuner came"])
def test_checkpointing_of_the_model_stops_at_the_lowest_active_layer(enable_after: bool) -> None:
    model = tiny_lora(NUM_LAYERS)
    expected = step(tiny_lora(NUM_LAYERS), (2, 4))[2]
    with SparseTuner(model, num_active_layers=2, probe_batches=tiny_batches(1)) as tuner:
        tuner.selector.choose = lambda _: (2, 4)  # type: ignore[method-assign]
        if enable_after:
            tuner.begin_step()
            tuner.end_step()
        checkpoint_activations(model.get_base_model(), use_reentrant=False)
        model.enable_input_require_grads()
        counts = Counts(tuner)
        tuner.begin_step()
        model(**tiny_batches(1)[0], use_cache=False).loss.backward()
        assert {index for index, count in counts.forwards.items() if count == 2} == {2, 3, 4, 5}
        assert set(counts.backwards) == {2, 3, 4, 5}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(parameter.grad, expected.pop(name))
        assert not expected
        model.zero_grad()
        tuner.end_step()
    model(**tiny_batches(1)[0], use_cache=False).loss.backward()
    assert counts.backwards[0] == 1  # The model is as it was: everything trains.


@pytest.mark.parametrize("mode", ["none", "frozen", "all"])
def test_packed_sequences(mode: str) -> None:
    """Two sequences in a row, told apart by their positions, train as they do apart."""
    rows = tiny_batches(1)[0]["input_ids"][:2]
    labels = rows.clone()
    labels[:, 0] = -100  # what a packed row predicts across its border counts nowhere
    packed = {
        "input_ids": rows.reshape(1, -1),
        "labels": labels.reshape(1, -1),
        "position_ids": torch.arange(rows.shape[1]).repeat(2)[None],
    }

    def gradients(batch: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
        model = tiny_lora(NUM_LAYERS).double()
        with SparseTuner(model, num_active_layers=2, probe_batches=[batch], **options) as tuner:
            tuner.selector.choose = lambda _: (2, 4)  # type: ignore[method-assign]
            tuner.begin_step()
            model(**batch, use_cache=False).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients({"input_ids": rows, "labels": labels}, fused=False)
    found = gradients(packed, recompute=mode)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


def test_trainable_embeddings_keep_their_gradient() -> None:
    model = tiny_lora(NUM_LAYERS, modules_to_save=["embed_tokens"])
    model.enable_input_require_grads()
    counts, _, gradients = step(model, (2, 4), recompute="frozen")
    assert any("embed_tokens" in name for name in gradients)
    assert set(counts.backwards) == set(range(NUM_LAYERS))


def test_reentrant_checkpointing_keeps_the_gradient_that_it_needs() -> None:
    model = tiny_lora(NUM_LAYERS)
    checkpoint_activations(model.get_base_model(), use_reentrant=True)
    model.enable_input_require_grads()
    gradients = step(model, (2, 4))[2]
    assert gradients.keys() == step(tiny_lora(NUM_LAYERS), (2, 4))[2].keys()


class Block(nn.Module):
    """Of another library, which knows nothing of transformers' checkpointing."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.calls = 0

    def forward(self, x: torch.Tensor, context: tuple[torch.Tensor, ...] = ()) -> torch.Tensor:
        self.calls += 1
        return x + torch.tanh(sum(context, self.proj(x)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.context = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: torch.Tensor, with_context: bool = False) -> torch.Tensor:
        context = (self.context(x),) if with_context else ()
        for block in self.blocks:
            x = block(x, context)
        return x


def other_model() -> Any:
    torch.manual_seed(0)
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["proj"], init_lora_weights=False), Model())


def accelerate_hooks(block: nn.Module) -> None:
    add_hook_to_module(block, AlignDevicesHook("cpu"))


@pytest.mark.parametrize("prepare", [lambda block: None, accelerate_hooks], ids=["plain", "with Accelerate's hooks"])
def test_blocks_of_other_libraries(prepare: Any) -> None:
    model = other_model()
    for block in model.blocks:
        prepare(block)
    before = [dict(block.__dict__) for block in model.blocks]
    x = torch.randn(3, 8)
    gradients = []
    for mode in ("none", "frozen"):
        with SparseTuner(model, num_active_layers=2, recompute=mode, probe_batches=[{"x": x}]) as tuner:
            tuner.selector.choose = lambda _: (1, 2)  # type: ignore[method-assign]
            for block in model.blocks:
                block.calls = 0
            tuner.begin_step()
            model(x).square().mean().backward()
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            assert [block.calls for block in model.blocks] == ([1, 1, 1, 2] if mode == "frozen" else [1] * 4)
            model.zero_grad()
    assert [{**block.__dict__, "calls": 0} for block in model.blocks] == before
    assert all(map(torch.equal, *gradients))


def test_a_gradient_within_a_positional_argument() -> None:
    """One graph behind all blocks, which the reentrant kind would go through more than once."""
    gradients = []
    for mode in ("none", "frozen"):
        model = other_model()
        model.context.requires_grad_(True)
        with SparseTuner(model, num_active_layers=1, recompute=mode, probe_batches=[]) as tuner:
            tuner.selector.choose = lambda _: (1,)  # type: ignore[method-assign]
            tuner.begin_step()
            model(torch.ones(3, 8), with_context=True).square().mean().backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
            assert [block.calls for block in model.blocks] == ([1] * 4 if mode == "none" else [2, 1, 2, 2])
    assert all(map(torch.equal, *gradients))


def test_a_replaced_forward_is_named_once() -> None:
    model = other_model()
    for block in model.blocks[2:]:
        block.forward = lambda *given, block=block: Block.forward(block, *given)
    with pytest.warns(
        UserWarning, match=r"^recompute='all' does nothing for 2 of 4 layers \(blocks\.2, …\), w"
    ) as seen:
        tuner = SparseTuner(model, num_active_layers=2, recompute="all", probe_batches=[])
    tuner.selector.choose = lambda _: (0, 1)  # type: ignore[method-assign]
    for _ in range(2):
        tuner.begin_step()
        model(torch.ones(3, 8)).mean().backward()
    tuner.close()
    assert len(seen) == 1
    assert [block.calls for block in model.blocks] == [4, 4, 2, 2]
    assert ["forward" in block.__dict__ for block in model.blocks] == [False, False, True, True]


# ---- Beside transformers, TRL and the compiler


def test_checkpointing_of_transformers_is_left_alone() -> None:
    """TRL switches it off and on again around its reference passes, for all blocks, where it finds it on."""
    trl_models = pytest.importorskip("trl.models.utils")
    model = tiny_lora(NUM_LAYERS)
    blocks: Any = model.get_submodule("base_model.model.model.layers")
    expected = step(tiny_lora(NUM_LAYERS), (2, 4))[2]
    with SparseTuner(model, num_active_layers=2, probe_batches=tiny_batches(1), recompute="frozen") as tuner:
        counts = Counts(tuner)
        tuner.selector.choose = lambda _: (2, 4)  # type: ignore[method-assign]
        tuner.begin_step()
        assert not model.is_gradient_checkpointing
        with (
            torch.no_grad(),
            trl_models.disable_gradient_checkpointing(model.get_base_model(), {"use_reentrant": False}),
        ):
            model(**tiny_batches(1)[0], use_cache=False)
        counts.forwards.clear()
        model(**tiny_batches(1)[0], use_cache=False).loss.backward()
        assert counts.forwards == {0: 1, 1: 1, 2: 1, 3: 2, 4: 1, 5: 2}
        for name, parameter in model.named_parameters():
            assert parameter.grad is None or torch.equal(parameter.grad, expected[name])
    assert not model.is_gradient_checkpointing
    assert all("forward" not in block.__dict__ for block in blocks)


def gpt2_lora() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=NUM_LAYERS, n_head=2, n_embd=16, n_positions=16, vocab_size=64)
    lora = peft.LoraConfig(target_modules=["c_fc"], init_lora_weights=False, fan_in_fan_out=True)
    model = peft.get_peft_model(GPT2LMHeadModel(config), lora)
    for block in model.get_submodule("base_model.model.transformer.h").children():
        block.input_layernorm = block.ln_1  # as `Counts` knows it
    return model


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("make", [lambda: tiny_lora(NUM_LAYERS), gpt2_lora], ids=["llama", "gpt2"])
def test_with_and_without_a_cache(make: Any, use_cache: bool) -> None:
    """A cache would grow twice where a block computes twice; GPT-2's blocks take it by position."""
    counts, loss, gradients = step(make(), (2, 4), use_cache, recompute="frozen")
    assert counts.forwards == {0: 1, 1: 1, 2: 1, 3: 2, 4: 1, 5: 2}
    _, expected_loss, expected = step(make(), (2, 4), use_cache)
    assert loss == expected_loss
    assert gradients.keys() == expected.keys()
    for name in gradients:  # A cache joins keys and values, whose place in memory may change how a CPU sums.
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("mode", ["norms", "frozen", "all"])
def test_both_kinds_of_checkpointing_are_refused(mode: Any) -> None:
    model = tiny_lora()
    checkpoint_activations(model.get_base_model())
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=rf"^recompute='{mode}' and gradient checkpointing are both on: leave one of.* TRL's SFTConfig"
    ):
        SparseTuner(model, recompute=mode)
    assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
    with pytest.raises(
        ValueError, match=r"^recompute='some' is unknown: choose one of 'none', 'norms', 'frozen', 'all'\.$"
    ):
        SparseTuner(tiny_lora(), recompute="some")
