"""A loop without a Trainer that Ctrl-C or an error ends: the next training of the model trains every layer.

The tuner is kept alive, as a traceback does, and never closed.
"""

from __future__ import annotations

import code
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from ist import SparseTuner
from tests.helpers.tiny import moved_layers, snapshot, tiny_batches, tiny_lora, traces, trainable

ALL = {0, 1, 2, 3}
BATCH = tiny_batches(1)[0]


class CtrlC:
    """Raises KeyboardInterrupt when it is called."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(trainable(model), lr=0.1)


def interrupt(model: Any, tuner: SparseTuner, where: str) -> None:
    """A step of a loop with `begin_step` and `end_step` that ends before it is over."""
    block = model.base_model.model.model.layers[2]
    inner = block.self_attn.q_proj.lora_A["default"]
    optimizer = optimizer_of(model)
    tuner.begin_step()
    handle: Any = None
    if where == "in the forward":
        handle = block.mlp.register_forward_pre_hook(CtrlC())
    if where == "in an adapter's forward":
        handle = inner.register_forward_pre_hook(CtrlC())
    try:
        if where == "before the forward":
            raise KeyboardInterrupt
        loss = model(**BATCH).loss
        if where == "in the backward":
            loss.register_hook(CtrlC())
        loss.backward()
        if where == "before the update":
            raise KeyboardInterrupt
        optimizer.step()
        if where == "after the update":
            raise KeyboardInterrupt
        tuner.end_step(optimizer)
    finally:
        if handle is not None:
            handle.remove()


PLACES = ("before the forward", "in the forward", "in an adapter's forward", "in the backward", "before the update",
          "after the update", "in a probe")  # fmt: skip


def make(where: str, **options: Any) -> tuple[Any, SparseTuner]:
    model = tiny_lora()
    model.train()
    if where == "in a probe":
        options |= {"update_interval": 1, "loss_function": CtrlC()}
    return model, SparseTuner(model, num_active_layers=1, probe_batches=[BATCH], **options)


def plain_step(model: Any) -> set[int | None]:
    """A step of a training without IST, with an optimizer of its own; which layers it moved."""
    model.zero_grad()
    optimizer, before = optimizer_of(model), snapshot(model)
    model(**BATCH).loss.backward()
    optimizer.step()
    return moved_layers(before, snapshot(model))


OPTIONS: dict[str, dict[str, Any]] = {"fused": {}, "not fused": {"fused": False}, "recompute": {"recompute": "frozen"}}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("where", PLACES)
def test_a_notebook_s_next_cell_trains_every_layer(where: str, options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps the last traceback, and with it the loop's frame."""
    model, tuner = make(where, **OPTIONS[options])
    notebook = code.InteractiveInterpreter({"interrupt": interrupt, "model": model, "tuner": tuner, "where": where})
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        monkeypatch.setattr(sys, name, None, raising=False)
    monkeypatch.setattr(notebook, "write", lambda text: None)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with suppress(KeyboardInterrupt):
        notebook.runcode(compile("interrupt(model, tuner, where)", "cell", "exec"))
    assert isinstance(sys.last_value, KeyboardInterrupt)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert plain_step(model) == ALL
        assert plain_step(model) == ALL
    assert [("has been given up" in str(w.message)) for w in said] == [True] * (where != "in a probe")
    assert all(traces(model)["requires_grad"][name] for name, p in model.named_parameters() if "lora" in name)
    assert not tuner.closed
    tuner.begin_step()
    assert plain_step(model) == set(tuner.active_layers or ()), "the tuner can go on"
    tuner.close()


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("where", PLACES)
def test_a_script_s_next_training_trains_every_layer_from_its_third_step_on_and_is_told(
    where: str, options: str
) -> None:
    model, tuner = make(where, **OPTIONS[options])
    with pytest.raises(KeyboardInterrupt):
        interrupt(model, tuner, where)
    optimizer, before = optimizer_of(model), snapshot(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            before = snapshot(model)
            optimizer.zero_grad()
            model(**BATCH).loss.backward()
            optimizer.step()
    assert moved_layers(before, snapshot(model)) == ALL
    assert [("has been given up" in str(w.message)) for w in said] == [True] * (where != "in a probe")
    tuner.close()


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("how", ["with", "closed", "another tuner", "dropped"])
def test_nothing_stays_on_the_model(where: str, how: str) -> None:
    fresh = traces(tiny_lora().train())
    model, tuner = make(where)
    if how == "with":
        with pytest.raises(KeyboardInterrupt), tuner:
            interrupt(model, tuner, where)
    else:
        with pytest.raises(KeyboardInterrupt):
            interrupt(model, tuner, where)
    if how == "closed":
        tuner.close()
    elif how == "another tuner":
        SparseTuner(model, selector="random").close()
        assert tuner.closed
    elif how == "dropped":
        del tuner
    assert traces(model) == fresh
    assert not [name for name, module in model.named_modules() if "forward" in module.__dict__]
    assert plain_step(model) == ALL


def blocks(model: Any, tuner: SparseTuner, optimizer: Any, batches: list[Any]) -> None:
    """Two micro-batches a step, with an error while the second one is read."""
    for batch in batches:
        with tuner.step(optimizer):
            model(**batch).loss.backward()
        raise OSError("the next batch cannot be read")


def test_a_step_between_two_blocks_is_given_up_by_a_forward_outside_of_them() -> None:
    model, tuner = make("between")
    optimizer = optimizer_of(model)
    with pytest.raises(OSError, match="next batch"):
        blocks(model, tuner, optimizer, tiny_batches(2))
    assert tuner.active_layers is not None
    with pytest.warns(UserWarning, match="has been given up"):
        assert plain_step(model) == ALL
    with tuner.step(optimizer) as active:
        assert plain_step(model) == set(active)


def test_a_step_between_two_blocks_begins_again_after_an_error_that_was_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, tuner = make("between")
    optimizer = optimizer_of(model)
    with pytest.raises(OSError, match="next batch") as caught:
        blocks(model, tuner, optimizer, tiny_batches(2))
    monkeypatch.setattr(sys, "last_value", caught.value, raising=False)
    first = tuner.active_layers
    with tuner.step(optimizer) as active:
        assert active == first
        assert plain_step(model) == set(active)
    assert tuner.num_steps == 1


def evaluated(model: nn.Module) -> None:
    model.eval()
    model(**BATCH)
    model.train()


def without_gradient(model: nn.Module) -> None:
    with torch.no_grad():
        model(**BATCH)


@pytest.mark.parametrize("act", [evaluated, without_gradient])
def test_forwards_that_train_nothing_end_no_step(act: Callable[[Any], None]) -> None:
    model, tuner = make("nowhere")
    optimizer = optimizer_of(model)
    with tuner.step(optimizer) as active:
        model(**BATCH).loss.backward()
    act(model)
    assert tuner.active_layers == active
    tuner.close()
