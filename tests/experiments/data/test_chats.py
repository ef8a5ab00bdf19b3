"""Chats in each of their forms, and those that would lose something in training."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from ist.experiments.data.instructions import read_instructions

USER, SAYS = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "Be short."}
HUMAN, GPT = {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]


def read(folder: Path, *rows: Any) -> list[dict[str, Any]]:
    """Rows through a file; what JSON has no form for goes as Python's own NaN."""
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return read_instructions([folder / "rows.jsonl"])


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


PLAIN = ([USER], [SAYS])
WITH_SYSTEM = ([SYSTEM, USER], [SAYS])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, SAYS]}, PLAIN),
        ({"messages": [USER, SAYS], "system": None, "tools": None}, PLAIN),
        ({"messages": [USER, SAYS], "system": "Be short."}, WITH_SYSTEM),
        ({"messages": None, "conversations": [HUMAN, GPT]}, PLAIN),
        ({"conversations": [HUMAN, GPT], "system": "Be short."}, WITH_SYSTEM),
        ({"conversations": [{"from": "system", "value": "Be short."}, HUMAN, GPT]}, WITH_SYSTEM),
        ({"conversations": [USER, SAYS]}, PLAIN),
        ({"messages": [HUMAN, {"from": "ChatGPT", "value": "a"}]}, PLAIN),
        ({"prompt": [USER], "completion": [SAYS]}, PLAIN),
        ({"prompt": [SYSTEM, USER], "completion": [SAYS]}, WITH_SYSTEM),
        ({"prompt": [USER], "completion": [SAYS], "system": "Be short."}, WITH_SYSTEM),
        ({"messages": [{**USER, "content": parts("q")}, {**SAYS, "content": parts("", "a")}]}, PLAIN),
        ({"messages": [{**USER, "content": ["q"]}, {**SAYS, "tool_calls": [], "reasoning_content": ""}]}, PLAIN),
        ({"prompt": [{**USER, "content": parts("q")}], "completion": [{**SAYS, "content": parts("a")}]}, PLAIN),
        ({"messages": [{**USER, "weight": None}, {**SAYS, "weight": 1.0}]}, PLAIN),
        ({"messages": [USER, {**SAYS, "weight": 0}, USER, {**SAYS, "weight": 1}]}, ([USER, SAYS, USER], [SAYS])),
        ({"messages": [{**USER, "weight": 1}, {**SAYS, "train": True, "tool_calls": None}]}, PLAIN),
        ({"messages": [{**USER, "weight": math.nan}, SAYS]}, PLAIN),
        ({"messages": [{**USER, "from": None, "value": None}, {**SAYS, "from": None, "value": None}]}, PLAIN),
        ({"conversations": [{**HUMAN, "role": None, "weight": 1}, {**GPT, "role": None}]}, PLAIN),
        ({"messages": [USER, SAYS], "image": {"bytes": None, "path": None}}, PLAIN),
        ({"messages": [{**USER, "role": "User "}, {**SAYS, "role": "model"}]}, PLAIN),
        ({"messages": [USER, SAYS], "system_prompt": "Be short."}, WITH_SYSTEM),
        ({"messages": [USER, SAYS], "system_prompt": "Be short.", "system": "Be short."}, WITH_SYSTEM),
        ({"messages": [USER, SAYS], "tools": "[]", "images": [], "weight": 1, "history": [], "context": "q"}, PLAIN),
        ({"messages": [USER, {**SAYS, "loss": 1, "masked": False, "audio": None}]}, PLAIN),
    ],
)
def test_a_chat_is_read(tmp_path: Path, row: dict[str, Any], expected: tuple[Any, Any]) -> None:
    assert read(tmp_path, row) == [dict(zip(("prompt", "completion"), expected, strict=True))]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, "it has no messages"),
        ({"messages": "hello"}, "it has messages that are a str, not a list"),
        ({"messages": [SAYS]}, "it has the assistant's message alone"),
        ({"messages": [USER, SAYS, USER]}, "it ends with a message of the user, not of the assistant: cut it"),
        ({"conversations": [HUMAN, GPT, HUMAN]}, "it ends with a message of the user"),
        ({"messages": [USER, 3]}, "number 2, that is a int, not an object with role and content"),
        ({"messages": [USER, {"content": "a"}]}, r"number 2, that lacks role \(it has content\)"),
        ({"messages": [USER, {"role": "assistant"}]}, "number 2, that is the assistant's and lacks content"),
        ({"messages": [USER, {**SAYS, "content": None}]}, "is the assistant's and lacks content"),
        ({"conversations": [HUMAN, {"from": "gpt"}]}, "is the assistant's and lacks value"),
        ({"conversations": [{"from": "observation", "value": "1"}, GPT]}, "is from 'observation', which is none of"),
        ({"messages": [{**USER, "content": 3}, SAYS]}, "number 1, that has a int as its content"),
        ({"messages": [{**USER, "content": {"a": 1}}, SAYS]}, "has a dict as its content"),
        ({"messages": [{**USER, "content": []}, SAYS]}, "has no parts in its content"),
        (
            {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, SAYS]},
            "has a part of the type 'image_url' in its content: text alone is trained on",
        ),
        ({"messages": [{**USER, "content": [{"type": "text"}]}, SAYS]}, "has a part of the type 'text'"),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": CALL}]},
            r"number 2, that has calls of tools \(tool_calls\), which the training would lose",
        ),
        ({"messages": [USER, {**SAYS, "content": "", "tool_calls": CALL}]}, "has calls of tools"),
        ({"messages": [USER, {**SAYS, "tool_calls": CALL}, USER, SAYS]}, "number 2, that has calls of tools"),
        ({"messages": [USER, {**SAYS, "function_call": {"name": "f"}}]}, "has a call of a function"),
        ({"messages": [USER, {**SAYS, "reasoning_content": "hm"}]}, r"has reasoning .* \(reasoning_content\)"),
        ({"messages": [USER, {**SAYS, "thinking": "hm"}]}, r"has thinking beside its content"),
        ({"messages": [SYSTEM, USER, SAYS], "system": "Be long."}, "has a system prompt beside a system message"),
        ({"messages": [USER, {**SAYS, "weight": 0}]}, "has weight 0 on its last answer"),
        ({"messages": [USER, {**SAYS, "train": False}]}, "has train False on its last answer"),
        ({"messages": [USER, {**SAYS, "weight": 0.5}]}, "number 2, with weight 0.5: weights are 0 or 1"),
        ({"messages": [USER, {**SAYS, "weight": "1"}]}, "with weight '1': weights are 0 or 1"),
        ({"messages": [USER, {**SAYS, "weight": 1}, USER, SAYS]}, r"on an answer before the last \(message 2\)"),
        ({"prompt": [USER], "completion": [{**SAYS, "weight": 0}]}, "has weight 0 on its last answer"),
        ({"prompt": [USER], "completion": "a"}, "its completion is a text, and the other is a list of messages"),
        ({"prompt": "q", "completion": [SAYS]}, "its prompt is a text, and the other is a list of messages"),
        ({"prompt": [], "completion": [SAYS]}, "its prompt is a list without messages"),
        ({"prompt": [USER], "completion": [USER]}, "its completion holds a message of the user"),
        ({"messages": [USER, {**SAYS, "training": False}]}, "has training False on its last answer"),
        ({"messages": [USER, {**SAYS, "loss": 0}]}, "has loss 0 on its last answer"),
        ({"messages": [USER, {**SAYS, "loss_mask": 0}]}, "has loss_mask 0 on its last answer"),
        ({"messages": [USER, {**SAYS, "masked": True}]}, r"has a mask \(masked\)"),
        ({"messages": [{**USER, "image": "a.png"}, SAYS]}, r"has a picture \(image\)"),
        ({"messages": [USER, {**SAYS, "refusal": "No."}]}, "has a refusal beside its content"),
        ({"messages": [USER, {**SAYS, "role": "assistant\ud83d"}]}, "number 2, that has a lone surrogate"),
        ({"messages": [{**USER, "content": "a\ud83d"}, SAYS]}, r"a lone surrogate \(\\ud83d at character 2\)"),
    ],
)
def test_a_chat_that_cannot_be_learned_from_says_why(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        read(tmp_path, {"messages": [USER, SAYS]}, row)
    assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}, row 2 is no chat to learn from: it")
    assert "\n" not in str(error.value)
    error.value.args[0].encode()


