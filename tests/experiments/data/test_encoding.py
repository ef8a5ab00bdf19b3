"""Texts as tokens: cut, joined and padded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from ist.experiments.data.encoding import chat_end, encode_pair, encode_prompt, pad

CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.mark.parametrize(
    ("max_length", "prompt", "completion"),
    [
        (None, "abcdef", "ghi"),
        (9, "abcdef", "ghi"),
        (7, "cdef", "ghi"),
        (4, "f", "ghi"),
        (3, "f", "gh"),
        (2, "f", "g"),
    ],
)
def test_a_long_prompt_loses_its_beginning(
    tokenizer: Any, max_length: int | None, prompt: str, completion: str
) -> None:
    first, second = encode_pair(tokenizer, "abcdef", "ghi", max_length=max_length)
    assert (tokenizer.decode(first), tokenizer.decode(second)) == (prompt, completion)
    assert encode_prompt(tokenizer, "abcdef", 4) == tokenizer("cdef")["input_ids"]


def test_the_end_comes_once(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    ids = tokenizer("b")["input_ids"]
    assert encode_pair(tokenizer, "a", "b", end=True)[1] == [*ids, end]
    assert encode_pair(tokenizer, "a", "b<eos>", end=True)[1] == [*ids, end]
    assert encode_pair(tokenizer, "a", "b")[1] == ids


TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}<eos>;{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "completion"),
    [
        (TEMPLATE, "yes<eos>;"),
        ("!{{ messages|length }}" + TEMPLATE, "yes<eos>;"),
        ("!{{ messages|length }}" + TEMPLATE.replace("message.content", "message.content|upper"), "yes"),
        (TEMPLATE.replace("<eos>", ""), "yes;"),
    ],
)
def test_a_chat_goes_through_the_template(tokenizer: Any, template: str, completion: str) -> None:
    """The answer ends as the template ends it, also where that words the beginning anew; training adds nothing."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    first, second = encode_pair(tokenizer, CHAT, [{"role": "assistant", "content": "yes"}], end=True)
    assert tokenizer.decode(first).endswith("[assistant]")
    assert tokenizer.decode(second) == completion


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (TEMPLATE, "<eos>"),
        (TEMPLATE.replace("<eos>", "<|end|>"), "<|end|>"),
        (TEMPLATE.replace("<eos>;", " \n<|end|>\n<eos>"), "<|end|>"),
        (TEMPLATE.replace("<eos>", "{{ eos_token }}"), "<eos>"),
        (TEMPLATE.replace("<eos>", ""), None),
        (TEMPLATE.replace("message.content", "message.parts"), None),
        ("{{ raise_exception('no chats of text') }}", None),
        ("{{ messages[0].content.parts[0] }}", None),
        (None, None),
    ],
    ids=["eos", "another", "before eos", "by name", "plain text", "no content", "refused", "of parts", "no template"],
)
def test_the_token_that_ends_an_answer_in_a_chat(tokenizer: Any, template: str | None, end: str | None) -> None:
    """It need be neither the tokenizer's `eos_token` nor a special token."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<|end|>"])
    tokenizer.chat_template = template
    assert chat_end(tokenizer) == (None if end is None else tokenizer.convert_tokens_to_ids(end))


@pytest.mark.parametrize("template", [TEMPLATE, TEMPLATE.replace("<eos>", "<|end|>"), TEMPLATE.replace("<eos>", "")])
def test_rows_end_as_the_trainers_do(tokenizer: Any, tmp_path: Path, tiny_model_folder: Path, template: str) -> None:
    """TRL puts the tokenizer's end behind texts, and nothing behind what the template makes of chats."""
    import datasets
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens(["<|end|>"])
    tokenizer.chat_template = template
    rows = [
        {"prompt": CHAT, "completion": [{"role": "assistant", "content": "yes"}]},
        {"prompt": "ab", "completion": " c"},
    ]
    for row in rows:
        trainer: Any = SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_folder),
            args=SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
            train_dataset=datasets.Dataset.from_list([row]),
            processing_class=tokenizer,
        )
        first, second = encode_pair(tokenizer, row["prompt"], row["completion"], end=True)
        assert trainer.train_dataset[0]["input_ids"] == [*first, *second]


def test_a_completion_that_changes_the_last_token_of_its_prompt_is_taken_alone() -> None:
    class Merging:
        """A tokenizer that has a token of its own for "ab"."""

        eos_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(sign) for sign in text.replace("ab", "X")]}

    assert encode_pair(Merging(), "ca", "bd") == ([ord("c"), ord("a")], [ord("b"), ord("d")])
    assert encode_pair(Merging(), "c", "abd") == ([ord("c")], [ord("X"), ord("d")])


@pytest.mark.parametrize(
    ("side", "ids", "mask"),
    [
        ("left", [[9, 9, 1], [2, 3, 4]], [[0, 0, 1], [1, 1, 1]]),
        ("right", [[1, 9, 9], [2, 3, 4]], [[1, 0, 0], [1, 1, 1]]),
    ],
)
def test_padding(side: Any, ids: list[list[int]], mask: list[list[int]]) -> None:
    found = pad([[1], [2, 3, 4]], side, 9)
    assert torch.equal(found[0], torch.tensor(ids))
    assert torch.equal(found[1], torch.tensor(mask))
