"""Chats as data sets have them: `messages` of role and content, ShareGPT's `conversations`, and what is not trained on.

A chat becomes what comes before the last answer, and that answer. What that would change without a word, such as calls
of tools, pictures or weights of other answers, is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .values import check_characters, is_missing, text_field

__all__ = ["MEDIA", "are_messages", "is_message", "read_pair", "split_chat"]

Message = dict[str, str]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
"""The roles of ShareGPT's `from`."""

ROLES = {**SHAREGPT_ROLES, "model": "assistant", "bot": "assistant"}
"""Words for roles, and those of chat templates; a template may know others."""

MEDIA = {
    "image": "a picture",
    "images": "pictures",
    "audio": "sound",
    "audios": "sound",
    "video": "a video",
    "videos": "videos",
}
"""Fields of a message or of a row that no text holds, and what they are."""

NOT_TRAINED = {
    "tool_calls": "calls of tools",
    "function_call": "a call of a function",
    "reasoning_content": "reasoning beside its content",
    "reasoning": "reasoning beside its content",
    "thinking": "thinking beside its content",
    "thought": "thinking beside its content",
    "refusal": "a refusal beside its content",
    "masked": "a mask",
    "mask": "a mask",
    "train_detail": "weights of parts of its content",
    "training_detail": "weights of parts of its content",
    **MEDIA,
}
"""Fields of a message that its content lacks, and what they are."""

WEIGHTS = ("weight", "train", "trainable", "training", "loss", "loss_weight", "loss_mask")
"""Fields by which a message says whether it is trained on."""


def are_messages(value: Any) -> bool:
    """Whether a value is a list of messages, rather than a text or an answer that happens to be a list."""
    return isinstance(value, list) and any(map(is_message, value))


def is_message(value: Any) -> bool:
    """Whether a value is a message, rather than an object that has a role (`{"role": "judge", "name": "Ann"}`)."""
    if not isinstance(value, Mapping):
        return False
    role, origin = value.get("role"), value.get("from")
    known = any(isinstance(name, str) and name.strip().lower() in ROLES for name in (role, origin))
    return known or ("role" in value and "content" in value) or ("from" in value and "value" in value)


def split_chat(messages: Any, system: Any = None) -> tuple[list[Message], list[Message]]:
    """A chat as what comes before the last answer, and that answer.

    Args:
        messages: objects with role and content, or with from and value.
        system: a system prompt that stands beside the messages.

    Raises:
        ValueError: it is no chat that ends with an answer of the assistant, or says what is not trained on.
    """
    try:
        read = with_system(read_messages(messages), system)
        if not read:
            raise ValueError("has no messages")
        if read[-1]["role"] != "assistant":
            raise ValueError(
                f"ends with a message of the {read[-1]['role']}, not of the assistant: cut it after an answer"
            )
        if len(read) < 2:
            raise ValueError("has the assistant's message alone, and nothing that it answers")
        check_weights(messages)
    except ValueError as error:
        raise ValueError(f"is no chat to learn from: it {error}") from error
    return read[:-1], read[-1:]


def read_pair(prompt: Any, completion: Any, system: Any = None) -> tuple[list[Message], list[Message]]:
    """TRL's conversational prompt and completion, both lists of messages.

    Raises:
        ValueError: one of them is no such list, or the completion is not the assistant's.
    """
    for name, value in {"prompt": prompt, "completion": completion}.items():
        if not are_messages(value):
            kind = "a text" if isinstance(value, str) else f"a {type(value).__name__} without messages"
            raise ValueError(f"is no chat to learn from: its {name} is {kind}, and the other is a list of messages")
    try:
        asked, answers = with_system(read_messages(prompt), system), read_messages(completion)
        check_weights([*prompt, *completion])
    except ValueError as error:
        raise ValueError(f"is no chat to learn from: it {error}") from error
    others = [message["role"] for message in answers if message["role"] != "assistant"]
    if others:
        raise ValueError(
            f"is no chat to learn from: its completion holds a message of the {others[0]}, not of the assistant"
        )
    return asked, answers