@pytest.mark.parametrize(
    ("beside", "said"),
    [
        ({"tools": [{"name": "add"}]}, "has tools, which the training would lose"),
        ({"functions": [{"name": "add"}]}, "has functions, which the training would lose"),
        ({"images": ["a.png"]}, r"has pictures \(images\), which the training would lose"),
        ({"audio": "a.wav"}, r"has sound \(audio\), which the training would lose"),
    ],
)
@pytest.mark.parametrize(
    "row",
    [{"messages": [USER, SAYS]}, {"instruction": "q", "output": "a"}, {"prompt": "q", "completion": "a"}],
    ids=["chat", "instruction", "prompt"],
)
def test_what_stands_beside_a_row_is_not_lost(
    tmp_path: Path, row: dict[str, Any], beside: dict[str, Any], said: str
) -> None:
    assert len(read(tmp_path, {**row, "images": []})) == 1
    with pytest.raises(ValueError, match=f"row 2 {said}"):
        read(tmp_path, row, {**row, **beside})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"messages": [USER, SAYS], "history": [["a", "b"]]},
            "has history, for which the format of chats has no place",
        ),
        ({"messages": [USER, SAYS], "context": "Rome"}, "has context, for which the format of chats has no place"),
        ({"conversations": [HUMAN, GPT], "documents": [{"text": "a"}]}, "has documents, for which"),
        ({"prompt": [USER], "completion": [SAYS], "context": "Rome"}, "has context, for which the format of chats"),
        ({"messages": [USER, SAYS], "system": "a", "system_prompt": "b"}, "has a system and another system_prompt"),
        ({"messages": [USER, SAYS], "weight": 0}, "has weight 0, and all chats count alike"),
        ({"prompt": [USER], "completion": [SAYS], "sample_weight": 0.5}, "has sample_weight 0.5, and all chats count"),
        ({"prompt": "q", "completion": "a", "label": False}, "has label false, a completion that is not wanted"),
        ({"prompt": [], "completion": []}, "has a prompt without messages"),
        ({"prompt": USER, "completion": SAYS}, "has a message as its prompt that stands in no list"),
        ({"instruction": [USER], "output": [SAYS]}, "has messages as its instruction, which is a text"),
    ],
)
def test_a_row_that_would_lose_its_sense_is_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"row 1 {said}"):
        read(tmp_path, row)


@pytest.mark.parametrize("output", [[{"role": "judge", "name": "Ann"}], [{"from": "Rome", "to": "Bern"}]])
def test_objects_with_a_role_of_their_own_are_an_answer_and_no_chat(tmp_path: Path, output: Any) -> None:
    rows = {"prompt": "q", "completion": output}, {"prompt": "q", "completion": "a", "label": "x"}
    assert [row["completion"] for row in read(tmp_path, *rows)] == [json.dumps(output), "a"]
