"""Answers to rows of a user's own, each marked by a metric as it comes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ..data.own_rows import OwnRow
from .generation import generate_texts
from .metrics import Marker
from .settings import EvaluationSettings

__all__ = ["OWN_NEW_TOKENS", "answer_own_rows"]

OWN_NEW_TOKENS = 256
"""Tokens of an answer, where the settings say nothing."""


def answer_own_rows(
    model: Any,
    tokenizer: Any,
    rows: Sequence[OwnRow],
    marker: Marker,
    settings: EvaluationSettings,
    done: Iterable[int] = (),
) -> Iterator[list[tuple[int, dict[str, Any]]]]:
    """Let a model answer, and mark what it says, batch after batch.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: the model's.
        rows: what to ask.
        marker: gives a number to a response, see `make_marker`.
        settings: how answers are generated.
        done: indices of rows to pass over.

    Yields:
        For some rows the index, and `text`, `expected` and `score`.
    """
    for batch in generate_texts(
        model,
        tokenizer,
        [row.prompt for row in rows],
        max_new_tokens=settings.max_new_tokens or OWN_NEW_TOKENS,
        generation=settings.generation,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        seed=settings.seed,
        done=done,
    ):
        yield [
            (index, {"text": text, "expected": rows[index].expected, "score": marker(rows[index], text)})
            for index, text in batch
        ]
