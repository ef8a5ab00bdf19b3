"""The step of a model whose adapters are on some of the blocks alone: the others are what PEFT left them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ist import IST, SparseTuner, focus
from tests.helpers.models import ToyModel, toy_batch
from tests.helpers.tiny import (
    checkpoint_activations,
    layer_of,
    moved_layers,
    snapshot,
    tiny_batches,
    tiny_llama,
    tiny_lora,
    tiny_rows,
    traces,
    trainable,
)
from tests.helpers.trainers import make_trainer

NUM_BLOCKS = 8
FOCUSED = [2, 5, 6]
BARE = [0, 1, 3, 4, 7]


def focused_lora(**lora: Any) -> Any:
    return tiny_lora(NUM_BLOCKS, layers_to_transform=FOCUSED, **lora).train()


def blocks(model: Any) -> list[nn.Module]:
    return list(model.get_base_model().model.layers)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class NeverRead:
    """Probe batches that nobody may ask for."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("something was measured")


def own(module: nn.Module) -> dict[str, dict[str, Any]]:
    """All that the modules of a block hold themselves, by name."""
    return {
        name: {key: list(value) if isinstance(value, dict) else value for key, value in part.__dict__.items()}
        for name, part in module.named_modules()
    }


@pytest.mark.parametrize("fused", [True, False])
def test_blocks_without_adapters_are_not_touched(fused: bool) -> None:
    """No hook, no attribute and no forward of their own, before, within and after a step."""
    model = focused_lora()
    before, everything = [own(blocks(model)[index]) for index in BARE], traces(model)
    with SparseTuner(model, selector="all", fused=fused, probe_batches=NeverRead(), update_interval=1) as tuner:
        optimizer = torch.optim.AdamW(trainable(model))
        for batch in tiny_batches(3):
            with tuner.step(optimizer) as active:
                assert active == (0, 1, 2)
                assert tuner._parts.activation.frozen_parameters() == ()
                model(**batch).loss.backward()
                assert [own(blocks(model)[index]) for index in BARE] == before
                optimizer.step()
                optimizer.zero_grad()
        assert (tuner.probe_seconds, tuner.last_update) == (0, None)
        assert tuner.num_fused == (12 if fused else 0)
    assert traces(model) == everything


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"recompute": "frozen"}, {"recompute": "all"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_and_gradients_are_pefts(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = focused_lora().to(dtype)
    batch = tiny_batches(1)[0]
    expected = model(**batch)
    expected.loss.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    with SparseTuner(model, selector="all", **options) as tuner:
        tuner.begin_step()
        found = model(**batch, use_cache=False)
        found.loss.backward()
    close: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(found.logits, expected.logits, **close)
    found_gradients = gradients(model)
    assert found_gradients.keys() == expected_gradients.keys()
    assert {layer_of(name) for name in found_gradients} == set(FOCUSED)
    for name, gradient in found_gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], **close)


@pytest.mark.parametrize("recompute", ["none", "frozen", "all"])
@pytest.mark.parametrize("input_grads", [False, True])
def test_the_backward_ends_at_the_lowest_focused_layer(recompute: str, input_grads: bool) -> None:
    """Also where the embeddings' output was asked for a gradient that nobody reads."""
    model = focused_lora()
    if input_grads:
        model.enable_input_require_grads()
    has_graph: dict[int, bool] = {}
    for index, block in enumerate(blocks(model)):

        def watch(_: nn.Module, args: Any, output: Any, index: int = index) -> None:
            has_graph[index] = output.requires_grad

        block.register_forward_hook(watch)
    with SparseTuner(model, selector="all", recompute=recompute) as tuner:
        tuner.begin_step()
        model(**tiny_batches(1)[0], use_cache=False).loss.backward()
    assert has_graph == {index: index >= FOCUSED[0] for index in range(NUM_BLOCKS)}


@pytest.mark.parametrize(
    ("recompute", "selector", "twice"),
    [
        ("none", "all", set()),
        ("frozen", "all", {3, 4, 7}),
        ("all", "all", {2, 3, 4, 5, 6, 7}),
        ("frozen", "fixed:1", {6, 7}),  # Among focused layers one may be chosen too: the second is block 5.
    ],
)
def test_blocks_without_adapters_are_recomputed(recompute: str, selector: str, twice: set[int]) -> None:
    """Those above the lowest layer that trains; the rest has no backward."""
    model = focused_lora()
    counts = dict.fromkeys(range(NUM_BLOCKS), 0)
    handles = []
    for index, block in enumerate(blocks(model)):

        def count(*_: Any, index: int = index) -> None:
            counts[index] += 1

        handles.append(block.input_layernorm.register_forward_hook(count))  # type: ignore[union-attr, operator]
    before = [own(block) for block in blocks(model)]
    with SparseTuner(model, selector=selector, recompute=recompute) as tuner:
        tuner.begin_step()
        model(**tiny_batches(1)[0], use_cache=False).loss.backward()
        tuner.end_step()
        assert [own(blocks(model)[index]) for index in BARE] == [before[index] for index in BARE]
    assert {index for index, number in counts.items() if number == 2} == twice
    assert set(counts.values()) <= {1, 2}
    assert [own(block) for block in blocks(model)] == before


