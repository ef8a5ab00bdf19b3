"""AdaLoRA under IST: its schedule runs to the end over frozen layers, and its own loss stays out of everything."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from ist import IST, SparseTuner
from ist.adapters.adalora import RankAllocation, find_adalora, ranks_left, without_orthogonality_loss
from ist.adapters.layers import discover_layers
from ist.probing.suppression import candidate_losses
from tests.helpers.tiny import layer_of, snapshot, tiny_batches, tiny_llama, tiny_lora, tiny_rows, trainable

NUM_STEPS, NUM_MODULES, TARGET_RANK = 16, 8, 2
SCHEDULE = {"init_r": 4, "target_r": TARGET_RANK, "tinit": 4, "tfinal": 4, "deltaT": 2, "total_step": NUM_STEPS}


def make_model(**options: Any) -> Any:
    config = AdaLoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **{**SCHEDULE, **options})
    torch.manual_seed(3)
    model = get_peft_model(tiny_llama(), config)
    assert isinstance(model, PeftModel)
    return model


def allocator_of(model: PeftModel) -> Any:
    return model.base_model.rankallocator


def adam(model: PeftModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.1)


def singular_values(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_E" in name}


def num_ranks(model: PeftModel) -> int:
    return int(sum((values != 0).sum() for values in singular_values(model).values()))


def frozen_part(values: dict[str, Tensor], active: tuple[int, ...]) -> dict[str, Tensor]:
    return {name: value for name, value in values.items() if layer_of(name) not in active}


class Record(TrainerCallback):
    """Ranks that are left after each step."""

    def __init__(self) -> None:
        self.ranks: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.ranks.append(num_ranks(model))


def train(folder: Path, model: PeftModel, *callbacks: TrainerCallback, resume: str | None = None) -> None:
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=NUM_STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=2,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(model=model, args=args, train_dataset=tiny_rows(), callbacks=list(callbacks)).train(  # pyright: ignore[reportArgumentType]
        resume_from_checkpoint=resume
    )


def test_the_budget_is_reached_while_layers_are_frozen(tmp_path: Path) -> None:
    """All 32 singular values at the start, 16 in the end, and once reached it is kept."""
    model, record = make_model(), Record()
    callback = IST(num_active_layers=2, update_interval=3)
    train(tmp_path, model, callback, record)
    assert len(record.ranks) == NUM_STEPS
    assert record.ranks[-1] == TARGET_RANK * NUM_MODULES
    assert len(set(record.ranks[-SCHEDULE["tfinal"] :])) == 1
    assert len(singular_values(model)) == NUM_MODULES
    assert callback.tuner is not None
    assert callback.tuner.last_update is not None
    assert callback.tuner.last_update.skipped is None


@pytest.mark.parametrize("step", [2, 8, 12, 14])
def test_a_run_resumes_at_every_stage_of_the_schedule(tmp_path: Path, step: int) -> None:
    """Before it allocates, while it does, at its last allocation and after: the budget is reached all the same."""
    model, resumed = make_model(), make_model()
    train(tmp_path, model, IST(num_active_layers=2))
    train(tmp_path, resumed, IST(num_active_layers=2), resume=str(tmp_path / f"checkpoint-{step}"))
    assert num_ranks(resumed) == num_ranks(model) == TARGET_RANK * NUM_MODULES
    if step == 14:
        tuners = find_adalora(model), find_adalora(resumed)
        assert all(tuners)
        assert ranks_left(tuners[0]) == ranks_left(tuners[1])  # type: ignore[arg-type]


def test_the_same_model_resumes_after_a_training(tmp_path: Path) -> None:
    """As in a notebook."""
    model = make_model()
    train(tmp_path, model, IST(num_active_layers=2))
    train(tmp_path, model, IST(num_active_layers=2), resume=str(tmp_path / "checkpoint-8"))
    assert num_ranks(model) == TARGET_RANK * NUM_MODULES


def test_a_step_whose_gradients_overflowed_is_not_measured() -> None:
    """The Trainer calls its callbacks for a step that fp16's scaler skipped, too."""
    model = make_model()
    with SparseTuner(model, num_active_layers=2, probe_batches=tiny_batches(1)) as tuner:
        for overflow in (True, False):
            tuner.begin_step()
            model(**tiny_batches(1)[0]).loss.backward()
            if overflow:
                next(p for p in trainable(model) if p.grad is not None).grad.fill_(torch.inf)  # type: ignore[union-attr]
            tuner.after_optimizer_step()
            model.zero_grad()
            tuner.end_step()
    averages = allocator_of(model).exp_avg_ipt
    assert all(value.isfinite().all() for value in averages.values())
    assert any((value != 0).any() for value in averages.values())


