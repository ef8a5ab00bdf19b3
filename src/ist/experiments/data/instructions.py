"""The instruction format of the paper's training sets: `instruction`, optional `input`, `output`.

The paper follows LLM-Adapters (Hu et al., 2023), which follows Stanford Alpaca: one sentence of introduction, the
instruction and the input under headings, and the response to be generated. Chats, and prompts with completions, are
read beside it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .chats import MEDIA, are_messages, is_message, read_pair, split_chat
from .files import read_rows
from .values import as_text, is_missing, text_field

__all__ = ["instruction_prompt", "read_instructions"]

logger = logging.getLogger(__name__)

FORMS = "instruction and output (and input, if need be), or messages, or prompt and completion"
"""What a row may have."""

CHATS = ("messages", "conversations")
"""Fields that hold a chat."""

CONTEXT = ("system", "system_prompt", "history", "context")
"""Fields that stand before what is asked, and that the formats without messages would lose."""

CHAT_CONTEXT = ("history", "context", "documents")
"""Those that chats would lose."""

ROW_WEIGHTS = ("weight", "sample_weight", "loss_weight")
"""Fields by which a chat says how much it counts; other rows may have them for a metric of the user's."""

INTRODUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
INTRODUCTION_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


def instruction_prompt(row: Mapping[str, Any]) -> str:
    """The text before the response, for a row with `instruction` and an `input` that may be empty, NaN or absent.

    Raises:
        ValueError: the instruction or the input is no text and cannot be written as JSON.
    """
    instruction, given = as_text(row["instruction"]), row.get("input")
    if given and not is_missing(given):
        return (
            f"{INTRODUCTION_WITH_INPUT}\n\n### Instruction:\n{instruction}\n\n"
            f"### Input:\n{as_text(given)}\n\n### Response:\n"
        )
    return f"{INTRODUCTION}\n\n### Instruction:\n{instruction}\n\n### Response:\n"


def read_instructions(files: Sequence[str | Path], *, numbered: bool = False) -> list[dict[str, Any]]:
    """Read files of instructions, of prompts with completions, or of chats, joined in the order given.

    Rows with an empty answer teach nothing, and are left out with a warning.

    Args:
        files: JSON, JSON-lines, CSV or parquet.
        numbered: give each row its place too, `ist_file` and, from 1, `ist_row`.

    Returns:
        Rows with `prompt` and `completion`, the format of TRL's `SFTTrainer`: texts, or messages for chats.

    Raises:
        ValueError: a file is missing or cannot be read, holds no rows, a row does not fit, or chats stand among other
            rows.
    """
    rows = [
        {**row, "ist_file": str(file), "ist_row": number} if numbered else row
        for file in files
        for number, row in read_file(Path(file)).items()
    ]
    kinds = {type(row["prompt"]) for row in rows}
    if len(kinds) > 1:
        raise ValueError(f"{', '.join(map(str, files))} hold chats and other rows: train on one kind at a time.")
    return rows


def read_file(file: Path) -> dict[int, dict[str, Any]]:
    """The prompts and completions of one file, by the row's number."""
    rows = {number: to_prompt_completion(file, number, row) for number, row in enumerate(read_rows(file), start=1)}
    kept = {number: row for number, row in rows.items() if not is_empty(row["completion"])}
    if not kept:
        raise ValueError(f"{file} has an empty answer in every row: there is nothing to learn from.")
    if len(kept) < len(rows):
        first = next(number for number in rows if number not in kept)
        logger.warning(
            "%d of %d rows of %s have an empty answer (row %d is the first), and are left out.",
            len(rows) - len(kept), len(rows), file, first,
        )  # fmt: skip
    return kept


def is_empty(completion: str | Sequence[Mapping[str, str]]) -> bool:
    """Whether an answer says nothing."""
    texts = [completion] if isinstance(completion, str) else [message["content"] for message in completion]
    return not any(text.strip() for text in texts)


