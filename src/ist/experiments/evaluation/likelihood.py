"""The likelihood of the options: a model chooses the one that it finds likeliest."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, get_args

from ..data.encoding import encode_pair
from ..data.task_rows import TaskRow
from .scoring import Continuations, by_length, score

__all__ = ["OPTION_FORMS", "OptionForm", "option_likelihoods", "option_texts"]

OptionForm = Literal["label", "text"]
OPTION_FORMS: tuple[OptionForm, ...] = get_args(OptionForm)


def option_texts(row: TaskRow, form: OptionForm) -> tuple[str, list[str]]:
    """What is scored for a row: a prompt and a continuation for each option.

    Args:
        row: with options.
        form: `label`: the paper's prompt, and "the correct answer is answer2"; what a model trained on the paper's
            format has learned to say. `text`: the question alone, and what the option says; what a model can do that
            never saw the format.

    Raises:
        ValueError: the row has no options.
    """
    if not row.options:
        raise ValueError(
            f"{row.task.name} has no options to compare: use the protocol generate or loss, or leave the task out."
        )
    if form == "text":
        return f"Question: {row.question}\nAnswer:", [f" {option.text}" for option in row.options]
    ends = [f"({option.label})." if row.task.kind == "letter" else option.label for option in row.options]
    return row.prompt, [f"{row.task.prefix}{end}" for end in ends]


def option_likelihoods(
    model: Any,
    tokenizer: Any,
    rows: Sequence[TaskRow],
    *,
    form: OptionForm = "label",
    batch_size: int = 32,
    max_length: int | None = None,
    done: Iterable[int] = (),
) -> Iterator[list[tuple[int, list[float]]]]:
    """The log-likelihood of every option in nats, summed over its tokens, batch after batch.

    Options that differ in their last token alone, as labels do, share one forward pass.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: the model's.
        rows: with options.
        form: what is scored, see `option_texts`.
        batch_size: sequences in a forward pass.
        max_length: longest sequence; longer prompts lose their beginning.
        done: indices of rows to pass over.

    Yields:
        The indices of some rows with the values of their options.
    """
    done = set(done)
    items = {index: _continuations(tokenizer, row, form, max_length) for index, row in enumerate(rows)}
    for chunk in by_length([max(len(part.ids) for part, _ in item) for item in items.values()], batch_size):
        open_rows = [index for index in chunk if index not in done]
        if not open_rows:
            continue
        parts = [part for index in open_rows for part, _ in items[index]]
        values: list[list[float]] = []
        for start in range(0, len(parts), batch_size):
            values += score(model, parts[start : start + batch_size])
        scored = iter(values)
        yield [(index, _in_order(items[index], scored, len(rows[index].options))) for index in open_rows]


Shared = list[tuple[Continuations, list[int]]]
"""Continuations, each with the indices of the options that it holds."""


def _continuations(tokenizer: Any, row: TaskRow, form: OptionForm, max_length: int | None) -> Shared:
    """The options of a row, those together that share all but their last token."""
    prompt, texts = option_texts(row, form)
    groups: dict[tuple[tuple[int, ...], int], list[tuple[int, int]]] = {}
    for index, text in enumerate(texts):
        first, second = encode_pair(tokenizer, prompt, text, max_length=max_length)
        groups.setdefault(((*first, *second[:-1]), len(first)), []).append((index, second[-1]))
    return [
        (Continuations(ids, start, tuple(last for _, last in found)), [index for index, _ in found])
        for (ids, start), found in groups.items()
    ]


def _in_order(item: Shared, scored: Iterator[list[float]], num_options: int) -> list[float]:
    """The values of a row's options in the row's order."""
    values = [0.0] * num_options
    for _, indices in item:
        for index, value in zip(indices, next(scored), strict=True):
            values[index] = value
    return values
