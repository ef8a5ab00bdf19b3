"""A training of which a GradScaler skips every step says so, and one whose weights are NaN from the start too."""

from __future__ import annotations

import itertools
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from ist import IST, SparseTuner
from ist.integrations.finite import FiniteWeightsCallback
from ist.runs.checkpoints import MANIFEST_FILE, write_manifest
from ist.step.finite import BrokenStartError, NotFiniteError
from ist.step.skipped import MOST_SKIPPED, SkippedError
from tests.helpers.tiny import cycle, tiny_batches, tiny_lora, trainable
from tests.helpers.trainers import make_trainer

NAN = float("nan")
SKIPPED = rf"The last {MOST_SKIPPED} steps ended without an update"


def scaler(skips: bool = True) -> Any:
    """Its scale makes every gradient infinite, for as long as it takes."""
    scale, backoff = (3e38, 0.9999) if skips else (2.0, 0.5)
    return torch.amp.GradScaler("cpu", scale, backoff_factor=backoff)  # pyright: ignore[reportPrivateImportUsage]


def train(tuner: SparseTuner, steps: int, way: str, skips: bool = True, micro: int = 1, to_none: bool = True) -> None:
    """Steps with a GradScaler, in one of the ways that loops are written in."""
    optimizer = torch.optim.SGD(trainable(tuner.model), lr=1e-3)
    scale = scaler(skips)
    for number, batch in enumerate(itertools.islice(cycle(tiny_batches(2, size=1)), steps * micro), 1):
        if way == "begin_step":
            tuner.begin_step()
            backward(tuner, scale, batch)
            update(scale, optimizer, number % micro == 0, to_none)
            tuner.end_step(optimizer)
        else:
            with tuner.step(optimizer):
                backward(tuner, scale, batch)
                update(scale, optimizer, number % micro == 0, to_none)


def backward(tuner: SparseTuner, scale: Any, batch: Any) -> None:
    scale.scale(tuner.model(**batch).loss).backward()


def update(scale: Any, optimizer: Any, whole: bool, to_none: bool) -> None:
    if whole:
        scale.step(optimizer)
        scale.update()
        optimizer.zero_grad(set_to_none=to_none)


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("way", ["begin_step", "step"])
def test_a_loop_whose_steps_are_all_skipped_is_told_once(way: str, micro: int) -> None:
    tuner = SparseTuner(tiny_lora(2), selector="random", num_active_layers=1)
    train(tuner, MOST_SKIPPED, way, micro=micro)
    with pytest.warns(UserWarning, match=SKIPPED) as said:
        train(tuner, MOST_SKIPPED, way, micro=micro)
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    assert tuner.num_steps == 0


def test_a_fused_optimizer_that_skips_is_believed_whatever_its_gradients_are() -> None:
    tuner = SparseTuner(tiny_lora(2), selector="all")
    optimizer, scale = torch.optim.AdamW(trainable(tuner.model), fused=True), scaler()

    def loop() -> None:
        for batch in cycle(tiny_batches(2, size=1)):
            with tuner.step(optimizer):
                optimizer.zero_grad()
                backward(tuner, scale, batch)
                scale.step(optimizer)
                scale.update()

    with pytest.raises(SkippedError, match=rf"in the last {MOST_SKIPPED} steps"):
        loop()


def test_gradients_that_are_set_to_zero_count_too() -> None:
    tuner = SparseTuner(tiny_lora(2), selector="all")
    with pytest.warns(UserWarning, match=SKIPPED):
        train(tuner, 2 * MOST_SKIPPED + 2, "step", to_none=False)


