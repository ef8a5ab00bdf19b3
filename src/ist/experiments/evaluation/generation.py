"""Answers by generation, in batches padded on the left."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from ...runtime.modes import evaluation_mode
from ...runtime.randomness import private_randomness
from ..data.encoding import Text, encode_prompt, pad
from ..data.word_problems import WordProblem, exact_match, to_prompt_completion
from .ends import answer_ends, base_of, until_end
from .scoring import by_length

__all__ = ["GREEDY", "PAPER", "Answer", "Generation", "exact_answers", "generate_texts"]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How an answer is generated."""

    num_beams: int = 1
    do_sample: bool = False
    """Draw tokens at random; without it, `temperature`, `top_p` and `top_k` have no effect."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.num_beams < 1:
            raise ValueError(f"num_beams={self.num_beams} is not at least 1: write 1 for greedy answers.")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} is not above 0: leave sampling out for greedy answers.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is no probability above 0 and up to 1: leave it out for all tokens.")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} is not at least 0: leave it out for all tokens.")

    def arguments(self) -> dict[str, Any]:
        """What `generate` takes, whatever the model's own defaults are."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        if self.do_sample:
            drawn = {name: value for name, value in drawn.items() if value is not None}
        else:
            drawn = dict.fromkeys(drawn)
        return {"num_beams": self.num_beams, "do_sample": self.do_sample, **drawn}


GREEDY = Generation()
PAPER = Generation(num_beams=4, temperature=0.1, top_p=0.75, top_k=40)
"""The values of LLM-Adapters' evaluation scripts, which sample nothing: four beams are what has an effect."""


@torch.no_grad()
def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    *,
    max_new_tokens: int,
    generation: Generation = GREEDY,
    batch_size: int = 32,
    max_length: int | None = None,
    seed: int = 0,
    done: Iterable[int] = (),
) -> Iterator[list[tuple[int, str]]]:
    """What a model says after prompts, batch after batch; prompts of like lengths go together.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: the model's.
        prompts: texts or chats.
        max_new_tokens: tokens generated for each.
        generation: how.
        batch_size: prompts generated at once.
        max_length: most tokens of a prompt; a longer one loses its beginning.
        seed: of what is drawn at random, by a generator of its own for every batch.
        done: indices of prompts to pass over.

    Yields:
        Indices and texts of some prompts, without the prompts, the token that ended the answer and what is behind it.
    """
    done = set(done)
    ids = [encode_prompt(tokenizer, prompt, max_length) for prompt in prompts]
    ends = answer_ends(model, tokenizer, chats=any(not isinstance(prompt, str) for prompt in prompts))
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, *ends)
    padding = next((token for token in candidates if token is not None), 0)  # hidden by the mask, whatever it is
    for number, batch in enumerate(by_length(list(map(len, ids)), batch_size)):
        if generation.do_sample and not done.issuperset(batch):
            wanted = batch  # what is drawn depends on the whole batch
        else:
            wanted = [index for index in batch if index not in done]
        if not wanted:
            continue
        inputs, mask = pad([ids[index] for index in wanted], "left", padding)
        with private_randomness(seed + number, model.device), without_defaults(model, ends):
            generated = model.generate(
                input_ids=inputs.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=max_new_tokens,
                pad_token_id=padding,
                use_cache=True,
                **generation.arguments(),
            )
        answers = [until_end(row, ends) for row in generated[:, inputs.shape[1] :].tolist()]
        texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
        yield [(index, text) for index, text in zip(wanted, texts, strict=True) if index not in done]


@contextmanager
def without_defaults(model: Any, ends: Sequence[int]) -> Iterator[None]:
    """Within the block, of the model's `generation_config` the special tokens alone count, and these end an answer.

    Models come with a penalty on repetition, with several sequences to return and with other things that would change
    the answers of one model and not of another.
    """
    base = base_of(model)
    former = getattr(base, "generation_config", None)
    if former is None:
        yield
        return
    names = ("bos_token_id", "pad_token_id", "decoder_start_token_id")
    special = {name: getattr(former, name, None) for name in names}
    base.generation_config = GenerationConfig(**special, eos_token_id=list(ends) or None)
    try:
        yield
    finally:
        base.generation_config = former


@dataclass(frozen=True)
class Answer:
    """What a model said to one problem."""

    prompt: str
    expected: int
    text: str
    """What the model generated, without the prompt."""
    correct: bool


def exact_answers(
    model: Any, tokenizer: Any, problems: Sequence[WordProblem], *, batch_size: int = 32, max_new_tokens: int = 8
) -> list[Answer]:
    """Let a causal language model answer word problems, and compare its first number with the right one.

    Args:
        model: a causal language model; its mode is restored.
        tokenizer: the model's tokenizer; nothing of it is changed.
        problems: what to ask.
        batch_size: problems generated at once.
        max_new_tokens: tokens generated for each.

    Returns:
        One answer for each problem, in order.
    """
    prompts = [to_prompt_completion(problem)["prompt"] for problem in problems]
    texts: dict[int, str] = {}
    with evaluation_mode(model):
        for batch in generate_texts(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size):
            texts.update(batch)
    return [
        Answer(prompt, problem.answer, texts[index], exact_match(texts[index], problem.answer))
        for index, (problem, prompt) in enumerate(zip(problems, prompts, strict=True))
    ]