def to_prompt_completion(file: Path, number: int, row: Any) -> dict[str, Any]:
    """A row (counted from 1) as TRL takes it.

    Raises:
        ValueError: it is neither an instruction, nor a chat, nor a prompt with its completion.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{file}, row {number} is a {type(row).__name__}: rows are objects with {FORMS}.")
    try:
        return read_row(row)
    except ValueError as error:
        raise ValueError(f"{file}, row {number} {error}.") from error


def read_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of any of the forms; the error says what it has or lacks."""
    given = {name: value for name, value in row.items() if not is_missing(value)}
    check_beside(given)
    for name in CHATS:
        if name in given:
            check_chat(given, given[name])
            return chat_row(*split_chat(given[name], system_prompt(given)))
    if "instruction" not in given and {"prompt", "completion"} <= set(given):
        return read_pair_of(given)
    missing = [name for name in ("instruction", "output") if name not in given]
    if missing:
        raise ValueError(f"lacks {' and '.join(missing)} (it has {describe_fields(row)}): rows need {FORMS}")
    if name := next((name for name in ("instruction", "input", "output") if are_messages(given.get(name))), None):
        raise ValueError(f"has messages as its {name}, which is a text: call the fields prompt and completion")
    check_context(given)
    texts = {name: text_field(given, name) for name in ("instruction", "input", "output") if name in given}
    return {"prompt": instruction_prompt(texts), "completion": texts["output"]}


def read_pair_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """A row of prompt and completion, both of them texts or both of them messages."""
    prompt, completion = given["prompt"], given["completion"]
    if given.get("label") is False:
        raise ValueError("has label false, a completion that is not wanted, and would be trained on it: leave it out")
    if are_messages(prompt) or are_messages(completion):
        check_chat(given, prompt)
        return chat_row(*read_pair(prompt, completion, system_prompt(given)))
    for name in ("prompt", "completion"):
        if is_message(given[name]):
            raise ValueError(f"has a message as its {name} that stands in no list: put brackets around it")
    if prompt == []:
        raise ValueError("has a prompt without messages")
    check_context(given)
    return {"prompt": text_field(given, "prompt"), "completion": text_field(given, "completion")}


def system_prompt(given: Mapping[str, Any]) -> Any:
    """The system prompt that stands beside the messages, whichever of its names it has."""
    found = {name: given[name] for name in ("system", "system_prompt") if given.get(name)}
    if len(found) > 1 and found["system"] != found["system_prompt"]:
        raise ValueError("has a system and another system_prompt: keep one of them")
    return next(iter(found.values()), None)


def check_beside(given: Mapping[str, Any]) -> None:
    """Raise ValueError where a row has beside its texts what the training would lose without a word."""
    for name, what in {"tools": "tools", "functions": "functions", **MEDIA}.items():
        if not is_nothing(given.get(name)):
            shown = what if what == name else f"{what} ({name})"
            raise ValueError(f"has {shown}, which the training would lose: write them into a message")


def chat_row(prompt: Sequence[Mapping[str, str]], completion: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """A chat as TRL takes it."""
    return {"prompt": list(prompt), "completion": list(completion)}


def is_nothing(value: Any) -> bool:
    """Whether a field holds nothing, also as a text of JSON, or as an object whose values are all null."""
    if isinstance(value, Mapping):
        return all(map(is_missing, value.values()))
    return is_missing(value) or value in ("", [], "[]", "{}", "null")


def check_chat(given: Mapping[str, Any], messages: Any) -> None:
    """Raise ValueError where a chat has a weight, or what its messages would have to hold."""
    for name in ROW_WEIGHTS:
        weight = given.get(name, 1)
        if isinstance(weight, (bool, int, float)) and weight != 1:
            raise ValueError(f"has {name} {weight!r}, and all chats count alike: leave it out, or the row")
    check_context(given, messages)


def check_context(given: Mapping[str, Any], chat: Any = None) -> None:
    """Raise ValueError where a row has what stands before its question, and does not have it in its text.

    Args:
        given: the row.
        chat: its messages, whose first can be the system prompt.
    """
    names = ("prompt", "instruction", "input") if chat is None else ()
    asked = " ".join(str(given.get(name) or "") for name in names) if chat is None else said_in(chat)
    for name in CONTEXT if chat is None else CHAT_CONTEXT:
        value = given.get(name)
        if value and not (name == "context" and isinstance(value, str) and value.strip() in asked):
            kind = "chats" if chat is not None else "instructions" if "instruction" in given else "prompts"
            way_out = "write it into a message" if chat is not None else "give messages, or write it into the text"
            raise ValueError(f"has {name}, for which the format of {kind} has no place: {way_out}")


def said_in(chat: Any) -> str:
    """The contents of messages as one text."""
    messages = chat if isinstance(chat, list) else []
    return " ".join(str(item.get("content", item.get("value"))) for item in messages if isinstance(item, Mapping))


def describe_fields(row: Mapping[str, Any]) -> str:
    """The names of a row's fields, with those marked that hold nothing."""
    names = [
        f"{name}, which is {'null' if row[name] is None else 'NaN'}" if is_missing(row[name]) else str(name)
        for name in row
    ]
    return ", ".join(names) or "nothing"
