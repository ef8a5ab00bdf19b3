"""What a loop changes in the middle of a training, its optimizer or adapters: seen, or refused with one line."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.optimizers import create_lorafa_optimizer
from torch import Tensor
from transformers import TrainerCallback

from ist import IST, SparseTuner
from tests.helpers.tiny import moved_layers, snapshot, tiny_batches, tiny_lora, traces, trainable
from tests.helpers.trainers import make_trainer

BATCH = tiny_batches(1)[0]


def make(**options: Any) -> tuple[Any, SparseTuner]:
    model = tiny_lora()
    model.train()
    return model, SparseTuner(model, selector="random", num_active_layers=1, **options)


def whole_step(model: Any, tuner: SparseTuner, optimizer: Any, way: str) -> tuple[int, ...]:
    """A step in one of the two ways; the layers that trained."""
    if way == "block":
        with tuner.step(optimizer) as active:
            model(**BATCH).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return active
    active = tuner.begin_step()
    model(**BATCH).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    tuner.end_step(optimizer)
    return active


WAYS = ("block", "begin and end")

# ---- The optimizer


@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_that_gets_its_groups_later_is_seen_to_step(way: str) -> None:
    model, tuner = make()
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.step()
    optimizer.add_param_group({"params": trainable(model)})
    for number in range(1, 4):
        before = snapshot(model)
        active = whole_step(model, tuner, optimizer, way)
        assert moved_layers(before, snapshot(model)) == set(active)
        assert tuner.num_steps == number


@pytest.mark.parametrize("way", WAYS)
def test_another_optimizer_takes_the_place_of_the_first(way: str) -> None:
    """Its moments are forgotten as those of the first were."""
    model, tuner = make(optimizer_state="reset")
    for optimizer in (torch.optim.AdamW(trainable(model)), torch.optim.AdamW(trainable(model))):
        active: tuple[int, ...] = (0,)
        for _ in range(6):
            active = whole_step(model, tuner, optimizer, way)
        own = {id(parameter) for parameter in tuner.layers[active[0]].parameters}
        assert {id(parameter) for parameter in optimizer.state} == own
    assert tuner.num_steps == 12


def test_another_lora_fa_optimizer_takes_the_place_of_the_first() -> None:
    model, tuner = make()
    for _ in range(2):
        optimizer = create_lorafa_optimizer(model=model, r=4, lora_alpha=8, lr=1e-2)
        for _ in range(2):
            before = snapshot(model)
            active = whole_step(model, tuner, optimizer, "block")
            assert moved_layers(before, snapshot(model)) == set(active)


@pytest.mark.parametrize("mode", ["keep", "reset", "offload"])
def test_optimizers_that_take_turns_are_attached_and_told_of_once(mode: Any) -> None:
    """Each is seen to, also where the other was the last; one that is dropped is not kept alive."""
    model, tuner = make(optimizer_state=mode)
    weights = trainable(model)
    pair = [torch.optim.AdamW(weights[start::2], lr=0.01) for start in (0, 1)]

    def step() -> list[list[int]]:
        active = tuner.begin_step()
        model(**BATCH).loss.backward()
        for optimizer in pair:
            optimizer.step()
            optimizer.zero_grad()
        for optimizer in pair:
            tuner.end_step(optimizer)
        own = {id(parameter) for parameter in tuner.layers[active[0]].parameters}
        held = {id(parameter) for optimizer in pair for parameter in optimizer.state}
        assert held <= own or mode != "reset"
        return [list(optimizer._optimizer_step_pre_hooks) for optimizer in pair]

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        hooks = step()
        for _ in range(5):
            assert step() == hooks, "the same hooks: none was taken off and put on again"
    assert [str(one.message)[:35] for one in said] == ["The optimizer lacks trainable param"] * 2
    assert tuner.num_steps == 6
    first = weakref.ref(pair.pop(0))
    gc.collect()
    assert first() is None
    step()
    tuner.close()
    assert all(hook not in pair[0]._optimizer_step_pre_hooks for hook in hooks[1]) or mode == "keep"


# ---- Steps that are ended and were not begun


def test_ending_a_step_twice_counts_it_once_and_is_told_once() -> None:
    model, tuner = make()
    optimizer = torch.optim.SGD(trainable(model))
    whole_step(model, tuner, optimizer, "begin and end")
    with pytest.warns(UserWarning, match="no step had begun since the last one ended") as said:
        updates = [tuner.end_step(optimizer), tuner.end_step()]
    assert updates == [None, None]
    assert len(said) == 1
    assert tuner.num_steps == 1


def test_a_step_that_is_begun_and_ended_in_a_block_counts_once() -> None:
    model, tuner = make()
    optimizer = torch.optim.SGD(trainable(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(1, 3):
            with tuner.step(optimizer) as active:
                assert tuner.begin_step() == active
                model(**BATCH).loss.backward()
                optimizer.step()
                tuner.end_step(optimizer)
                tuner.end_step(optimizer)
            assert tuner.num_steps == number


# ---- The adapters


def add(model: Any) -> None:
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))


def replace(model: Any) -> None:
    add(model)
    model.set_adapter("second")
    model.delete_adapter("default")


def switch(model: Any) -> None:
    add(model)
    model.set_adapter("second")


CHANGED = (
    r"^The active adapter is 'second' and was 'default' when this tuner was made, so that every layer of 'second' "
)


@pytest.mark.parametrize("change", [switch, replace])
@pytest.mark.parametrize("way", WAYS)
def test_another_adapter_is_not_trained_in_every_layer(way: str, change: Any) -> None:
    model, tuner = make()
    whole_step(model, tuner, torch.optim.SGD(trainable(model)), way)
    change(model)
    optimizer, before = torch.optim.SGD(trainable(model), lr=0.1), snapshot(model)
    with pytest.raises(ValueError, match=CHANGED) as caught:
        whole_step(model, tuner, optimizer, way)
    assert "\n" not in str(caught.value)
    assert not moved_layers(before, snapshot(model))
    assert tuner.active_layers is None
    if change is switch:
        model.set_adapter("default")
        whole_step(model, tuner, torch.optim.SGD(trainable(model)), way)
        assert tuner.num_steps == 2
    tuner.close()


@pytest.mark.parametrize("way", WAYS)
def test_another_adapter_is_not_trained_from_the_next_micro_batch_on(way: str) -> None:
    """Every layer of it would have trained; with the adapter back, the same step begins again."""
    model, tuner = make()
    add(model)
    weights = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    optimizer, before = torch.optim.SGD(weights, lr=0.1), snapshot(model)
    if way == "block":
        with tuner.step(optimizer) as active:
            model(**BATCH).loss.backward()
    else:
        active = tuner.begin_step()
        model(**BATCH).loss.backward()
        tuner.end_step(optimizer)
    model.set_adapter("second")
    for _ in range(2):  # The second one would begin a step.
        with pytest.raises(ValueError, match=CHANGED):
            whole_step(model, tuner, optimizer, way)
        assert tuner.active_layers is None
    assert not moved_layers(before, snapshot(model))
    model.set_adapter("default")
    assert whole_step(model, tuner, optimizer, way) == active
    assert moved_layers(before, snapshot(model)) == set(active)
    assert tuner.num_steps == 1


SEVERAL = [["default"], ["second"], ["second", "default"], ["default", "second"]]


@pytest.mark.parametrize("way", WAYS)
def test_some_of_the_adapters_of_a_tuner_may_be_active(way: str) -> None:
    """In any order; one that is not of the tuner is refused, also where its name was put into PEFT's own list."""
    model = tiny_lora()
    model.train()
    add(model)
    model.add_adapter("third", LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    model.base_model.set_adapter(SEVERAL[-1])
    tuner = SparseTuner(model, selector="random", num_active_layers=1)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    given: list[str] = []
    for names in SEVERAL:
        given, before = list(names), snapshot(model)
        model.base_model.set_adapter(given)
        active = whole_step(model, tuner, optimizer, way)
        after = snapshot(model)
        assert moved_layers(before, after) == set(active)
        assert {name for name in ("default", "second", "third") if moved(name, before, after)} == set(names)
    given.append("third")
    with pytest.raises(ValueError, match=r"^The active adapter is 'third' and was \['default', 'second'\] ") as caught:
        whole_step(model, tuner, optimizer, way)
    assert "call model.base_model.set_adapter(['default', 'second']) before" in str(caught.value)
    model.base_model.set_adapter(["default", "second"])
    whole_step(model, tuner, optimizer, way)
    assert tuner.num_steps == len(SEVERAL) + 1


def moved(adapter: str, before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    """Whether weights of an adapter did."""
    return any(not torch.equal(value, after[name]) for name, value in before.items() if f".{adapter}." in name)


@pytest.mark.parametrize("way", WAYS)
def test_an_adapter_that_is_added_or_is_active_for_a_while_changes_nothing(way: str) -> None:
    found = []
    for changes in (False, True):
        model, tuner = make()
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        for _ in range(3):
            if changes and "second" not in model.peft_config:
                add(model)
            whole_step(model, tuner, optimizer, way)
            if changes:
                model.set_adapter("second")
                with torch.no_grad(), model.disable_adapter():
                    model(**BATCH)
                model.set_adapter("default")
        found.append({name: value for name, value in snapshot(model).items() if "second" not in name})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_a_trainer_stops_where_a_callback_changes_the_adapter(tmp_path: Any) -> None:
    class Switch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                model.set_adapter("second")

    model = tiny_lora()
    add(model)
    before = traces(model)
    trainer = make_trainer(tmp_path, IST(selector="random"), Switch(), model=model, max_steps=4, save_strategy="no")
    with pytest.raises(ValueError, match=CHANGED):
        trainer.train()
    assert trainer.state.global_step == 2
    assert traces(model)["hooks"] == before["hooks"]


def after_a_step(fused: bool) -> tuple[Any, SparseTuner, dict[str, Any]]:
    """A model, its tuner and a batch of which one step was trained."""
    model = tiny_lora()
    tuner = SparseTuner(model, num_active_layers=1, fused=fused)
    (batch,) = tiny_batches(1)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    with tuner.step(optimizer):
        model(**batch).loss.backward()
        optimizer.step()
    return model, tuner, batch


@pytest.mark.parametrize("fused", [True, False])
def test_a_deleted_adapter_is_named(fused: bool) -> None:
    """PEFT's own forward would say KeyError."""
    model, tuner, _ = after_a_step(fused)
    model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"^No adapter is active, and 'default' was .* deleted, close this tuner"):
        tuner.begin_step()
    assert tuner.active_layers is None
    tuner.close()


def add_again(model: Any) -> None:
    model.delete_adapter("default")
    model.add_adapter("default", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.set_adapter("default")


def assign(model: Any) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


@pytest.mark.parametrize("change", [add_again, assign])
@pytest.mark.parametrize("fused", [True, False])
def test_parameters_that_were_replaced_need_another_tuner(change: Any, fused: bool) -> None:
    """The step would never end, or without the fused step train every layer."""
    model, tuner, batch = after_a_step(fused)
    change(model)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    with pytest.raises(ValueError, match=r"layers.0 were replaced .* make another SparseTuner"), tuner.step(optimizer):
        pytest.fail("a step began")
    assert tuner.active_layers is None
    tuner.close()
    tuner = SparseTuner(model, num_active_layers=1, fused=fused)
    before = snapshot(model)
    with tuner.step(optimizer) as active:
        model(**batch).loss.backward()
        optimizer.step()
    assert moved_layers(before, snapshot(model)) == set(active)
