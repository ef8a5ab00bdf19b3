"""Evaluate a model on tasks by one protocol."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ...config import check_choice
from ...runs.fingerprint import weights_fingerprint
from ...runtime.modes import evaluation_mode
from ..data.own_rows import OwnRow
from ..data.task_rows import TaskRow
from .answers import AnswerFile, claimed, row_id
from .ends import answer_ends, model_ends
from .extraction import extract_answer, is_correct
from .generation import generate_texts
from .identity import model_identity
from .likelihood import option_likelihoods, option_texts
from .loss import completion_losses, losses, text_windows
from .metrics import UserMetric, make_marker, metric_identity
from .own_answers import answer_own_rows
from .results import Accuracy, Loss, Score, TaskResult
from .settings import PROTOCOLS, EvaluationSettings, Protocol

__all__ = ["TaskData", "evaluate"]

TaskData = Sequence[TaskRow] | Sequence[OwnRow] | Sequence[Mapping[str, Any]] | str
"""Rows of a task, or a user's own to be answered; for the loss also rows of `prompt` and `completion`, or one text."""

Batches = Iterator[list[tuple[int, dict[str, Any]]]]
Progress = Callable[[str, int, int], None]
Found = Callable[[str, TaskResult], None]


def evaluate(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, TaskData] | Sequence[str],
    protocol: Protocol = "generate",
    *,
    settings: EvaluationSettings | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
    on_result: Found | None = None,
    metric: UserMetric | None = None,
    **options: Any,
) -> dict[str, TaskResult]:
    """Evaluate a causal language model.

    Args:
        model: with or without an adapter; nothing of it is changed.
        tokenizer: the model's.
        tasks: the rows of each task, by name. For `lm-eval` a list of the harness's tasks, by name.
        protocol: `generate` (let it answer, find the answer in what it says), `likelihood` (of the row's options),
            `loss` (of completions or of text), or `lm-eval` (lm-evaluation-harness).
        settings: how; single ones can be given as keywords instead.
        folder: takes the answers, `answers/<task>.jsonl`; an interrupted evaluation resumes from them.
        progress: called with the task's name, the rows done and all rows.
        on_result: called with the task's name and the result of the rows done, before `progress`.
        metric: a function that marks answers to the user's own rows, in place of `settings.metric`.

    Returns:
        The result of each task, in order.

    Raises:
        ValueError: a setting or a row does not fit, or the folder has answers of another evaluation.
    """
    check_choice("protocol", protocol, PROTOCOLS)
    settings = dataclasses.replace(settings or EvaluationSettings(), **options)
    if protocol != "lm-eval":
        check_tasks(tasks, protocol, settings)
    answers = None if folder is None else Path(folder) / "answers"
    with contextlib.ExitStack() as stack:
        if answers is not None:
            weights = weights_fingerprint(model.named_parameters())
            marks = metric_identity(settings.metric, settings.labels, metric) if has_own_rows(tasks) else {}
            marks |= taught_ends(model, tokenizer) if protocol in ("generate", "lm-eval") else {}
            marks |= model_identity(model, tokenizer)
            identity = {"weights": weights, "protocol": protocol, **settings.of(protocol), **marks}
            stack.enter_context(claimed(answers, identity))
        if not isinstance(tasks, Mapping) or protocol == "lm-eval":
            from .harness import evaluate_harness

            return evaluate_harness(model, tokenizer, list(tasks), settings, answers)
        stack.enter_context(evaluation_mode(model))
        return {
            name: evaluate_task(model, tokenizer, name, data, protocol, settings, answers, metric, progress, on_result)
            for name, data in tasks.items()
        }


def taught_ends(model: Any, tokenizer: Any) -> dict[str, list[int]]:
    """What ends answers beside the model's own ends, by which the answers of a folder differ too."""
    own = model_ends(model)
    taught = [token for token in answer_ends(model, tokenizer, chats=True) if token not in own]
    return {"ends": taught} if taught else {}


def evaluate_task(
    model: Any,
    tokenizer: Any,
    name: str,
    data: TaskData,
    protocol: str,
    settings: EvaluationSettings,
    folder: Path | None,
    metric: UserMetric | None = None,
    progress: Progress | None = None,
    on_result: Found | None = None,
) -> TaskResult:
    """One task, from the answers that are there already."""
    if settings.limit is not None and not isinstance(data, str):
        data = data[: settings.limit]
    if protocol == "generate" and isinstance(data[0], OwnRow):
        ids, batches = prepare_own_rows(model, tokenizer, name, data, settings, metric)
    else:
        ids, batches = PREPARE[protocol](model, tokenizer, data, settings)
    saved = AnswerFile(folder / f"{name}.jsonl", ids) if folder is not None else None
    found = dict(saved.answers) if saved else {}
    share = metric is None
    for batch in batches(frozenset(found)):
        if saved:
            saved.add(batch)
        found.update(batch)
        if on_result:
            on_result(name, summarise(found, share))
        if progress:
            progress(name, len(found), len(ids))
    return summarise(found, share)


