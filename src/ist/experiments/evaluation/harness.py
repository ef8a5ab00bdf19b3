"""Tasks of lm-evaluation-harness, through its own package."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runs.files import read_object, write_json, write_whole
from ...runtime.modes import evaluation_mode, same_modes_after
from ...runtime.packages import how_to_install
from ...runtime.randomness import private_randomness
from .ends import answer_ends, ending_with
from .results import Accuracy, Metrics, TaskResult
from .settings import EvaluationSettings

__all__ = ["evaluate_harness", "harness_result"]

SHARES = ("acc", "exact_match")
"""Metrics of the harness that are shares of right answers, the first that a task has counts."""


def evaluate_harness(
    model: Any, tokenizer: Any, tasks: Sequence[str], settings: EvaluationSettings, folder: Path | None = None
) -> dict[str, TaskResult]:
    """Evaluate a model on tasks of lm-evaluation-harness, one after the other.

    Args:
        model: a causal language model, with or without an adapter; its mode is restored.
        tokenizer: the model's.
        tasks: names of tasks, or of groups of them, that the harness knows or that `settings.task_folder` holds.
        settings: batch size, length, examples in the prompt, limit and seed count.
        folder: takes the answers, and what each task found; finished tasks are not computed again.

    Returns:
        The result of each task; a group's parts come beside it.

    Raises:
        ValueError: the package is not installed, or a task is unknown.
    """
    results = {name: read_results(result_file(folder, name)) for name in tasks}
    missing = [name for name, found in results.items() if found is None]
    if missing or not tasks:
        results.update(run_harness(model, tokenizer, missing, settings, folder))
    return {part: result for name in tasks for part, result in (results[name] or {}).items()}


def run_harness(
    model: Any, tokenizer: Any, tasks: Sequence[str], settings: EvaluationSettings, folder: Path | None
) -> dict[str, dict[str, TaskResult]]:
    """The results of each task or group: a group's parts come beside it."""
    try:
        import lm_eval.models.huggingface as huggingface
        import lm_eval.tasks as harness_tasks
    except ModuleNotFoundError as error:
        raise ValueError(
            f"The protocol lm-eval needs lm-evaluation-harness ({error}): {how_to_install('lm_eval')}."
        ) from error
    manager = harness_tasks.TaskManager(include_path=settings.task_folder)
    check_known(tasks, manager.all_tasks)
    language_model: Any = huggingface.HFLM
    results: dict[str, dict[str, TaskResult]] = {}
    with same_modes_after(model):  # the harness calls eval()
        wrapped = language_model(
            pretrained=model,
            tokenizer=copy.deepcopy(tokenizer),  # it may get a padding token
            batch_size=settings.batch_size,
            max_length=settings.max_length,
        )
        # The harness looks for the tokenizer's end in texts from which it has removed the special tokens.
        with evaluation_mode(model), ending_with(model, answer_ends(model, tokenizer)):
            for name in tasks:
                with private_randomness(settings.seed, model.device):  # the harness seeds the global generators
                    results[name] = run_task(wrapped, name, manager, settings, folder)
    return results


def check_known(tasks: Sequence[str], known: Collection[str]) -> None:
    """Raise ValueError at a task that the harness does not know."""
    unknown = [name for name in tasks if name not in known]
    if unknown or not tasks:
        raise ValueError(
            f"{', '.join(unknown) or 'Nothing'} is no task of lm-evaluation-harness: `lm-eval ls tasks` lists them, "
            "and --task_folder takes a folder of your own."
        )


def run_task(
    wrapped: Any, name: str, manager: Any, settings: EvaluationSettings, folder: Path | None
) -> dict[str, TaskResult]:
    """One task or group, and its answers written."""
    import lm_eval

    run: Any = lm_eval.simple_evaluate
    output = run(
        model=wrapped,
        tasks=[name],
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
        random_seed=settings.seed,
        numpy_random_seed=settings.seed,
        torch_random_seed=settings.seed,
        fewshot_random_seed=settings.seed,
    )
    samples = output.get("samples", {})
    results = {part: harness_result(values, samples.get(part, ())) for part, values in output["results"].items()}
    file = result_file(folder, name)
    if file is not None:
        for part, rows in samples.items():
            lines = (json.dumps(row, ensure_ascii=False, default=str) for row in rows)
            write_whole(file.with_name(f"{part}.jsonl"), "".join(f"{line}\n" for line in lines))
        found = {part: result.to_dict() for part, result in results.items()}
        write_json(file, found)
    return results


def result_file(folder: Path | None, task: str) -> Path | None:
    """Where a finished task's results are."""
    return None if folder is None else folder / f"{task}.lm-eval.json"


def read_results(file: Path | None) -> dict[str, TaskResult] | None:
    """The results of a finished task, or None."""
    if file is None or not file.exists():
        return None
    way_out = "remove it, and the task is done anew."
    found = read_object(file, way_out)
    try:
        return {part: parse_result(values) for part, values in found.items()}
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"{file} is damaged (it is not what an evaluation writes): {way_out}") from error


def harness_result(values: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> TaskResult:
    """What the harness found for one task.

    Args:
        values: its metrics, named as in "acc,none".
        samples: the judged answers; of several filters, those of the first count.
    """
    filters = [sample.get("filter") for sample in samples]
    for share in SHARES:
        marks = [row[share] for row, name in zip(samples, filters, strict=True) if share in row and name == filters[0]]
        if marks and all(mark in (0, 1) for mark in marks):
            return Accuracy(int(sum(marks)), len(marks))
    return Metrics({name: value for name, value in values.items() if isinstance(value, (int, float))})


def parse_result(values: Mapping[str, Any]) -> TaskResult:
    """A result from what `to_dict` made of it."""
    if "correct" in values:
        if not 0 <= values["correct"] <= values["total"] or values["total"] < 1:
            raise ValueError
        return Accuracy(values["correct"], values["total"])
    return Metrics(dict(values))