def with_system(messages: list[Message], system: Any) -> list[Message]:
    """Messages with the system prompt that stands beside them before them."""
    if is_missing(system) or system == "":
        return messages
    if messages and messages[0]["role"] == "system":
        raise ValueError("has a system prompt beside a system message: keep one of them")
    return [{"role": "system", "content": text_field({"system": system}, "system")}, *messages]


def read_messages(messages: Any) -> list[Message]:
    """Messages as role and content.

    Raises:
        ValueError: they are no list, or one of them does not fit; the message names it, counted from 1.
    """
    if not isinstance(messages, list):
        raise ValueError(f"has messages that are a {type(messages).__name__}, not a list")
    read = []
    for number, message in enumerate(messages, start=1):
        try:
            read.append(read_message(message))
        except ValueError as error:
            raise ValueError(f"has a message, number {number}, that {error}") from error
    return read


def read_message(message: Any) -> Message:
    """The role and the text of one message; the error says what it has or lacks."""
    if not isinstance(message, Mapping):
        raise ValueError(f"is a {type(message).__name__}, not an object with role and content")
    for field, what in NOT_TRAINED.items():
        if message.get(field) not in (None, False, "", [], {}):
            raise ValueError(f"has {what} ({field}), which the training would lose: write them into its content")
    role, content = read_role(message), message.get("value" if is_sharegpt(message) else "content")
    text = join_parts(content) if isinstance(content, Sequence) and not isinstance(content, str) else content
    if is_missing(text):
        raise ValueError(f"is the {role}'s and lacks {'value' if is_sharegpt(message) else 'content'}")
    if not isinstance(text, str):
        raise ValueError(f"has a {type(text).__name__} as its content, not a text")
    check_characters(text)
    return {"role": role, "content": text}


def is_sharegpt(message: Mapping[str, Any]) -> bool:
    """Whether a message has ShareGPT's names; tables give null to the names that a row does without."""
    return not is_missing(message.get("from"))


def read_role(message: Mapping[str, Any]) -> str:
    """The role of a message, in the words of chat templates."""
    if is_sharegpt(message):
        role = SHAREGPT_ROLES.get(str(message["from"]).strip().lower())
        if role is None:
            raise ValueError(f"is from {message['from']!r}, which is none of {', '.join(SHAREGPT_ROLES)}")
        return role
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"lacks role (it has {', '.join(map(str, message)) or 'nothing'})")
    check_characters(role)
    return ROLES.get(role.strip().lower(), role)


def join_parts(parts: Sequence[Any]) -> str:
    """The text of content in parts, `[{"type": "text", "text": "a"}]`."""
    texts = []
    for part in parts:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, Mapping) else None
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        if kind not in ("text", "str", "input_text", "output_text") or not isinstance(text, str):
            raise ValueError(f"has a part of the type {kind!r} in its content: text alone is trained on")
        texts.append(text)
    if not texts:
        raise ValueError("has no parts in its content")
    return "".join(texts)


def check_weights(messages: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where weights ask for other than a training on the last answer alone."""
    for number, message in enumerate(messages, start=1):
        for field in WEIGHTS:
            weight = message.get(field)
            if is_missing(weight):
                continue
            if not isinstance(weight, (bool, int, float)) or weight not in (0, 1):
                raise ValueError(f"has a message, number {number}, with {field} {weight!r}: weights are 0 or 1")
            wanted = number == len(messages)
            role = message.get("from") if is_sharegpt(message) else message.get("role")
            answers = role not in ("user", "human", "system", "tool")
            if wanted and not weight:
                raise ValueError(
                    f"has {field} {weight!r} on its last answer, the one that is trained on: cut the chat before it"
                )
            if not wanted and weight and answers:
                raise ValueError(
                    f"has {field} {weight!r} on an answer before the last (message {number}), and the last alone is "
                    "trained on: give it 0, or add the chat once more, cut after that answer"
                )
