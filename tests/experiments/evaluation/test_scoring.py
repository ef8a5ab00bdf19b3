"""Log-likelihoods and losses against a naive twin: one sequence at a time, all logits, no padding, nothing shared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ist.experiments.data import TASKS, make_row, read_instructions
from ist.experiments.evaluation import evaluate
from ist.experiments.evaluation.likelihood import option_likelihoods, option_texts
from ist.experiments.evaluation.loss import completion_losses, losses, text_windows
from ist.experiments.evaluation.scoring import Continuations, by_length, score
from tests.helpers.task_rows import numbered_rows, raw_row
from tests.helpers.tiny import tiny_lora

OPTION_TASKS = ["boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "AQuA"]


@pytest.fixture(scope="module")
def loaded(tiny_model_folder: Path) -> tuple[Any, Any]:
    return (
        AutoModelForCausalLM.from_pretrained(tiny_model_folder).eval(),
        AutoTokenizer.from_pretrained(tiny_model_folder),
    )


@torch.no_grad()
def naive(model: Any, first: list[int], second: list[int]) -> float:
    logits = model(torch.tensor([[*first, *second]])).logits[0].log_softmax(-1)
    return sum(logits[len(first) - 1 + place, token].item() for place, token in enumerate(second))


@pytest.mark.parametrize("form", ["label", "text"])
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_option_likelihoods(loaded: tuple[Any, Any], form: Any, batch_size: int) -> None:
    model, tokenizer = loaded
    rows = [make_row(TASKS[name], raw_row(name)) for name in OPTION_TASKS]
    found = dict(
        pair for batch in option_likelihoods(model, tokenizer, rows, form=form, batch_size=batch_size) for pair in batch
    )
    for index, row in enumerate(rows):
        prompt, texts = option_texts(row, form)
        first = tokenizer(prompt)["input_ids"]
        expected = [naive(model, first, tokenizer(text)["input_ids"]) for text in texts]
        assert found[index] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "form", "prompt", "texts"),
    [
        ("ARC-Easy", "label", "paper", [f"the correct answer is answer{number}" for number in range(1, 5)]),
        ("boolq", "label", "paper", ["the correct answer is true", "the correct answer is false"]),
        ("AQuA", "label", "paper", [f"The answer is ({letter})." for letter in "ABCDE"]),
        ("winogrande", "text", "Question: The cup fell off the table because the _ was shaking.\nAnswer:",
         [" cup", " table"]),
        ("boolq", "text", "Question: is ice colder than steam?\nAnswer:", [" true", " false"]),
    ],
)  # fmt: skip
def test_what_is_scored(name: str, form: Any, prompt: str, texts: list[str]) -> None:
    row = make_row(TASKS[name], raw_row(name))
    assert option_texts(row, form) == (row.prompt if prompt == "paper" else prompt, texts)


def test_labels_share_their_forward_passes(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    rows = [make_row(TASKS["ARC-Easy"], raw_row("ARC-Easy"))] * 3
    sizes: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    list(option_likelihoods(model, tokenizer, rows, form="label", batch_size=8))
    list(option_likelihoods(model, tokenizer, rows, form="text", batch_size=8))
    hook.remove()
    assert sizes == [3, 8, 4]  # three rows; then twelve options


def test_only_the_logits_of_the_options_are_made(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    lengths: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda _, inputs, output: lengths.append(output.shape[1]))
    score(model, [Continuations(tuple(range(20)), 17, (3, 4)), Continuations(tuple(range(22)), 18, (5,))])
    hook.remove()
    assert lengths == [6]  # from position 16, which predicts token 17, to the last


@pytest.mark.parametrize("kind", ["absolute positions", "an adapter"])
def test_other_models(kind: str) -> None:
    torch.manual_seed(0)
    if kind == "an adapter":
        model: Any = tiny_lora().eval()
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=64, n_positions=32)).eval()
    batch = [Continuations((1, 2, 3, 4), 2, (5, 6)), Continuations((7,), 1, (8,)), Continuations((9, 10), 1, (11,))]
    assert [value for values in score(model, batch) for value in values] == pytest.approx(
        [
            naive(model, [1, 2], [3, 4, 5]),
            naive(model, [1, 2], [3, 4, 6]),
            naive(model, [7], [8]),
            naive(model, [9], [10, 11]),
        ],
        abs=1e-5,
    )


def test_long_completions_are_summed_in_parts(loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = loaded
    item = Continuations(tuple(range(2, 40)), 3, (50, 51))
    whole = score(model, [item])
    monkeypatch.setattr("ist.experiments.evaluation.scoring.CHUNK", 7)
    assert score(model, [item])[0] == pytest.approx(whole[0], abs=1e-5)


def test_the_loss_of_completions_is_the_trainers(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    """The mean over all completion tokens, the end among them, as cross entropy has it."""
    model, tokenizer = loaded
    (tmp_path / "rows.csv").write_text("instruction,output\nSay a.,a bc\nSay the long word.,d\n")
    rows = read_instructions([tmp_path / "rows.csv"])
    found = evaluate(model, tokenizer, {"rows": rows}, "loss", batch_size=2)["rows"]
    total, tokens = 0.0, 0
    for row in rows:
        first = tokenizer(row["prompt"])["input_ids"]
        second = [*tokenizer(row["completion"])["input_ids"], tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(first) + second])
        with torch.no_grad():
            loss = model(torch.tensor([[*first, *second]]), labels=labels).loss
        total += loss.item() * len(second)
        tokens += len(second)
    assert found.to_dict()["loss"] == pytest.approx(total / tokens, abs=1e-5)
    assert found.to_dict()["tokens"] == tokens == 7
    assert found.to_dict()["perplexity"] == pytest.approx(torch.tensor(total / tokens).exp().item(), rel=1e-4)


@pytest.mark.parametrize(
    ("window", "stride", "spans"),
    [
        (4, None, [(0, 1, 4), (3, 4, 8), (7, 8, 10)]),
        (4, 4, [(0, 1, 4), (3, 4, 8), (7, 8, 10)]),
        (4, 2, [(0, 1, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]),
        (4, 3, [(0, 1, 4), (3, 4, 7), (6, 7, 10)]),
        (10, None, [(0, 1, 10)]),
        (64, None, [(0, 1, 10)]),
        (2, 1, [(0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (4, 5, 6), (5, 6, 7), (6, 7, 8), (7, 8, 9), (8, 9, 10)]),
    ],
)
def test_windows_predict_every_token_once(
    loaded: tuple[Any, Any], window: int, stride: int | None, spans: list[tuple[int, int, int]]
) -> None:
    """A span is where a window begins, its first predicted token, and where it ends."""
    model, tokenizer = loaded
    text = "0123456789"
    ids = tokenizer(text)["input_ids"]
    items = text_windows(tokenizer, text, window, stride)
    assert items == [
        Continuations(tuple(ids[begin : end - 1]), start - begin, (ids[end - 1],)) for begin, start, end in spans
    ]
    found = sorted(value for batch in losses(model, items, batch_size=2) for value in batch)
    expected = [-naive(model, ids[begin:start], ids[start:end]) for begin, start, end in spans]
    assert [loss for _, loss, _ in found] == pytest.approx(expected, abs=1e-4)
    assert sum(tokens for *_, tokens in found) == len(ids) - 1


@pytest.mark.parametrize(
    ("text", "window", "stride", "said"),
    [
        ("abc", 1, None, "window=1 and stride=1 do not fit"),
        ("abc", 4, 5, "window=4 and stride=5 do not fit"),
        ("abc", 4, 0, "window=4 and stride=0 do not fit"),
        ("a", 4, None, "The text has 1 tokens: there is nothing to predict"),
    ],
)
def test_windows_that_do_not_fit(loaded: tuple[Any, Any], text: str, window: int, stride: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        text_windows(loaded[1], text, window, stride)


def test_rows_that_are_done_are_passed_over(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    rows = [make_row(TASKS["boolq"], row) for row in numbered_rows(7)]
    done = {0, 3, 6}
    found = [
        index for batch in option_likelihoods(model, tokenizer, rows, batch_size=2, done=done) for index, _ in batch
    ]
    assert sorted(found) == [1, 2, 4, 5]
    items = completion_losses(tokenizer, [row.to_prompt_completion() for row in rows])
    assert sorted(index for batch in losses(model, items, batch_size=2, done=done) for index, *_ in batch) == [
        1,
        2,
        4,
        5,
    ]


@pytest.mark.parametrize(
    ("lengths", "batches"),
    [([], []), ([1, 3, 2], [[1, 2], [0]]), ([2, 2, 2], [[0, 1], [2]]), ([1, 1, 5, 4], [[2, 3], [0, 1]])],
)
def test_batches_are_of_like_lengths(lengths: list[int], batches: list[list[int]]) -> None:
    assert by_length(lengths, 2) == batches


def test_rows_without_a_prompt_or_an_answer_count_by_their_tokens(loaded: tuple[Any, Any]) -> None:
    """The first token of a text without a prompt is not predicted; a row of one token counts as none, not as 0."""
    model, tokenizer = loaded
    rows = [
        {"prompt": "", "completion": "abc"},
        {"prompt": "ab", "completion": "c"},
        {"prompt": "", "completion": ""},
    ]
    items = completion_losses(tokenizer, rows)
    found = {index: (loss, tokens) for batch in losses(model, items) for index, loss, tokens in batch}
    ids, end = list(tokenizer("abc")["input_ids"]), tokenizer.eos_token_id
    with torch.no_grad():
        expected = {0: -naive(model, ids[:1], [*ids[1:], end]), 1: -naive(model, ids[:2], [ids[2], end])}
    assert {index: tokens for index, (_, tokens) in found.items()} == {0: 3, 1: 2}
    assert {index: loss for index, (loss, _) in found.items()} == pytest.approx(expected, abs=1e-4)
    result = evaluate(model, tokenizer, {"mine": rows}, "loss")["mine"]
    assert result.to_dict()["loss"] == pytest.approx(sum(expected.values()) / 5, abs=1e-5)
    with pytest.raises(ValueError, match="None of 1 rows has a token to predict"):
        completion_losses(tokenizer, rows[2:])
