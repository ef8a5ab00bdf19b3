"""`ist train`: from a recipe to a saved adapter, with the losses and answers before and after."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import datasets
import torch
import transformers
from transformers import PrinterCallback
from trl import SFTTrainer

from ...experiments.evaluation import exact_answers
from ...integrations.trainer import IST
from ...runs.files import RESULT_FILE, write_json
from ...runs.history import HISTORY_FILE
from ...runtime.distributed import Ranks, current_ranks
from ...runtime.sharding import is_sharded
from ..display import Display, TrainingProgress, device_name, peak_memory
from .arguments import RunArguments, parse_arguments
from .clock import TrainingClock
from .data import TaskData, load_data, report_cut_rows
from .focus import Look, focus_adapter
from .folder import find_checkpoint, run_folder
from .greedy import search_layers
from .interrupt import Interrupt, Stopped
from .methods import FOCUSED
from .model import load_model
from .numbers import all_finite
from .opening import Opening
from .validation import TokenWeightedTrainer

__all__ = ["train"]

LOGGED = ("step", "step_seconds", "loss", "eval_loss", "learning_rate", "grad_norm")
"""What the result keeps of the Trainer's log."""


@dataclass(frozen=True)
class Trained:
    """What a training took and left."""

    num_steps: int
    train_loss: float
    train_seconds: float
    step_seconds: float
    peak_memory_bytes: int
    log: list[dict[str, Any]]


