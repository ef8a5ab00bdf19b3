"""`ist train`: from a recipe to a saved adapter, with the losses and answers before and after."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import transformers
from transformers import PrinterCallback
from trl import SFTTrainer

from ...experiments.evaluation import exact_answers
from ...experiments.evaluation.ends import model_ends
from ...integrations.finite import FiniteWeightsCallback
from ...integrations.trainer import IST
from ...runs.files import RESULT_FILE, write_json
from ...runs.history import HISTORY_FILE
from ...runtime.distributed import Ranks, current_ranks
from ..display import Display, TrainingProgress, peak_memory
from ..quiet import quiet_libraries
from .arguments import RunArguments, parse_arguments
from .clock import TrainingClock
from .course import RunCourse, check_method
from .data import TaskData, check_chats, load_data, report_cut_rows
from .ends import check_eos, settle_ends
from .focus import Look, focus_adapter, start_adapter
from .folder import find_checkpoint, run_folder
from .greedy import search_layers
from .interrupt import Interrupt, Stopped
from .methods import FOCUSED
from .metric import own_metric, user_metric
from .model import load_model
from .opening import Opening
from .result import Trained, describe_run, describe_steps, ist_callback, log_entries
from .shares import marks_of
from .validation import TokenWeightedTrainer

__all__ = ["train"]


def train(arguments: Sequence[str]) -> dict[str, Any]:
    """Fine-tune a causal language model as flags and recipe say, save the adapter and say what it brought.

    Returns:
        The results of the run, as in `ist_result.json`.

    Raises:
        ValueError: a flag, a recipe, the data or the model does not fit.
    """
    quiet_libraries()
    run = parse_arguments(arguments)
    check_devices(run)
    function = user_metric(run)
    ranks = current_ranks()
    display = Display(quiet=not ranks.is_main)
    asked_for = run.training.output_dir
    with run_folder(run, ranks) as folder:
        display.placed(folder, asked_for)
        checkpoint = find_checkpoint(run.training.resume_from_checkpoint, folder)
        check_method(checkpoint, run.ist.method)
        data = load_data(run)
        model, tokenizer, peft_config = load_seeded(run, data)
        focus: dict[str, Any] = {}
        batches: list[Any] | None = None
        if run.ist.method in FOCUSED:
            look = Look(run, model, tokenizer, data.train, ranks)
            peft_config, focus["focus"], batches = focus_adapter(
                look, peft_config, folder, checkpoint is not None, display
            )
        trainer = make_trainer(run, data, (model, tokenizer, peft_config))
        trainer.add_callback(RunCourse.of(run, trainer, checkpoint))
        start_adapter(trainer.model, batches, run, display)
        display.begin(run, trainer)
        metric = own_metric(run, function, data.own_rows, tokenizer, display)

        def measure(when: str) -> dict[str, float]:
            return judge(trainer, data, display, when, ranks) | metric.measure(trainer, display, when, ranks)

        opening = Opening(trainer, lambda: measure("before"))
        search = search_first(run, trainer, folder, checkpoint is not None, display)
        trained = run_training(run, trainer, folder, checkpoint, display)
        trainer.save_model(str(folder))  # first: an answer may end the measurement
        after = measure("after")
        result = {
            **describe_run(run, arguments, ranks),
            **dataclasses.asdict(trained),
            "before": opening.results,
            "after": after,
            **metric.record(),
            **focus,
            **search,
            **describe_steps(trainer),
        }
        if ranks.is_main:
            write_json(folder / RESULT_FILE, result)
            display.end(result, folder, draw_pictures(folder))
        if ranks.size > 1:
            ranks.wait()
            torch.distributed.destroy_process_group()
    return result


def check_devices(run: RunArguments) -> None:
    """Raise ValueError where one process would train on several GPUs, which `IST` does not take part in."""
    if run.training.n_gpu > 1 and (run.selector or run.ist.method == "greedy"):
        raise ValueError(
            f"{run.training.n_gpu} GPUs are seen by one process: start one for each with `accelerate launch -m ist "
            "train …` or `torchrun`, or set CUDA_VISIBLE_DEVICES=0."
        )


def search_first(
    run: RunArguments, trainer: SFTTrainer, folder: Path, resumed: bool, display: Display
) -> dict[str, Any]:
    """With `--method greedy` find the layers and have them trained; what the result says of it."""
    if run.ist.method != "greedy":
        return {}
    search = search_layers(run, trainer, folder, resumed, display)
    trainer.add_callback(make_callback(run, "fixed:" + ",".join(map(str, search["layers"]))))
    return {"search": {name: search[name] for name in ("layers", "num_trainings", "num_steps", "seconds")}}


def run_training(
    run: RunArguments, trainer: SFTTrainer, folder: Path, checkpoint: Path | None, display: Display
) -> Trained:
    """Train, from the checkpoint on where there is one.

    Raises:
        Stopped: a signal ended the training, and what was trained is saved.
    """
    progress = TrainingProgress(display, ist_callback(trainer))
    clock = TrainingClock(run.ist.max_train_seconds)
    interrupt = Interrupt()
    for callback in (progress, clock, interrupt):
        trainer.add_callback(callback)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        with interrupt, stopped_at_not_finite(trainer):
            output = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    finally:
        progress.stop()
    if number := interrupt.agreed():
        step = output.global_step
        if not (folder / f"checkpoint-{step}").is_dir():  # It came after the last step.
            trainer.save_model(str(folder))
            raise Stopped(f"stopped after the last step, {step}; the adapter is in {folder}", number)
        raise Stopped(
            f"stopped after step {step}; the same command with --resume_from_checkpoint last continues from "
            f"{folder}/checkpoint-{step}",
            number,
        )
    return Trained(
        num_steps=output.global_step,
        train_loss=output.training_loss,
        train_seconds=time.perf_counter() - start,
        step_seconds=clock.seconds,
        peak_memory_bytes=peak_memory(),
        log=log_entries(trainer),
    )


def stopped_at_not_finite(trainer: SFTTrainer) -> AbstractContextManager[None]:
    """Around a training: it stops where its weights are no longer finite. `IST` does so by itself."""
    if ist_callback(trainer) is not None:
        return nullcontext()
    watch = FiniteWeightsCallback()
    trainer.add_callback(watch)
    return watch.watching(trainer)


def load_seeded(run: RunArguments, data: TaskData) -> tuple[Any, Any, Any]:
    """The model, its tokenizer and the configuration of a new adapter, with what is drawn at random seeded.

    Raises:
        ValueError: no model is named, or it does not go with the flags or the data.
    """
    transformers.set_seed(run.training.seed)
    loaded = load_model(run)
    check_chats(data.train, loaded[1], run)
    check_eos(data.train, loaded[1], run)
    return loaded


def make_trainer(run: RunArguments, data: TaskData, loaded: tuple[Any, Any, Any] | None = None) -> SFTTrainer:
    """The model with its adapter, in TRL's trainer, with IST as a callback.

    Args:
        run: what the flags say.
        data: what it trains on.
        loaded: what `load_seeded` gave; it is called here if None.

    Raises:
        ValueError: no row is left to train on, or as `load_seeded`.
    """
    model, tokenizer, peft_config = loaded or load_seeded(run, data)
    run.training.disable_tqdm = True
    own_ends = model_ends(model)
    trainer = TokenWeightedTrainer(
        model=model,
        args=run.training,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[make_callback(run, run.selector)] if run.selector else [],  # type: ignore[arg-type]
    )
    trainer.remove_callback(PrinterCallback)
    settle_ends(data.train, own_ends, trainer, run)
    packs = run.training.packing
    if not packs:
        report_cut_rows(data.train, trainer.train_dataset, "training", run.training.max_length)
    if data.evaluation is not None and not (packs if run.training.eval_packing is None else run.training.eval_packing):
        report_cut_rows(data.evaluation, trainer.eval_dataset, "validation", run.training.max_length)
    return trainer


def make_callback(run: RunArguments, selector: str) -> IST:
    """The callback with the run's hyperparameters."""
    return IST(run.ist_config, selector=selector, layers=run.ist.layers)


def judge(trainer: SFTTrainer, data: TaskData, display: Display, when: str, ranks: Ranks) -> dict[str, float]:
    """The validation loss and, for word problems, the exact match; the same on every rank."""
    figures: dict[str, float] = {}

    def correct(problems: list[Any]) -> list[float]:
        return [answer.correct for answer in exact_answers(trainer.model, trainer.processing_class, problems)]

    if data.evaluation is not None:
        with display.waiting(f"validation loss {when} training"):
            figures["loss"] = trainer.evaluate()["eval_loss"]
    if data.problems:
        with display.waiting(f"{len(data.problems)} held-out problems {when} training"):
            figures["accuracy"] = fmean(marks_of(trainer.model, data.problems, ranks, correct))
    display.judged(when, figures)
    return figures


def draw_pictures(folder: Path) -> Path | None:
    """The pictures of the run, where matplotlib is there and layers were chosen."""
    if not (folder / HISTORY_FILE).exists():
        return None
    try:
        from ...experiments.report import draw_report
    except ImportError:
        return None
    return draw_report(folder)
