"""Where an answer ends: at each token that the model or its training ends answers with.

Rows of a training end with the tokenizer's `eos_token`, and chats as its template ends a message. Some models come with
another token in their `generation_config`, and generation alone would run on after a taught end.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any

from ..data.encoding import chat_end

__all__ = ["answer_ends", "ending_with", "model_ends", "until_end"]


def model_ends(model: Any) -> list[int]:
    """The tokens that end a model's own answers, by its `generation_config`, or by its `config` where that has none.

    Raises:
        ValueError: they are texts or other things than whole numbers.
    """
    base = base_of(model)
    config = getattr(base, "config", None)
    for settings in (getattr(base, "generation_config", None), config):
        own = getattr(settings, "eos_token_id", None)
        if own is not None:
            ends = list(own) if isinstance(own, (list, tuple)) else [own]
            if not all(isinstance(end, Integral) for end in ends):
                raise ValueError(
                    f"eos_token_id={own!r} of the model's generation_config.json or config.json is no token's number: "
                    "give a number, or a list of such."
                )
            return ends
    return []


def answer_ends(model: Any, tokenizer: Any, *, chats: bool = False) -> list[int]:
    """The tokens that end an answer, each once: those of the model, the tokenizer's, and the template's for chats.

    Args:
        model: a causal language model, with or without an adapter.
        tokenizer: the model's.
        chats: whether answers are to chats.
    """
    taught = (tokenizer.eos_token_id, chat_end(tokenizer) if chats else None)
    return list(dict.fromkeys(token for token in (*model_ends(model), *taught) if token is not None))


def until_end(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first that ends an answer: without it, and without the padding behind it."""
    stop = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:stop])


@contextmanager
def ending_with(model: Any, ends: Sequence[int]) -> Iterator[None]:
    """Within the block the model's `generation_config` ends answers with these tokens; all else in it stays."""
    base = base_of(model)
    former = getattr(base, "generation_config", None)
    if former is None:
        yield
        return
    base.generation_config = copy.deepcopy(former)
    base.generation_config.eos_token_id = list(ends) or None
    try:
        yield
    finally:
        base.generation_config = former


def base_of(model: Any) -> Any:
    """The model under an adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
