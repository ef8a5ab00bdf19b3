"""The step of a model whose adapters are on some of the blocks alone: the others are what PEFT left them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ist import IST, SparseTuner
from tests.helpers.tiny import (
    checkpoint_activations,
    layer_of,
    snapshot,
    tiny_batches,
    tiny_lora,
    tiny_rows,
    traces,
    trainable,
)

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