def check_tasks(tasks: Any, protocol: str, settings: EvaluationSettings) -> None:
    """Raise ValueError where a protocol cannot evaluate some data, before anything is computed or written."""
    if not isinstance(tasks, Mapping):
        raise ValueError(f"Names alone are for lm-eval: give {protocol} the rows of each task, by name.")
    for name, data in tasks.items():
        if not data:
            raise ValueError(f"{name} has no rows to evaluate on.")
        for row in () if protocol == "loss" else [data] if isinstance(data, str) else data:
            if isinstance(row, OwnRow) and protocol == "generate":
                continue
            if isinstance(row, OwnRow):
                raise ValueError(f"{name} has no options to compare: use the protocol generate or loss.")
            if not isinstance(row, TaskRow):
                raise ValueError(
                    f"{name} has no answers to mark: rows of other data have a loss alone, use the protocol loss."
                )
            if protocol == "likelihood":
                option_texts(row, settings.options)


def summarise(answers: Mapping[int, Mapping[str, Any]], share: bool) -> TaskResult:
    """The result of all answers; sums run in the rows' order, whatever the order of the batches was."""
    rows = [answers[index] for index in sorted(answers)]
    if "correct" in rows[0]:
        return Accuracy(sum(row["correct"] for row in rows), len(rows))
    if "score" in rows[0]:
        return summarise_scores([row["score"] for row in rows], share)
    tokens = sum(row["tokens"] for row in rows)
    return Loss(sum(row["loss"] for row in rows) / tokens, tokens)


def summarise_scores(scores: Sequence[float], share: bool) -> TaskResult:
    """A share of right answers, where the metric gives only 0 and 1, or the mean of a user's own, whatever it gives."""
    if share:
        return Accuracy(round(sum(scores)), len(scores))
    return Score(fmean(scores), stdev(scores) if len(scores) > 1 else 0.0, len(scores))


def has_own_rows(tasks: Any) -> bool:
    """Whether there are rows that a metric marks."""
    if not isinstance(tasks, Mapping):
        return False
    return any(not isinstance(data, str) and isinstance(data[0], OwnRow) for data in tasks.values())


Prepared = tuple[list[str], Callable[[frozenset[int]], Batches]]
"""The rows' identities, and what answers all rows but those done."""


def prepare_generation(model: Any, tokenizer: Any, rows: Any, settings: EvaluationSettings) -> Prepared:
    """Generate, find the answer, mark it."""

    def batches(done: frozenset[int]) -> Batches:
        for batch in generate_texts(
            model,
            tokenizer,
            [row.prompt for row in rows],
            max_new_tokens=settings.max_new_tokens or rows[0].task.max_new_tokens,
            generation=settings.generation,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            seed=settings.seed,
            done=done,
        ):
            yield [(index, mark(rows[index], text, settings)) for index, text in batch]

    return [row_id(row.prompt, row.answer) for row in rows], batches


def prepare_own_rows(
    model: Any, tokenizer: Any, name: str, rows: Any, settings: EvaluationSettings, metric: UserMetric | None
) -> Prepared:
    """Generate, and mark by the metric."""
    try:
        marker = make_marker(settings.metric, rows, settings.labels, metric)
    except ValueError as error:
        raise ValueError(f"{name} {error}.") from error

    def batches(done: frozenset[int]) -> Batches:
        return answer_own_rows(model, tokenizer, rows, marker, settings, done)

    return [row_id(row.prompt, row.expected) for row in rows], batches


def mark(row: TaskRow, text: str, settings: EvaluationSettings) -> dict[str, Any]:
    """A generated answer beside the right one."""
    answer = extract_answer(row, text, settings.extraction)
    return {"text": text, "answer": answer, "expected": row.answer, "correct": is_correct(row, answer)}


def prepare_likelihood(model: Any, tokenizer: Any, rows: Any, settings: EvaluationSettings) -> Prepared:
    """Compare the options."""

    def batches(done: frozenset[int]) -> Batches:
        for batch in option_likelihoods(
            model,
            tokenizer,
            rows,
            form=settings.options,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            done=done,
        ):
            yield [(index, choose(rows[index], values)) for index, values in batch]

    return [row_id(*option_texts(row, settings.options), row.answer) for row in rows], batches


def choose(row: TaskRow, values: Sequence[float]) -> dict[str, Any]:
    """The likeliest option, the first of equal ones, beside the right one."""
    likelihoods = dict(zip((option.label for option in row.options), values, strict=True))
    answer = max(likelihoods, key=likelihoods.__getitem__)
    return {
        "log_likelihoods": likelihoods,
        "answer": answer,
        "expected": row.answer,
        "correct": answer == row.answer,
    }


def prepare_loss(model: Any, tokenizer: Any, data: TaskData, settings: EvaluationSettings) -> Prepared:
    """Sum up the loss of completions, or of a text's windows."""
    if isinstance(data, str):
        items = text_windows(tokenizer, data, settings.window, settings.stride)
    else:
        rows = [row if isinstance(row, Mapping) else row.to_prompt_completion() for row in data]
        items = completion_losses(tokenizer, rows, settings.max_length)

    def batches(done: frozenset[int]) -> Batches:
        for batch in losses(model, items, batch_size=settings.batch_size, done=done):
            yield [(index, {"loss": loss, "tokens": tokens}) for index, loss, tokens in batch]

    return [row_id(item.ids, item.start, item.lasts) for item in items], batches


PREPARE: dict[str, Callable[..., Prepared]] = {
    "generate": prepare_generation,
    "likelihood": prepare_likelihood,
    "loss": prepare_loss,
}