def test_recomputing_keeps_less() -> None:
    def kept_bytes(recompute: str) -> int:
        model = focused_lora()
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with SparseTuner(model, selector="all", recompute=recompute) as tuner:
            tuner.begin_step()
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = model(**tiny_batches(1)[0], use_cache=False).loss
            assert loss.requires_grad
        weights = {parameter.data_ptr() for parameter in model.parameters()}
        return sum(size for at, size in kept.items() if at not in weights)

    none, frozen, everything = map(kept_bytes, ("none", "frozen", "all"))
    assert everything < frozen < 0.75 * none


def test_recompute_and_checkpointing_are_refused_together_where_bare_blocks_have_it() -> None:
    model = focused_lora()
    checkpoint_activations(model.get_base_model())
    for index in FOCUSED:
        blocks(model)[index].gradient_checkpointing = False  # type: ignore[assignment]
    with pytest.raises(ValueError, match="gradient checkpointing are both on"):
        SparseTuner(model, selector="all", recompute="frozen")


ALL = (
    "IST trains all 3 layers with adapters at every step, from base_model.model.model.layers.2: nothing is frozen or "
    "measured, and the other 5 of 8 blocks stay as they are"
)
CHOSEN = (
    "IST trains 1 of 3 layers a step, chosen among the 3 of 8 blocks that have adapters (layers_to_transform; "
    'selector="all" trains all 3 at every step), from base_model.model.model.layers.2'
)


@pytest.mark.parametrize(
    ("selector", "lora", "said"),
    [
        ("all", {}, f"{ALL}, with no backward below the lowest layer"),
        ("all", {"modules_to_save": ["embed_tokens"]}, ALL),
        ("ist", {}, CHOSEN),
        ("random", {}, CHOSEN),
    ],
)
@pytest.mark.parametrize("fused", [True, False])
def test_what_is_done_is_said_in_one_line(
    selector: str, lora: dict[str, Any], said: str, fused: bool, caplog: pytest.LogCaptureFixture
) -> None:
    SparseTuner(focused_lora(**lora), selector=selector, fused=fused).close()
    line = next(record.getMessage() for record in caplog.records if record.name == "ist.step.announce")
    assert line == said + ("; 12 LoRA modules are fused (fused=False turns it off)." if fused else ".")


@pytest.mark.parametrize("recompute", ["none", "frozen"])
def test_a_trainer_gets_the_adapter_that_it_gets_without(recompute: str, tmp_path: Path) -> None:
    """Up to the rounding of fused LoRA, over steps of AdamW on two micro-batches each."""
    adapters = []
    for callbacks in ([], [IST(selector="all", recompute=recompute)]):
        model = focused_lora()
        arguments = TrainingArguments(
            str(tmp_path / str(len(callbacks))), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3,
            gradient_accumulation_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=tiny_rows(), callbacks=callbacks).train()  # type: ignore[arg-type]
        adapters.append(snapshot(model))
    for name, weight in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], weight, rtol=1e-4, atol=2e-5)


class Pipeline(ToyModel):
    """Blocks in an `nn.Sequential`, of which one with adapters might be a pipeline's."""

    def __init__(self) -> None:
        super().__init__(num_blocks=4)
        self.blocks = nn.Sequential(*self.blocks)  # type: ignore[assignment]


def focused_to_one(base: nn.Module, batches: list[Any], targets: list[str]) -> Any:
    config = focus(base, LoraConfig(r=2, target_modules=targets), batches, num_layers=1)
    return get_peft_model(base, config).train()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "batch", "targets"),
    [(lambda: tiny_llama(4), tiny_batches(1)[0], ["q_proj"]), (Pipeline, toy_batch(torch.float32), ["up", "down"])],
    ids=["ModuleList", "Sequential"],
)
def test_a_focus_on_one_layer_trains_as_peft_does(make: Any, batch: Any, targets: list[str]) -> None:
    ends = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = focused_to_one(make(), [batch], targets)
        optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
        context: Any = SparseTuner(model, selector="all") if sparse else nullcontext()
        with context as tuner:
            for _ in range(3):
                with tuner.step(optimizer) if tuner else nullcontext((0,)) as active:
                    assert active == (0,)
                    model(**batch)["loss"].backward()
                    optimizer.step()
                    optimizer.zero_grad()
        ends.append(snapshot(model))
    torch.testing.assert_close(ends[0], ends[1])
    assert any("lora_B" in name and value.any() for name, value in ends[0].items())


def test_a_focus_on_one_layer_trains_in_a_trainer(tmp_path: Path) -> None:
    model = focused_to_one(tiny_llama(4), tiny_batches(1), ["q_proj"])
    before = snapshot(model)
    make_trainer(tmp_path, IST(selector="all"), model=model, max_steps=2, save_steps=9).train()
    assert len(moved_layers(before, snapshot(model))) == 1


def test_choosing_needs_more_than_one_layer() -> None:
    model = focused_to_one(tiny_llama(4), tiny_batches(1), ["q_proj"])
    for call in (lambda: SparseTuner(model), lambda: SparseTuner(model, selector="random")):
        with pytest.raises(ValueError, match=r"needs at least 2: .* or train this one with selector='all'"):
            call()