def test_a_run_that_never_allocated_saves_all_its_ranks(tmp_path: Path) -> None:
    model = make_model(total_step=100, tinit=50)
    with SparseTuner(model, probe_batches=tiny_batches(1)) as tuner:
        tuner.begin_step()
        model(**tiny_batches(1)[0]).loss.backward()
        tuner.after_optimizer_step()
        tuner.end_step()
    assert model.peft_config["default"].rank_pattern is None  # type: ignore[attr-defined]


def test_with_all_layers_active_it_is_pefts_own_loop() -> None:
    """Nothing is frozen then, so every weight equals that of a loop which calls peft alone, to the bit."""
    ours, theirs = make_model(), make_model()
    optimizers = adam(ours), adam(theirs)
    batches = tiny_batches(NUM_STEPS)
    with SparseTuner(ours, num_active_layers=1.0, update_interval=100, probe_batches=batches) as tuner:
        for step, batch in enumerate(batches):
            tuner.begin_step()
            for model, optimizer in zip((ours, theirs), optimizers, strict=True):
                model(**batch).loss.backward()
                optimizer.step()
            tuner.after_optimizer_step()
            theirs.base_model.update_and_allocate(step)
            for optimizer in optimizers:
                optimizer.zero_grad()
            tuner.end_step()
    assert num_ranks(ours) == TARGET_RANK * NUM_MODULES
    expected = snapshot(theirs)
    assert all(torch.equal(value, expected[name]) for name, value in snapshot(ours).items())


def test_a_frozen_layer_keeps_its_sensitivities_and_its_weights() -> None:
    """But for singular values that the budget takes: they become 0."""
    model = make_model()
    optimizer, allocator = adam(model), allocator_of(model)
    averages: dict[str, Tensor] = {}
    trained: set[int] = set()
    with SparseTuner(model, num_active_layers=1, update_interval=3, probe_batches=tiny_batches(2, seed=5)) as tuner:
        for batch in tiny_batches(10):
            active, before = tuner.begin_step(), snapshot(model)
            model(**batch).loss.backward()
            assert all(p.grad is None for layer in tuner.layers if layer.index not in active for p in layer.parameters)
            optimizer.step()
            tuner.after_optimizer_step()
            optimizer.zero_grad()
            tuner.end_step()
            after = frozen_part(snapshot(model), active)
            for name, value in after.items():
                taken = (value == 0) & (before[name] != 0)
                assert torch.equal(value, before[name].masked_fill(taken, 0) if "lora_E" in name else before[name])
            trained |= set(active)
            measured: dict[str, Tensor] = {name: value.clone() for name, value in allocator.exp_avg_ipt.items()}
            changed = {layer_of(n) for n, v in measured.items() if not torch.equal(v, averages.get(n, 0 * v))}
            assert changed == set(active)
            averages = measured
    assert len(trained) > 1
    never = set(range(4)) - trained
    assert all((value == 0).all() for name, value in averages.items() if layer_of(name) in never)


