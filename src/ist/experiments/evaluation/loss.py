"""Loss in nats a token: of completions given their prompts, and of plain text in windows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ..data.encoding import encode_pair
from .scoring import Continuations, by_length, score

__all__ = ["completion_losses", "losses", "text_windows"]


def losses(
    model: Any, items: Sequence[Continuations], *, batch_size: int = 32, done: Iterable[int] = ()
) -> Iterator[list[tuple[int, float, int]]]:
    """The loss of each item, summed over its tokens after the start, and their number, batch after batch.

    Args:
        model: a causal language model, in evaluation mode.
        items: with one last token each.
        batch_size: sequences in a forward pass.
        done: indices of items to pass over.

    Yields:
        Index, loss in nats and number of tokens of some items.
    """
    done = set(done)
    for chunk in by_length([len(item.ids) for item in items], batch_size):
        open_items = [index for index in chunk if index not in done]
        if not open_items:
            continue
        values = score(model, [items[index] for index in open_items])
        yield [
            (index, -value, len(items[index].ids) + 1 - items[index].start)
            for index, (value,) in zip(open_items, values, strict=True)
        ]


def completion_losses(
    tokenizer: Any, rows: Sequence[Mapping[str, Any]], max_length: int | None = None
) -> list[Continuations]:
    """Rows of `prompt` and `completion` as items for `losses`; the token that ends a text counts, as in training.

    As in training, the first token of a row without a prompt is not predicted, and a row without a token that is does
    not count.

    Raises:
        ValueError: no row has one.
    """
    items = []
    for row in rows:
        first, second = encode_pair(tokenizer, row["prompt"], row["completion"], end=True, max_length=max_length)
        if not first:
            first, second = second[:1], second[1:]
        if not second:
            continue
        items.append(Continuations((*first, *second[:-1]), len(first), (second[-1],)))
    if not items:
        raise ValueError(f"None of {len(rows)} rows has a token to predict: give longer answers.")
    return items


def text_windows(tokenizer: Any, text: str, window: int = 1024, stride: int | None = None) -> list[Continuations]:
    """A text cut into windows; every token but the first is predicted once.

    Args:
        tokenizer: of the model.
        text: of any length.
        window: tokens of a window.
        stride: tokens from one window to the next. With a smaller stride a window begins with tokens that were
            predicted before, so that every token has more context.

    Raises:
        ValueError: the window or the stride is too small or too large, or the text has fewer than two tokens.
    """
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(f"window={window} and stride={stride} do not fit: 2 <= window and 1 <= stride <= window.")
    ids = tuple(tokenizer(text, verbose=False)["input_ids"])
    if len(ids) < 2:
        raise ValueError(f"The text has {len(ids)} tokens: there is nothing to predict.")
    items, done = [], 1
    while done < len(ids):
        end = min(len(ids), window if done == 1 else done + stride)
        # Where windows do not overlap, the last token of the one before is the context of the first prediction.
        begin = max(0, done - max(1, window - stride))
        items.append(Continuations(ids[begin : end - 1], done - begin, (ids[end - 1],)))
        done = end
    return items