@pytest.mark.parametrize("way", ["begin_step", "step"])
def test_accumulation_and_a_few_skipped_steps_are_nothing_to_tell(way: str) -> None:
    tuner = SparseTuner(tiny_lora(2), selector="all")
    train(tuner, 2, way, skips=False, micro=2 * MOST_SKIPPED)
    assert tuner.num_steps == 2
    for _ in range(3):
        train(tuner, MOST_SKIPPED // 2, way)
        train(tuner, 1, way, skips=False)
    assert tuner.num_steps == 5


def test_accelerates_optimizer_says_so_and_the_loop_stops() -> None:
    model = tiny_lora(2)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler()
    optimizer = accelerator.prepare(torch.optim.SGD(trainable(model), lr=1e-3))
    tuner = SparseTuner(model, selector="all")
    done = []

    def loop() -> None:
        for batch in cycle(tiny_batches(2)):
            with tuner.step(optimizer):
                accelerator.backward(model(**batch).loss)
                optimizer.step()
                optimizer.zero_grad()
            done.append(batch)

    with pytest.raises(NotFiniteError, match=rf"NaN or infinite in the last {MOST_SKIPPED} steps, which the GradScal"):
        loop()
    assert len(done) == MOST_SKIPPED


CALLBACKS = {
    "IST": lambda: IST(update_interval=20),
    "focused": lambda: IST(selector="all"),
    "none": FiniteWeightsCallback,
}


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("name", CALLBACKS)
def test_a_trainer_stops(name: str, optim: str, tmp_path: Path) -> None:
    """A GradScaler leaves skipping to optimizers that are fused, as transformers' default is."""
    model = tiny_lora()
    for parameter in trainable(model):
        parameter.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
    trainer = make_trainer(
        tmp_path, CALLBACKS[name](), model=model, save_strategy="no", max_steps=2 * MOST_SKIPPED, optim=optim
    )
    trainer.accelerator.scaler = scaler()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        with pytest.raises(SkippedError, match=rf"NaN or infinite in the last {MOST_SKIPPED} steps") as caught:
            trainer.train()
    assert "They were not saved" not in str(caught.value), "the weights are good"
    assert trainer.state.global_step == MOST_SKIPPED


def test_a_trainer_does_not_stop_where_steps_are_made_between(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, FiniteWeightsCallback(), save_strategy="no", max_steps=MOST_SKIPPED + 5)
    trainer.accelerator.scaler = scaler(skips=False)
    trainer.train()
    assert trainer.state.global_step == MOST_SKIPPED + 5


def with_nan(model: Any) -> str:
    """The name of a trained tensor, of which one number is NaN now."""
    name, parameter = [(n, p) for n, p in model.named_parameters() if p.requires_grad][5]
    with torch.no_grad():
        parameter.view(-1)[3] = NAN
    return name


@pytest.mark.parametrize("selector", ["ist", "all"])
def test_a_loop_with_a_weight_that_is_nan_from_the_start_does_not_begin(selector: str) -> None:
    model = tiny_lora()
    name = with_nan(model)
    tuner = SparseTuner(model, selector=selector, probe_batches=tiny_batches(1))
    with pytest.raises(NotFiniteError) as caught, tuner.step(torch.optim.SGD(trainable(model), lr=1e-3)):
        raise AssertionError
    assert str(caught.value).startswith(
        f"The trained weights are NaN or infinite from the start, before step 1 (1 of 32 tensors, {name} first): load "
    )
    assert tuner.active_layers is None


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_trainer_with_a_weight_that_is_nan_from_the_start_does_not_begin(name: str, tmp_path: Path) -> None:
    model = tiny_lora()
    tensor = with_nan(model)
    trainer = make_trainer(tmp_path, CALLBACKS[name](), model=model)
    with pytest.raises(NotFiniteError) as caught:
        trainer.train()
    assert f"from the start, before step 1 (1 of 32 tensors, {tensor} first)" in str(caught.value)
    assert trainer.state.global_step == 0
    assert "They were not saved" not in str(caught.value)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_run_that_resumes_with_a_weight_that_is_nan_says_that_the_checkpoint_holds_it(
    name: str, tmp_path: Path
) -> None:
    make_trainer(tmp_path, CALLBACKS[name]()).train()
    checkpoint = tmp_path / "checkpoint-3"
    file = checkpoint / "adapter_model.safetensors"
    weights = load_file(file)
    tensor = sorted(weights)[5]
    weights[tensor].view(-1)[3] = NAN
    save_file(weights, file, metadata={"format": "pt"})
    if (checkpoint / MANIFEST_FILE).exists():
        write_manifest(checkpoint)
    trainer = make_trainer(tmp_path, CALLBACKS[name]())
    with pytest.raises(BrokenStartError) as caught:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    layer = re.sub(r"\.weight$", ".default.weight", tensor)
    assert str(caught.value) == (
        f"The trained weights are NaN or infinite where this run resumes, before step 4 (1 of 32 tensors, {layer} "
        "first): the checkpoint that it resumes from holds them. Resume from an earlier one, or train anew."
    )
    assert trainer.state.global_step == 3


def test_a_loop_that_resumes_with_a_weight_that_is_nan() -> None:
    model = tiny_lora()
    tuner = SparseTuner(model, selector="all")
    tuner.num_steps = 7
    with_nan(model)
    with pytest.raises(BrokenStartError, match=r"where this run resumes, before step 8 \(1 of 32 tensors, "):
        tuner.check_weights()
