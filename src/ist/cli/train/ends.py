"""The token that ends an answer in training, beside those that end the model's own answers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from trl import is_conversational

from ...experiments.data.encoding import chat_end
from ...experiments.evaluation.ends import base_of
from .arguments import RunArguments

__all__ = ["check_eos", "choose_eos", "settle_ends"]

logger = logging.getLogger(__name__)


def choose_eos(run: RunArguments, source: str, tokenizer: Any) -> None:
    """Give a tokenizer the `eos_token` that `--eos_token` names.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    chosen = run.training.eos_token
    if chosen is None:
        return
    if chosen not in tokenizer.get_vocab():
        now = f", now {tokenizer.eos_token}" if tokenizer.eos_token else ""
        raise ValueError(
            f"--eos_token {chosen} is no token of the tokenizer in {source}: give one of its tokens, or leave it out "
            f"for the tokenizer's own{now}."
        )
    tokenizer.eos_token = chosen


def check_eos(rows: Any, tokenizer: Any, run: RunArguments) -> None:
    """Raise ValueError where nothing says with which token rows of text end."""
    if tokenizer.eos_token is None and kind_of(rows, run.training.dataset_text_field) == "rows":
        raise ValueError(
            "The model's tokenizer has no eos_token, with which rows end: give --eos_token with one of its tokens."
        )


def settle_ends(rows: Any, own: list[int], trainer: Any, run: RunArguments) -> None:
    """Make the taught end one of the model's, and say so in one line where it was not.

    Args:
        rows: to train on, as they were before TRL prepared them.
        own: tokens that ended the model's answers before the trainer was made.
        trainer: with the model and its tokenizer.
        run: what the flags say.
    """
    tokenizer = trainer.processing_class
    kind = kind_of(rows, run.training.dataset_text_field)
    taught = {"rows": tokenizer.eos_token_id, "chats": chat_end(tokenizer)}.get(kind)
    name = run.model.model_name_or_path
    if kind == "chats" and taught is None:
        logger.warning(
            "The chat template ends an answer with no token of its own, so that %s learns no end from these chats: "
            "give --chat_template_path with a template that puts one, such as %s, behind each answer.",
            name, tokenizer.eos_token or "<|im_end|>",
        )  # fmt: skip
    if taught is None or taught in own:
        return
    config = getattr(base_of(trainer.model), "generation_config", None)
    if config is not None:  # The Trainer does so with the tokenizer's end, when it trains.
        now = config.eos_token_id
        now = now if isinstance(now, list) else [] if now is None else [now]
        config.eos_token_id = list(dict.fromkeys([taught, *now]))
    if not own:
        return
    token, ends = tokenizer.convert_ids_to_tokens(taught), tokenizer.convert_ids_to_tokens(own)
    saved = " A saved adapter has no generation_config.json." if run.ist.adapter != "none" else ""
    logger.warning(
        "%s end with %s (%s), and answers of %s with %s: `ist` stops at each, and other programs may know only the "
        "model's.%s Make %s a stop token there, or train with %s.",
        *(("Rows", token, "the tokenizer's eos_token") if kind == "rows" else ("Chats", token, "of the chat template")),
        name, " or ".join(map(str, ends)), saved, token,
        f"--eos_token '{ends[0]}'" if kind == "rows" else f"a --chat_template_path that ends answers with {ends[0]}",
    )  # fmt: skip


def kind_of(rows: Any, text_field: str) -> str:
    """What the first row is: `chats`, `rows` of text, or `others`, such as rows of tokens."""
    row = next(iter(rows), None)
    if not isinstance(row, Mapping) or "input_ids" in row:
        return "others"
    if is_conversational(row) or "conversations" in row:  # type: ignore[arg-type]
        return "chats"
    return "rows" if text_field in row or "completion" in row else "others"