def train(arguments: Sequence[str]) -> dict[str, Any]:
    """Fine-tune a causal language model as flags and recipe say, save the adapter and say what it brought.

    Returns:
        The figures of the run, as in `ist_result.json`.

    Raises:
        ValueError: a flag, a recipe, the data or the model does not fit.
    """
    quiet_libraries()
    run = parse_arguments(arguments)
    check_devices(run)
    ranks = current_ranks()
    display = Display(quiet=not ranks.is_main)
    asked_for = run.training.output_dir
    with run_folder(run, ranks) as folder:
        display.placed(folder, asked_for)
        checkpoint = find_checkpoint(run.training.resume_from_checkpoint, folder)
        data = load_data(run)
        model, tokenizer, peft_config = load_seeded(run)
        focus: dict[str, Any] = {}
        if run.ist.method in FOCUSED:
            look = Look(run, model, tokenizer, data.train, ranks)
            peft_config, focus["focus"] = focus_adapter(look, peft_config, folder, checkpoint is not None, display)
        trainer = make_trainer(run, data, (model, tokenizer, peft_config))
        display.begin(run, trainer)
        opening = Opening(trainer, lambda: judge(trainer, data, display, "before", ranks))
        search = search_first(run, trainer, folder, checkpoint is not None, display)
        trained = run_training(run, trainer, folder, checkpoint, display)
        check_weights(trainer, trained.num_steps, ranks)
        after = judge(trainer, data, display, "after", ranks)
        trainer.save_model(str(folder))
        result = {
            **describe_run(run, arguments, ranks),
            **dataclasses.asdict(trained),
            "before": opening.figures,
            "after": after,
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
        Stopped: a signal ended the training, and a checkpoint was written.
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
        with interrupt:
            output = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    finally:
        progress.stop()
    if interrupt.number is not None:
        raise Stopped(output.global_step, folder, interrupt.number)
    return Trained(
        num_steps=output.global_step,
        train_loss=output.training_loss,
        train_seconds=time.perf_counter() - start,
        step_seconds=clock.seconds,
        peak_memory_bytes=peak_memory(),
        log=log_entries(trainer),
    )


def describe_run(run: RunArguments, arguments: Sequence[str], ranks: Ranks) -> dict[str, Any]:
    """What the result says of how the run was made."""
    return {
        "recipe": run.recipe,
        "arguments": list(arguments),
        "model": run.model.model_name_or_path,
        "method": run.ist.method,
        "adapter": run.ist.adapter,
        "device": device_name(),
        "num_processes": ranks.size,
        "versions": {name: version(name) for name in ("ist-peft", "torch", "transformers", "peft", "trl")},
    }


def describe_steps(trainer: SFTTrainer) -> dict[str, Any]:
    """What the result says of how the steps were computed; nothing where the Trainer trained alone."""
    callback = ist_callback(trainer)
    if not callback or not callback.tuner:
        return {}
    tuner = callback.tuner
    return {
        "fused": {"modules": tuner.num_fused, "others": dict(tuner.not_fused)},
        "probe_share": tuner.probe_share,
    }


def ist_callback(trainer: SFTTrainer) -> IST | None:
    """The callback that chooses layers, if there is one."""
    return next((callback for callback in trainer.callback_handler.callbacks if isinstance(callback, IST)), None)


def load_seeded(run: RunArguments) -> tuple[Any, Any, Any]:
    """The model, its tokenizer and the configuration of a new adapter, with what is drawn at random seeded.

    Raises:
        ValueError: no model is named, or it does not go with the flags.
    """
    transformers.set_seed(run.training.seed)
    return load_model(run)


def make_trainer(run: RunArguments, data: TaskData, loaded: tuple[Any, Any, Any] | None = None) -> SFTTrainer:
    """The model with its adapter, in TRL's trainer, with IST as a callback.

    Args:
        run: what the flags say.
        data: what it trains on.
        loaded: what `load_seeded` gave; it is called here if None.

    Raises:
        ValueError: no row is left to train on, or as `load_seeded`.
    """
    model, tokenizer, peft_config = loaded or load_seeded(run)
    run.training.disable_tqdm = True
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
    if data.evaluation is not None:
        with display.waiting(f"validation loss {when} training"):
            figures["loss"] = trainer.evaluate()["eval_loss"]
    if data.problems:
        with display.waiting(f"{len(data.problems)} held-out problems {when} training"):
            # Each rank answers its share, unless it holds but a part of the weights: then all answer all together.
            shared = not is_sharded(cast("Any", trainer.model))
            own = data.problems[ranks.rank :: ranks.size] if shared else data.problems
            answers = exact_answers(trainer.model, trainer.processing_class, own) if own else []
            correct = ranks.mean([float(sum(answer.correct for answer in answers))])[0]
        figures["accuracy"] = correct * (ranks.size if shared else 1) / len(data.problems)
    display.judged(when, figures)
    return figures


def check_weights(trainer: SFTTrainer, step: int, ranks: Ranks) -> None:
    """Raise ValueError, on every rank, where the trained weights are no longer finite."""
    finite = all_finite(p for p in cast("Any", trainer.model).parameters() if p.requires_grad)
    if ranks.mean([float(not finite)])[0] > 0:
        raise ValueError(
            f"The weights are not finite after {step} steps, and no adapter is saved: give a lower --learning_rate, "
            "more --warmup_steps or a lower --max_grad_norm."
        )


def log_entries(trainer: SFTTrainer) -> list[dict[str, Any]]:
    """The Trainer's log of training and validation losses, from the first step on, resumes included."""
    losses = [entry for entry in trainer.state.log_history if entry["step"] and {"loss", "eval_loss"} & set(entry)]
    return [{name: entry[name] for name in LOGGED if name in entry} for entry in losses]


def draw_pictures(folder: Path) -> Path | None:
    """The pictures of the run, where matplotlib is there and layers were chosen."""
    if not (folder / HISTORY_FILE).exists():
        return None
    try:
        from ...experiments.report import draw_report
    except ImportError:
        return None
    return draw_report(folder)


def quiet_libraries() -> None:
    """Leave the console to the run: libraries speak up at warnings only, and progress bars of loading are off."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    main = os.environ.get("RANK", "0") == "0"
    logging.getLogger("ist").setLevel(logging.WARNING if main else logging.ERROR)
    logging.getLogger("ist.step.announce").setLevel(logging.ERROR)  # The display says the same.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|trl|peft)\.")