def test_the_orthogonality_loss_gives_frozen_layers_no_gradient_and_clipping_does_not_see_them() -> None:
    model = make_model(orth_reg_weight=100.0)
    with SparseTuner(model, num_active_layers=1, probe_batches=tiny_batches(1)) as tuner:
        (active,) = tuner.begin_step()
        model(**tiny_batches(1)[0]).loss.backward()
        with_gradient = {layer_of(name) for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {active}


def test_the_orthogonality_loss_is_no_part_of_what_is_measured() -> None:
    model, batch = make_model(orth_reg_weight=100.0), tiny_batches(1)[0]
    layers = discover_layers(model)
    model.eval()
    with torch.no_grad():
        whole = model(**batch).loss
        task = model.base_model.model(**batch).loss
    assert whole > task + 1
    losses = candidate_losses(model, layers, [(0, 1, 2, 3)], batch, 0.25)
    assert losses.tolist() == [task.double().item()]
    with torch.no_grad():
        assert torch.equal(model(**batch).loss, whole)


def test_without_orthogonality_loss_leaves_no_trace() -> None:
    model = make_model()
    tuner = find_adalora(model)
    assert tuner is not None
    before = dict(vars(tuner))
    with pytest.raises(KeyError), without_orthogonality_loss(model):
        raise KeyError
    assert vars(tuner) == before
    wrapped = tuner.forward
    tuner.forward = wrapped  # As a library does that wraps the forward of an instance.
    with without_orthogonality_loss(model):
        assert tuner.forward != wrapped
    assert vars(tuner)["forward"] == wrapped


def test_other_models_have_nothing_to_leave_out() -> None:
    model, batch = tiny_lora(), tiny_batches(1)[0]
    assert find_adalora(model) is None
    with torch.no_grad(), without_orthogonality_loss(model):
        inside = model(**batch).loss
    assert torch.equal(inside, model(**batch).loss)


@pytest.mark.parametrize("ours_first", [True, False])
def test_a_loop_that_allocates_itself_does_so_once_a_step(ours_first: bool) -> None:
    """Users of AdaLoRA call peft's method in a callback of their own."""
    models = [make_model(), make_model()]
    for model, by_hand in zip(models, (True, False), strict=True):
        optimizer = adam(model)
        with SparseTuner(model, num_active_layers=2, probe_batches=tiny_batches(1)) as tuner:
            for step, batch in enumerate(tiny_batches(6)):
                tuner.begin_step()
                model(**batch).loss.backward()
                optimizer.step()
                if ours_first:
                    tuner.after_optimizer_step()
                if by_hand:
                    model.base_model.update_and_allocate(step)
                tuner.after_optimizer_step()
                optimizer.zero_grad()
                tuner.end_step()
    expected = allocator_of(models[1]).exp_avg_ipt
    assert all(torch.equal(value, expected[name]) for name, value in allocator_of(models[0]).exp_avg_ipt.items())
    assert all(torch.equal(value, snapshot(models[1])[name]) for name, value in snapshot(models[0]).items())


def test_a_loop_that_never_allocates_is_told_once() -> None:
    model = make_model()
    with SparseTuner(model, probe_batches=tiny_batches(1)) as tuner:
        tuner.begin_step()
        with pytest.warns(UserWarning, match=r"call tuner\.after_optimizer_step\(\) after optimizer\.step\(\)"):
            tuner.end_step()
        tuner.begin_step()
        tuner.end_step()  # Warnings are errors in these tests.


@pytest.mark.parametrize(("total_step", "told"), [(20, True), (16, False), (14, False)])
def test_a_training_shorter_than_the_schedule_is_told(tmp_path: Path, total_step: int, told: bool) -> None:
    model = make_model(total_step=total_step)
    if told:
        with pytest.warns(UserWarning, match=r"schedule is of 20 steps and this training of 16.*total_step=16"):
            train(tmp_path, model, IST())
    else:
        train(tmp_path, model, IST())


def test_closing_leaves_the_tuner_as_peft_made_it() -> None:
    model = make_model()
    before = dict(vars(model.base_model)), dict(vars(allocator_of(model)))
    with SparseTuner(model, probe_batches=tiny_batches(1)):
        assert "update_and_allocate" in vars(model.base_model)
    assert (dict(vars(model.base_model)), dict(vars(allocator_of(model)))) == before


def test_an_earlier_tuner_that_was_not_closed_does_no_harm() -> None:
    """After an exception, say: the next one takes over, and closing the first does not undo the second."""
    model = make_model()
    adalora = find_adalora(model)
    assert adalora is not None
    first, second = RankAllocation(adalora), RankAllocation(adalora)
    first.close()
    assert adalora.update_and_allocate.__self__ is second
    second.close()
    assert "update_and_allocate" not in vars(adalora)


def test_what_is_saved_after_the_allocation_is_what_was_trained(tmp_path: Path) -> None:
    """All ranks are saved, the switched-off ones as zeros, and loaded without this library."""
    # Without labels: peft cannot compute a loss with an AdaLoRA adapter that was loaded for inference.
    model, batch = make_model(), {"input_ids": tiny_batches(1)[0]["input_ids"]}
    train(tmp_path, model, IST(num_active_layers=2))
    model.eval()
    with torch.no_grad():
        expected = model(**batch).logits
        copy.deepcopy(model).save_pretrained(str(tmp_path / "adapter"))
        loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "adapter").eval()
        actual = loaded(**batch).logits
    assert num_ranks(loaded) == TARGET_RANK * NUM_MODULES
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
