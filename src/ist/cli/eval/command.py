"""`ist eval`: a model, with or without an adapter, on tasks, rows or texts; every answer saved."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ...experiments.data import find_tasks, read_instructions, to_task_row, word_problems
from ...experiments.data.files import check_file, read_text
from ...experiments.data.own_rows import read_own_rows
from ...experiments.evaluation import EvaluationSettings, TaskData, TaskResult, evaluate
from ...experiments.evaluation.answers import OtherAnswersError
from ...experiments.evaluation.metrics import UserMetric, metric_identity
from ...runs.files import EVALUATION_FILE, write_json
from ..checkout import commit
from ..display import device_name
from ..metric import load_metric
from ..printable import printable
from ..quiet import quiet_libraries
from ..saved_adapter import check_alone, holds_adapter
from ..task_data import load_task
from .arguments import evaluation_settings, parse_eval_arguments
from .model import find_base, load_model
from .progress import Progress

__all__ = ["evaluate_command"]

NUM_PROBLEMS = 100
"""Built-in problems that are asked where `--limit` says nothing."""


def evaluate_command(arguments: Sequence[str]) -> dict[str, Any]:
    """Evaluate as the flags say, print the results and write them.

    Returns:
        What is in `ist_eval.json`.

    Raises:
        ValueError: a flag, the data or the model does not fit, or the folder has answers of another evaluation.
    """
    quiet_libraries()
    flags = parse_eval_arguments(arguments)
    settings = evaluation_settings(flags)
    metric = load_metric(flags.metric_function) if flags.metric_function else None
    if not flags.adapter and holds_adapter(flags.model_name_or_path):
        check_alone(flags.model_name_or_path)
        flags.adapter, flags.model_name_or_path = flags.model_name_or_path, None
    flags.model_name_or_path = flags.model_name_or_path or find_base(flags.adapter)
    tasks: Any = flags.tasks if flags.protocol == "lm-eval" else load_tasks(flags)
    if flags.protocol == "lm-eval":
        tasks = [name for names in flags.tasks for name in names.split(",") if name]
    model, tokenizer = load_model(flags)
    start = time.perf_counter()
    progress = Progress()
    results = in_own_folder(
        flags,
        lambda folder: evaluate(
            model,
            tokenizer,
            tasks,
            flags.protocol,
            settings=settings,
            folder=folder,
            progress=progress,
            on_result=progress.found,
            metric=metric,
        ),
    )
    record = write_result(flags, settings, metric, results, time.perf_counter() - start)
    show(results)
    print(printable(f"written: {Path(flags.output_dir) / EVALUATION_FILE}"))
    return record


def in_own_folder(
    flags: argparse.Namespace, evaluate_into: Callable[[str], dict[str, TaskResult]]
) -> dict[str, TaskResult]:
    """Evaluate into the folder of the flags.

    Without `--output_dir` that is the first of `runs/eval`, `runs/eval-2`, … without another evaluation's answers, so
    that a second command gets a folder of its own, and the same command resumes from its answers.
    """
    if flags.output_dir is not None:
        return evaluate_into(flags.output_dir)
    for number in itertools.count(1):
        flags.output_dir = "runs/eval" if number == 1 else f"runs/eval-{number}"
        with contextlib.suppress(OtherAnswersError):
            return evaluate_into(flags.output_dir)
    raise AssertionError("numbers have no end")


def load_tasks(flags: argparse.Namespace) -> dict[str, TaskData]:
    """The rows of every task and file, by name.

    Raises:
        ValueError: a task or a file cannot be read, or two have one name.
    """
    loaded: list[tuple[str, TaskData]] = []
    for task in find_tasks(flags.tasks) if flags.tasks else []:
        if task.name == "word-problems":
            problems = word_problems(flags.limit or NUM_PROBLEMS, split="test", seed=flags.seed + 1)
            loaded.append((task.name, [to_task_row(problem) for problem in problems]))
        else:
            loaded.append((task.name, load_task(task, flags.split, flags.data_folder, flags.from_hub)))
    for file in flags.data_files or ():
        rows: Any = read_instructions([file]) if flags.protocol == "loss" else read_own_rows(file)
        loaded.append((data_name(file), rows))
    for file in flags.text_files or ():
        check_file(Path(file), "--text_files takes files of plain text")
        loaded.append((data_name(file), read_text(Path(file))))
    names = [name for name, _ in loaded]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} given twice: results go by name, so give files different names.")
    return dict(loaded)


def data_name(file: str) -> str:
    """What the results of a file are called: its name without the suffixes of what it holds."""
    path = Path(file)
    return Path(path.stem).stem if path.suffix.lower() == ".gz" else path.stem


def write_result(
    flags: argparse.Namespace,
    settings: EvaluationSettings,
    metric: UserMetric | None,
    results: dict[str, TaskResult],
    seconds: float,
) -> dict[str, Any]:
    """Write `ist_eval.json`; tasks that the folder has results of already, by the same model, stay in it."""
    file = Path(flags.output_dir) / EVALUATION_FILE
    known = known_results(file)
    own = flags.data_files and flags.protocol == "generate"
    marks = metric_identity(settings.metric, settings.labels, metric) if own else {}
    record = {
        "model": flags.model_name_or_path,
        "adapter": flags.adapter,
        "protocol": flags.protocol,
        "settings": {
            **settings.of(flags.protocol),
            **marks,
            "batch_size": settings.batch_size,
            "limit": settings.limit,
        },
        "tasks": {**known, **{name: result.to_dict() for name, result in results.items()}},
        "device": device_name(),
        "versions": versions(),
        "commit": commit(),
        "seconds": seconds,
    }
    write_json(file, record)
    return record


def known_results(file: Path) -> dict[str, Any]:
    """The tasks of an earlier evaluation in this folder.

    Raises:
        ValueError: its file is damaged.
    """
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["tasks"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: remove it; the answers beside it are read again.") from error


def versions() -> dict[str, str]:
    """Of what is installed among the packages that a result depends on."""
    found = {}
    for name in ("ist-peft", "torch", "transformers", "peft", "lm-eval"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def show(results: dict[str, TaskResult]) -> None:
    """A line for each task, and the mean of the accuracies."""
    width = max(map(len, results))
    for name, result in results.items():
        print(printable(f"{name:{width}}  {result}"))
    shares = [figures["accuracy"] for result in results.values() if "accuracy" in (figures := result.to_dict())]
    if len(shares) > 1:
        print(f"{'mean':{width}}  {sum(shares) / len(shares):.1%}")
