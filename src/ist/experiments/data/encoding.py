"""Texts and chats as tokens, cut to a length and padded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["Text", "chat_end", "encode_pair", "encode_prompt", "pad"]

Text = str | Sequence[Mapping[str, str]]
"""A text, or the messages of a chat."""


def encode_prompt(tokenizer: Any, prompt: Text, max_length: int | None = None) -> list[int]:
    """The tokens of a prompt, with those that begin a text; of a long one the last `max_length`.

    A chat goes through the tokenizer's template, up to where the assistant's answer begins.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
    else:
        text = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids[-max_length:] if max_length else ids


def encode_pair(
    tokenizer: Any, prompt: Text, completion: Text, *, end: bool = False, max_length: int | None = None
) -> tuple[list[int], list[int]]:
    """The tokens of a prompt and of its completion, together those of both as one text where the tokens allow it.

    Args:
        tokenizer: of the model.
        prompt: what comes first; of a long one the end stays.
        completion: what follows.
        end: put the token that ends a text behind the completion of a text, as training does. An answer in a chat ends
            as the template ends it, with or without this.
        max_length: most tokens of both; a completion that alone is longer loses its end.
    """
    first = encode_prompt(tokenizer, prompt)
    if isinstance(prompt, str) and isinstance(completion, str):
        second = _continuation(tokenizer, prompt + completion, first, completion)
    else:
        text = _chat_text(tokenizer, prompt, completion)
        second = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        end = False  # Training adds nothing to what the template ends a message with.
    if end and tokenizer.eos_token_id is not None and second[-1:] != [tokenizer.eos_token_id]:
        second.append(tokenizer.eos_token_id)
    if max_length is not None:
        second = second[: max_length - 1]
        first = first[-(max_length - len(second)) :]
    return first, second


def _continuation(tokenizer: Any, whole: str, first: list[int], text: str) -> list[int]:
    """The tokens of a text that follows the tokens of a prompt."""
    both = list(tokenizer(whole)["input_ids"])
    if both[: len(first)] == first and len(both) > len(first):
        return both[len(first) :]
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def chat_end(tokenizer: Any) -> int | None:
    """The token with which the tokenizer's template ends an assistant's message, as a training on chats teaches it.

    None where there is no template, or where it ends a message with plain text or with nothing.
    """
    from jinja2 import TemplateError  # of what transformers needs for templates

    if not getattr(tokenizer, "chat_template", None):
        return None
    chat = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False)
    except (TemplateError, TypeError):  # It takes chats of another form.
        return None
    behind = tokenizer(_behind(text, "ANSWER"), add_special_tokens=False)["input_ids"]
    of_its_own = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((token for token in behind if token in of_its_own), None)


def _chat_text(tokenizer: Any, prompt: Any, completion: Any) -> str:
    """An answer in a chat as the template words it, with what ends a message."""
    before = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
    if whole.startswith(before):
        return whole[len(before) :]
    answers = [message["content"] for message in completion]
    return "".join(answers) + _behind(whole, answers[-1].strip() if answers else "")


def _behind(text: str, part: str) -> str:
    """What follows the last place of a part in a text; nothing where it is not there."""
    return text.rpartition(part)[2] if part and part in text else ""


def pad(rows: Sequence[Sequence[int]], side: Literal["left", "right"], value: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one tensor of their longest length, and the mask that is 1 where a token stands.

    Args:
        rows: at least one, none empty.
        side: where the padding goes.
        value: the padding token; the mask hides it.
    """
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), value)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return ids, mask
