"""The instruction format of the paper's training sets: `instruction`, optional `input`, `output`.

The paper follows LLM-Adapters (Hu et al., 2023), which follows Stanford Alpaca: one sentence of introduction, the
instruction and the input under headings, and the response to be generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import read_rows

__all__ = ["instruction_prompt", "read_instructions"]

FORMS = "instruction and output (and input, if need be), or messages, or prompt and completion"
"""What a row may have."""

INTRODUCTION = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
INTRODUCTION_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


def instruction_prompt(row: Mapping[str, Any]) -> str:
    """The text before the response, for a row with `instruction` and an `input` that may be empty or absent."""
    if row.get("input"):
        return (
            f"{INTRODUCTION_WITH_INPUT}\n\n### Instruction:\n{row['instruction']}\n\n"
            f"### Input:\n{row['input']}\n\n### Response:\n"
        )
    return f"{INTRODUCTION}\n\n### Instruction:\n{row['instruction']}\n\n### Response:\n"


def read_instructions(files: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Read JSON, JSON-lines or CSV files of instructions, or of chats (`messages`), joined in the order given.

    Returns:
        Rows with `prompt` and `completion`, the format of TRL's `SFTTrainer`: texts, or messages for chats.

    Raises:
        ValueError: a file is missing or cannot be read, holds no rows, a row lacks a field, or chats stand among
            other rows.
    """
    rows = [row for file in files for row in read_file(Path(file))]
    kinds = {type(row["prompt"]) for row in rows}
    if len(kinds) > 1:
        raise ValueError(f"{', '.join(map(str, files))} hold chats and other rows: train on one kind at a time.")
    return rows


def read_file(file: Path) -> list[dict[str, Any]]:
    """The prompts and completions of one file."""
    return [to_prompt_completion(file, number, row) for number, row in enumerate(read_rows(file), start=1)]


def to_prompt_completion(file: Path, number: int, row: Any) -> dict[str, Any]:
    """A row (counted from 1) as TRL takes it.

    Raises:
        ValueError: it is neither an instruction, nor a chat, nor a prompt with its completion.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{file}, row {number} is a {type(row).__name__}: rows are objects with {FORMS}.")
    if "messages" in row:
        return split_chat(file, number, row["messages"])
    if "instruction" not in row and isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return {"prompt": row["prompt"], "completion": row["completion"]}
    missing = [name for name in ("instruction", "output") if row.get(name) is None]
    if missing:
        raise ValueError(
            f"{file}, row {number} lacks {' and '.join(missing)} (it has {', '.join(row) or 'nothing'}): rows need "
            f"{FORMS}."
        )
    return {"prompt": instruction_prompt(row), "completion": str(row["output"])}


def split_chat(file: Path, number: int, messages: Any) -> dict[str, Any]:
    """A chat as what comes before the last answer, and that answer.

    Raises:
        ValueError: it is no list of messages with role and content, or the last one is not the assistant's.
    """
    fits = isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
    if not fits or len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{file}, row {number} is no chat to learn from: messages are objects with role and content, at least two, "
            "and the last one is the assistant's."
        )
    texts = [{"role": message["role"], "content": message["content"]} for message in messages]
    return {"prompt": texts[:-1], "completion": texts[-1:]}
