"""The tuner against its naive twin, and everything that a training loop may do to it."""

from __future__ import annotations

import copy
import gc
import json
import warnings
import weakref
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import DataLoader

from ist import FixedSelector, History, ISTConfig, SparseTuner, read_history
from tests.helpers.reference_ist import ReferenceIST
from tests.helpers.tiny import (
    layer_of,
    moved_layers,
    snapshot,
    tiny_batches,
    tiny_lora,
    tiny_rows,
    traces,
    trainable,
)

STEPS = 100


def train(model: Any, batches: list[Any], tuner: SparseTuner, steps: int, lr: float = 0.01) -> list[float]:
    """The loop of the documentation; returns the training losses."""
    optimizer = torch.optim.AdamW(trainable(model), lr=lr, weight_decay=0.1)
    losses = []
    torch.manual_seed(5)
    for step in range(steps):
        tuner.begin_step()
        loss = model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tuner.end_step(optimizer)
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("preset", "num_layers", "num_active", "num_drawn"),
    [("paper", 6, 2, 3), ("authors", 6, 1, 3), ("paper", 5, 1, 3), ("authors", 7, 1, 3)],
)
@pytest.mark.parametrize("fused", [False, True], ids=["as PEFT computes", "fused"])
def test_equals_the_naive_twin_over_100_steps(
    preset: str, num_layers: int, num_active: int, num_drawn: int, fused: bool
) -> None:
    """To the bit with PEFT's own forward; in float64 with LoRA as one function."""
    dtype = torch.float64 if fused else torch.float32
    batches, probes = tiny_batches(7), tiny_batches(5, seed=2)
    config = {"seed": 3, "beta": 0.25, "mu": 50.0, "num_candidates": 3}

    model = tiny_lora(num_layers, lora_dropout=0.1).to(dtype)
    options = {"update_interval": 4, "fused": fused, "frozen_dropout": True, "probe_batch_size": 4}
    tuner = SparseTuner(model, preset=preset, probe_batches=probes, **config, **options)  # type: ignore[arg-type]
    actives = []
    choose = tuner.selector.choose
    tuner.selector.choose = lambda step: actives.append(choose(step)) or actives[-1]  # type: ignore[method-assign,func-returns-value]
    losses = train(model, batches, tuner, STEPS)

    twin_model = tiny_lora(num_layers, lora_dropout=0.1).to(dtype)
    twin = ReferenceIST(twin_model, num_layers, num_active, num_drawn, preset, **config)
    optimizer = torch.optim.AdamW(trainable(twin_model), lr=0.01, weight_decay=0.1)
    twin_losses, twin_actives, num_probes = [], [], 0
    torch.manual_seed(5)
    for step in range(STEPS):
        if step and step % 4 == 0:
            twin.update(step, probes[num_probes % len(probes)])
            num_probes += 1
        twin_actives.append(twin.active(step))
        twin.freeze_all_but(twin_actives[-1])
        loss = twin_model(**batches[step % len(batches)]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        twin_losses.append(loss.item())
    twin.update(STEPS, probes[num_probes % len(probes)])

    assert [list(active) for active in actives] == twin_actives
    tolerance = 1e-9 if fused else 0.0
    assert losses == pytest.approx(twin_losses, abs=tolerance)
    assert tuner.selector.state_dict()["importance"] == pytest.approx(twin.importance(), abs=tolerance)
    after, twin_after = snapshot(model), snapshot(twin_model)
    for name in after:
        torch.testing.assert_close(after[name], twin_after[name], rtol=0, atol=tolerance)
    assert max(map(abs, twin.importance())) > 0


def test_probes_with_mu_0_change_no_bit_of_a_random_run() -> None:
    """The training curve with probes is that of random sparse tuning without: probes draw from nothing shared."""
    results = []
    dataset: Any = tiny_batches(9, seed=4)
    for selector, options in (("ist", {"mu": 0.0, "update_interval": 3}), ("random", {})):
        model = tiny_lora(lora_dropout=0.2)
        loader = torch.utils.data.DataLoader(dataset, batch_size=None, shuffle=True)
        tuner = SparseTuner(model, selector=selector, probe_batches=loader, **options)  # type: ignore[arg-type]
        losses = train(model, tiny_batches(7), tuner, 30)
        results.append((losses, snapshot(model), torch.get_rng_state()))
        assert (tuner.probe_seconds > 0) == (selector == "ist")
    (losses, weights, rng), (random_losses, random_weights, random_rng) = results
    assert losses == random_losses
    assert all(torch.equal(weights[name], random_weights[name]) for name in weights)
    assert torch.equal(rng, random_rng)


def test_same_seed_same_adapter_and_another_seed_another() -> None:
    runs = []
    for seed in (0, 0, 1):
        model = tiny_lora(lora_dropout=0.1)
        train(model, tiny_batches(5), SparseTuner(model, seed=seed, update_interval=2), 12)
        runs.append(snapshot(model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_training_converges() -> None:
    model = tiny_lora(r=16, modules_to_save=["lm_head"])
    losses = train(model, tiny_batches(8), SparseTuner(model, mu=100.0), 200, lr=0.03)
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


def test_only_the_active_layers_move_and_the_rest_keeps_every_bit() -> None:
    model = tiny_lora(modules_to_save=["lm_head"])
    tuner = SparseTuner(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.01, weight_decay=0.5)
    for batch in tiny_batches(12):
        before = snapshot(model)
        active = tuner.begin_step()
        assert tuner.active_layers == active
        model(**batch).loss.backward()
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                assert (parameter.grad is not None) == (layer_of(name) in active)
        optimizer.step()
        optimizer.zero_grad()
        tuner.end_step(optimizer)
        assert tuner.active_layers is None
        assert moved_layers(before, snapshot(model)) == {*active, None}  # None: the head outside of the layers


def test_resume_is_exact() -> None:
    batches = tiny_batches(11)
    whole = tiny_lora(lora_dropout=0.1)
    tuner = SparseTuner(whole, probe_batches=tiny_batches(5, seed=2), update_interval=3, mu=100.0)
    optimizer = torch.optim.AdamW(trainable(whole), lr=0.01)

    def steps(model: Any, tuner: SparseTuner, optimizer: Any, numbers: range) -> None:
        for step in numbers:
            torch.manual_seed(step)
            tuner.begin_step()
            model(**batches[step % len(batches)]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tuner.end_step(optimizer)

    steps(whole, tuner, optimizer, range(10))
    saved = json.dumps(tuner.state_dict())
    weights, moments = snapshot(whole), copy.deepcopy(optimizer.state_dict())

    resumed = tiny_lora(lora_dropout=0.1)
    resumed.load_state_dict(weights, strict=False)
    second = SparseTuner(resumed, probe_batches=tiny_batches(5, seed=2), update_interval=3, mu=100.0)
    second.load_state_dict(json.loads(saved))
    second_optimizer = torch.optim.AdamW(trainable(resumed), lr=0.01)
    second_optimizer.load_state_dict(copy.deepcopy(moments))

    steps(whole, tuner, optimizer, range(10, 25))
    steps(resumed, second, second_optimizer, range(10, 25))
    after, resumed_after = snapshot(whole), snapshot(resumed)
    assert all(torch.equal(after[name], resumed_after[name]) for name in after)
    assert tuner.state_dict() == second.state_dict()


def test_close_leaves_the_model_as_peft_made_it() -> None:
    model = tiny_lora()
    before = traces(model)
    with SparseTuner(model, update_interval=2) as tuner:
        train(model, tiny_batches(4), tuner, 6)
        assert traces(model)["requires_grad"] == before["requires_grad"]
    assert traces(model) == before


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_after_an_exception_the_model_is_as_peft_made_it(where: str) -> None:
    model = tiny_lora()
    before = traces(model)
    batch = tiny_batches(1)[0]

    def fail(*_: Any) -> None:
        raise RuntimeError("as planned")

    with pytest.raises(RuntimeError, match="as planned"), SparseTuner(model, num_active_layers=1) as tuner:  # noqa: PT012
        tuner.begin_step()
        if where == "forward":
            handle = model.get_base_model().model.layers[2].mlp.act_fn.register_forward_hook(fail)
            try:
                model(**batch)
            finally:
                handle.remove()
        loss = model(**batch).loss
        if where == "backward":
            loss.register_hook(fail)
        loss.backward()
        fail()
    model.zero_grad()
    assert traces(model) == before


@pytest.mark.parametrize("probes", [None, tiny_batches(1)], ids=["recorded", "given"])
def test_hooks_go_with_the_tuner(probes: Any) -> None:
    model = tiny_lora()
    before = traces(model)
    tuner = SparseTuner(model, probe_batches=probes)
    assert traces(model)["hooks"] != before["hooks"]
    del tuner
    assert traces(model) == before


def test_after_closing_the_optimizer_can_be_freed() -> None:
    model = tiny_lora()
    tuner = SparseTuner(model, update_interval=1, optimizer_state="offload")
    optimizer = torch.optim.AdamW(trainable(model))
    tuner.begin_step()
    model(**tiny_batches(1)[0]).loss.backward()
    optimizer.step()
    tuner.end_step(optimizer)
    kept = weakref.ref(optimizer)
    tuner.close()
    tuner.close()
    del optimizer
    gc.collect()
    assert kept() is None
    assert tuner.state_dict()["num_steps"] == 1


@pytest.mark.parametrize(("options", "size"), [({}, 4), ({"probe_batch_size": 2}, 2), ({"preset": "authors"}, 16)])
def test_the_configured_number_of_examples_is_measured(options: dict[str, Any], size: int) -> None:
    seen: set[int] = set()

    def loss_function(model: Any, batch: Any) -> torch.Tensor:
        seen.add(len(batch["input_ids"]))
        return model(**batch).loss

    model = tiny_lora()
    loader = DataLoader(tiny_rows(32), batch_size=4)  # type: ignore[arg-type]
    with SparseTuner(model, probe_batches=loader, update_interval=1, loss_function=loss_function, **options) as tuner:
        train(model, tiny_batches(2), tuner, 2)
    assert seen == {size}


def test_a_loss_that_is_not_finite_skips_the_update_with_one_warning() -> None:
    model = tiny_lora()
    values = iter([float("nan"), 1.0, 2.0, float("inf"), 1.0, 1.0, *[1.0, 2.0, 3.0] * 9])
    tuner = SparseTuner(model, update_interval=1, mu=1.0, loss_function=lambda model, batch: torch.tensor(next(values)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        updates = []
        for batch in tiny_batches(4):
            tuner.begin_step()
            model(**batch).loss.backward()
            updates.append(tuner.end_step())
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == 1
    assert "skipped" in messages[0]
    assert [update.skipped is None for update in updates if update] == [False, False, True, True]
    assert updates[1] is not None
    assert updates[1].importance == (0.0,) * 4
    assert all(abs(score) < 10 for score in tuner.selector.state_dict()["importance"])


def test_without_probe_batches_the_last_training_batch_is_measured() -> None:
    model = tiny_lora()
    seen: list[Any] = []

    def loss_function(model: Any, batch: Any) -> torch.Tensor:
        seen.append(batch["input_ids"])
        return model(**batch).loss

    tuner = SparseTuner(model, update_interval=2, loss_function=loss_function)
    batches = tiny_batches(4)
    train(model, batches, tuner, 4)
    assert len(seen) == 6
    assert all(torch.equal(ids, batches[1]["input_ids"]) for ids in seen[:3])
    assert all(torch.equal(ids, batches[3]["input_ids"]) for ids in seen[3:])


def test_an_empty_probe_loader_warns_once_and_training_goes_on() -> None:
    model = tiny_lora()
    tuner = SparseTuner(model, update_interval=1, probe_batches=[])
    with pytest.warns(UserWarning, match="no batch to measure") as caught:
        losses = train(model, tiny_batches(3), tuner, 3)
    assert len(caught) == 1
    assert len(losses) == 3


def test_an_optimizer_that_lacks_layers_is_named() -> None:
    model = tiny_lora()
    tuner = SparseTuner(model, probe_batches=tiny_batches(1))
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if layer_of(n) == 1 and "lora" in n], lr=0.1)
    tuner.begin_step()
    with pytest.warns(UserWarning, match="lacks trainable parameters of 3 layers"):
        tuner.end_step(optimizer)
    tuner.begin_step()
    tuner.end_step(optimizer)


@pytest.mark.parametrize("num_layers", [2, 3, 4])
def test_few_layers_work(num_layers: int) -> None:
    model = tiny_lora(num_layers)
    tuner = SparseTuner(model, update_interval=1, mu=1e6)
    for batch in tiny_batches(10):
        assert len(tuner.begin_step()) == 1
        model(**batch).loss.backward()
        update = tuner.end_step()
        assert update is not None
        assert len(set(update.candidates)) == len(update.candidates) == min(3, {2: 2, 3: 3, 4: 6}[num_layers])


def test_history_tells_every_step_and_update(tmp_path: Path) -> None:
    model = tiny_lora()
    tuner = SparseTuner(model, update_interval=2, history=History(tmp_path / "run" / "h.jsonl"))
    train(model, tiny_batches(4), tuner, 5)
    run, *events = read_history(tmp_path / "run" / "h.jsonl")
    assert run["event"] == "run"
    assert run["layers"] == [layer.name for layer in tuner.layers]
    assert run["config"]["update_interval"] == 2
    assert [(event["event"], event["step"]) for event in events] == [
        ("step", 1), ("step", 2), ("importance", 2), ("step", 3), ("step", 4), ("importance", 4), ("step", 5),
    ]  # fmt: skip
    update = events[5]
    assert update["importance"] == tuner.selector.state_dict()["importance"]
    assert len(update["candidates"]) == len(update["losses"]) == len(update["rewards"]) == 3


def test_parameters_outside_the_layers_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    SparseTuner(tiny_lora(modules_to_save=["lm_head"]), fused=False)
    said = [record.getMessage() for record in caplog.records if record.name == "ist.step.announce"]
    assert len(said) == 2
    assert "2048 parameters in 1 tensors" in said[1]
    assert "lm_head" in said[1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "; 16 LoRA modules are fused (fused=False turns it off)."),
        ({"fused": False}, "."),
    ],
)
def test_the_lean_step_is_announced_in_one_line(
    options: dict[str, Any], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    SparseTuner(tiny_lora(), **options)
    (line,) = (record.getMessage() for record in caplog.records if record.name == "ist.step.announce")
    assert line == f"IST trains 1 of 4 layers a step, from base_model.model.model.layers.0{said}"


def test_the_share_of_the_importance_loop_is_that_of_the_steps_time() -> None:
    model = tiny_lora()
    tuner = SparseTuner(model, probe_batches=tiny_batches(1), update_interval=2)
    assert tuner.probe_share == 0
    train(model, tiny_batches(2), tuner, 1)
    assert tuner.probe_share == 0
    train(model, tiny_batches(2), tuner, 3)
    assert 0 < tuner.probe_share < 1


def test_a_selector_of_ones_own() -> None:
    model = tiny_lora()
    tuner = SparseTuner(model, selector=lambda config, num_layers: FixedSelector(config, num_layers, [3, 1]))
    before = snapshot(model)
    train(model, tiny_batches(2), tuner, 4)
    assert moved_layers(before, snapshot(model)) == {1, 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 0}, "format 0"),
        ({"layers": ["a", "b"]}, "of 2 layers with adapters, a in the place of base_model"),
        ({"selector_type": "RandomSelector"}, "began with RandomSelector and would resume with LearnedSelector"),
        ({"config": {"mu": 3.0}}, r"mu was 3.0 and is 10.0"),
        ({"config": {"optimizer_state": "reset"}}, r"optimizer_state was 'reset' and is 'keep'"),
        ({"config": {"fused": False}}, r"fused was False and is True"),
        ({"selector": {"importance": [0.0, 1.0], "num_updates": 1}}, "2 scores"),
        ({"selector": {"importance": [0.0, 1.0, float("nan"), 0.0], "num_updates": 1}}, "not finite"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(change: dict[str, Any], message: str) -> None:
    tuner = SparseTuner(tiny_lora())
    before = tuner.state_dict()
    with pytest.raises(ValueError, match=message):
        tuner.load_state_dict({**tuner.state_dict(), "num_steps": 7, **change})
    assert tuner.state_dict() == before


@pytest.mark.parametrize(("then", "now"), [({"recompute": "all"}, {}), ({}, {"optimizer_state": "offload"})])
def test_a_resume_may_change_what_trains_the_same(then: dict[str, Any], now: dict[str, Any]) -> None:
    state = SparseTuner(tiny_lora(), **then).state_dict()
    tuner = SparseTuner(tiny_lora(), **now)
    tuner.load_state_dict({**state, "num_steps": 7})
    assert tuner.num_steps == 7


def test_a_refusal_changes_nothing_though_batches_would_be_recorded() -> None:
    model = tiny_lora()
    model.gradient_checkpointing_enable()
    before = traces(model)
    with pytest.raises(ValueError, match="gradient checkpointing are both on") as error:
        SparseTuner(model, recompute="frozen")
    assert traces(model) == before
    assert error.tb  # It still holds the tuner that was being made.


ONES = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_active_layers": 5}, "num_active_layers=5 is more than the 4 layers"),
        ({"num_unsuppressed_layers": 9}, "num_unsuppressed_layers=9 is more than the 4 layers"),
        ({"nu": 5}, "Unknown option nu of SparseTuner: its options are model, config, "),
        ({"selector": "best"}, "selector='best' is unknown: choose one of 'ist', 'random', 'lisa'"),
        ({"probe_batches": 3}, "probe_batches is a int, which cannot be iterated"),
        ({"probe_batches": iter([])}, "one-way iterator"),
        ({"probe_batches": {"input_ids": [[1, 2]]}}, "probe_batches is a dict, which is no list of batches"),
        ({"probe_batches": "batches.pt"}, "probe_batches is a str, which is no list of batches"),
        ({"probe_batches": [{"input_ids": [[1, 2]]}]}, "has its input_ids as a list, and the model takes a tensor"),
        ({"probe_batches": [{"input_ids": ONES, "labels": ONES.numpy()}]}, "has its labels as a ndarray"),
        ({"probe_batches": tiny_rows(2)}, r"holds rows \(input_ids of shape \[12\]\), not batches"),
        ({"probe_batches": [(ONES, ONES)]}, "A probe batch is a tuple, not a mapping"),
        ({"config": ISTConfig(), "mu": 1.0}, "Both a config and the options mu"),
        ({"layers": "encoder.layers"}, "names no stack"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict[str, Any], message: str) -> None:
    model = tiny_lora()
    before = traces(model)
    with pytest.raises(ValueError, match=message) as error:
        SparseTuner(model, **arguments)
    assert "\n" not in str(error.value)
    assert traces(model) == before


def test_a_loss_of_ones_own_takes_batches_of_any_kind() -> None:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        return model(input_ids=torch.tensor(batch), labels=torch.tensor(batch)).loss

    model = tiny_lora()
    batches: Any = [[[1, 2, 3]]]
    with SparseTuner(model, probe_batches=batches, loss_function=loss, update_interval=1) as tuner:
        train(model, tiny_batches(1), tuner, 1)
        assert tuner.last_update is not None


class Chooser:
    """A selector that cannot be saved."""

    def choose(self, step: int) -> tuple[int, ...]:
        """Always the first layer."""
        return (0,)

    def learn(self, step: int, measure: Any) -> None:
        """Nothing."""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"history": "x"}, r"^history='x' is a str: give a History, as in history=ist\.History\('runs/mine/"),
        ({"history": Path("x")}, r"^history=.* is a .*Path: give a History"),
        ({"selector": lambda config, num_layers: None}, "returned nothing, which has no choose"),
        ({"selector": lambda config, num_layers: [0, 1]}, "returned a list, which has no choose"),
        ({"selector": lambda config, num_layers: Chooser()}, "returned a Chooser, which has no state_dict"),
    ],
    ids=["history: text", "history: path", "nothing", "list", "half a selector"],
)
def test_wrong_arguments_are_refused_before_anything_is_hooked(arguments: dict[str, Any], message: str) -> None:
    model = tiny_lora()
    before = traces(model)
    with pytest.raises(ValueError, match=message):
        SparseTuner(model, **arguments)
    assert traces(model) == before


def test_numpys_numbers_are_options_that_a_history_and_a_state_can_hold(tmp_path: Path) -> None:
    with SparseTuner(tiny_lora(), num_active_layers=numpy.int64(2), seed=numpy.int32(3)) as tuner:
        tuner.record_to(History(tmp_path / "history.jsonl"))
        json.dumps(tuner.state_dict())
    assert read_history(tmp_path / "history.jsonl")[0]["config"]["num_active_layers"] == 2
