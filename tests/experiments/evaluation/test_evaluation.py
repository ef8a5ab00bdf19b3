"""Exact answers by greedy generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ist.experiments.data.word_problems import exact_match, word_problems
from ist.experiments.evaluation import exact_answers

PROBLEMS = word_problems(5, split="test", seed=3)


@pytest.fixture
def model_and_tokenizer(tiny_model_folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder), AutoTokenizer.from_pretrained(tiny_model_folder)


def test_a_batch_answers_as_one_by_one(model_and_tokenizer: tuple[Any, Any]) -> None:
    """Prompts of different lengths are padded on the left, and the padding changes no answer."""
    model, tokenizer = model_and_tokenizer
    together = exact_answers(model, tokenizer, PROBLEMS, batch_size=5, max_new_tokens=4)
    alone = exact_answers(model, tokenizer, PROBLEMS, batch_size=1, max_new_tokens=4)
    assert len({len(problem.prompt) for problem in PROBLEMS}) > 1
    assert together == alone
    assert [answer.expected for answer in together] == [problem.answer for problem in PROBLEMS]
    assert all(not answer.text.startswith(answer.prompt[:10]) for answer in together)


def test_correct_means_that_the_first_number_is_right(model_and_tokenizer: tuple[Any, Any]) -> None:
    model, tokenizer = model_and_tokenizer
    said = {PROBLEMS[0].prompt: f" {PROBLEMS[0].answer}.", PROBLEMS[1].prompt: " 99999 "}

    def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
        prompts = tokenizer.batch_decode(input_ids, skip_special_tokens=True)
        texts = [said[prompt.removeprefix("Question: ").removesuffix("\nAnswer:")] for prompt in prompts]
        answers = tokenizer(texts, return_tensors="pt", padding=True)["input_ids"]
        return torch.cat([input_ids, answers], dim=1)

    model.generate = generate
    answers = exact_answers(model, tokenizer, PROBLEMS[:2])
    assert [answer.correct for answer in answers] == [True, False]
    assert all(answer.correct == exact_match(answer.text, answer.expected) for answer in answers)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_padding_side_are_put_back(model_and_tokenizer: tuple[Any, Any], training: bool) -> None:
    model, tokenizer = model_and_tokenizer
    model.train(training)
    tokenizer.padding_side = "right"
    model.generate = lambda **_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        exact_answers(model, tokenizer, PROBLEMS)
    assert (model.training, tokenizer.padding_side) == (training, "right")
