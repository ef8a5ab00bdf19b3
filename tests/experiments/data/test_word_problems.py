"""The built-in task: every answer is recomputed, the splits share no sentence, and answers are read as people would."""

from __future__ import annotations

import ast
import importlib
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

from ist.experiments.data import (
    OPERATIONS,
    WordProblem,
    exact_match,
    extract_integer,
    to_prompt_completion,
    word_problems,
)
from ist.experiments.data.word_problems import Operation, Split

# The package exports a function of the same name.
module = importlib.import_module("ist.experiments.data.word_problems")

# From the larger and the smaller number of a prompt, whatever their order in the sentence.
INDEPENDENT_ANSWERS = {
    "add": lambda large, small: large + small,
    "subtract": lambda large, small: large - small,
    "multiply": lambda large, small: large * small,
    "divide": lambda large, small: large / small,
}
PINNED = [
    ("A teacher hands out 36 books evenly to 9 pupils. What does every pupil receive?", 4),
    ("Hugo bought 3 packs of gum at 2 dollars per pack. What did Hugo pay?", 6),
]
WORDS_OF_A_SLOT = re.compile(r"[0-9]+|\b(" + "|".join(module._NAMES + module._THINGS) + r")\b")


def templates(split: str) -> list:
    return module._templates(split, OPERATIONS)


def trigrams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"[a-z{}]+", text.lower())
    return set(zip(words, words[1:], words[2:], strict=False))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_answer_follows_from_the_numbers_of_its_prompt(split: Split, operation: Operation) -> None:
    problems = word_problems(1000, split=split, seed=3, operations=[operation])
    for problem in problems:
        numbers = sorted((int(number) for number in re.findall(r"[0-9]+", problem.prompt)), reverse=True)
        assert len(numbers) == 2, problem
        assert problem.answer == INDEPENDENT_ANSWERS[operation](*numbers), problem
        assert problem.operation == operation
        assert problem.answer >= 2
        assert min(numbers) >= 2


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_number_pair_of_every_template_has_a_whole_positive_answer(split: str) -> None:
    for template in templates(split):
        for a, b in template.slots["numbers"]:
            assert module._ANSWERS[template.operation](a, b) == INDEPENDENT_ANSWERS[template.operation](a, b) > 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_prompts_are_unique_and_finished_sentences(split: Split) -> None:
    problems = word_problems(5000, split=split)
    assert len({problem.prompt for problem in problems}) == 5000
    for problem in problems:
        assert re.fullmatch(r"[A-Z0-9][A-Za-z0-9 ,.]*\?", problem.prompt), problem


def test_a_problem_with_two_names_has_two_different_ones() -> None:
    two_names = [template for template in templates("train") if "{other}" in template.text]
    assert two_names
    for template in two_names:
        for index in range(0, template.num_problems, 101):
            prompt = template.problem(index).prompt
            assert len(set(re.findall(r"\b(?:" + "|".join(module._NAMES) + r")\b", prompt))) == 2, prompt


@pytest.mark.parametrize(
    "arguments",
    [{}, {"split": "test"}, {"seed": 7}, {"operations": ["add"]}, {"split": "test", "operations": ["divide", "add"]}],
)
def test_equal_arguments_give_equal_problems(arguments: dict) -> None:
    assert word_problems(50, **arguments) == word_problems(50, **arguments)


def test_the_seed_changes_the_problems_and_the_global_generator_does_not() -> None:
    first = word_problems(50, seed=0)
    assert first != word_problems(50, seed=1)
    random.seed(123)
    state = random.getstate()
    assert word_problems(50, seed=0) == first
    assert random.getstate() == state


def test_the_problems_of_a_seed_are_pinned() -> None:
    """A recorded accuracy belongs to these problems: changing them on purpose means measuring again."""
    assert [(problem.prompt, problem.answer) for problem in word_problems(2, split="test", seed=0)] == PINNED


def test_enough_templates_and_the_splits_share_none() -> None:
    train, test = templates("train"), templates("test")
    assert len(train) >= 40
    assert len(test) >= 10
    numbers = [template.number for template in train + test]
    assert numbers == list(range(len(numbers)))
    assert set(Counter(template.operation for template in test)) == set(OPERATIONS)


def test_no_held_out_sentence_is_built_like_a_training_sentence() -> None:
    for held_out in templates("test"):
        for trained in templates("train"):
            one, other = trigrams(held_out.text), trigrams(trained.text)
            assert len(one & other) / len(one | other) < 0.25, (held_out.text, trained.text)


def test_the_skeletons_of_drawn_prompts_are_disjoint() -> None:
    skeletons = {
        split: {WORDS_OF_A_SLOT.sub("_", problem.prompt) for problem in word_problems(2000, split=split)}
        for split in ("train", "test")
    }
    assert not skeletons["train"] & skeletons["test"]


@pytest.mark.parametrize("num", [1, 5, 48, 100, 1001])
def test_templates_are_drawn_evenly(num: int) -> None:
    counts = Counter(problem.template for problem in word_problems(num))
    all_counts = [counts[template.number] for template in templates("train")]
    assert sum(all_counts) == num
    assert max(all_counts) - min(all_counts) <= 1


def test_all_problems_of_an_operation_can_be_drawn_and_not_one_more() -> None:
    available = sum(template.num_problems for template in module._templates("test", ["divide"]))
    everything = word_problems(available, split="test", operations=["divide"])
    assert len({problem.prompt for problem in everything}) == available
    with pytest.raises(ValueError, match=f"num={available + 1} .* from 1 to {available}"):
        word_problems(available + 1, split="test", operations=["divide"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num": 0}, "num=0 .* from 1 to"),
        ({"num": -3}, "num=-3 .* from 1 to"),
        ({"num": 10**9}, "num=1000000000 .* from 1 to"),
        ({"num": 5, "split": "validation"}, "split='validation' is unknown; choose one of train, test"),
        ({"num": 5, "operations": []}, r"operations=\[\] is not allowed"),
        ({"num": 5, "operations": ["add", "power"]}, "power.*add, subtract, multiply, divide"),
        ({"num": 5, "operations": "add"}, "operations='add' is not allowed; give a list"),
    ],
)
def test_bad_values_are_refused_in_one_line(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        word_problems(**arguments)
    assert "\n" not in str(error.value)


def test_prompt_and_completion_are_the_training_strings() -> None:
    problem = WordProblem("Ana has 2 eggs and gets 3 more. How many eggs?", 5, 0, "add")
    assert to_prompt_completion(problem) == {
        "prompt": "Question: Ana has 2 eggs and gets 3 more. How many eggs?\nAnswer:",
        "completion": " 5",
    }


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_completion_is_read_back_as_the_answer(split: Split) -> None:
    for problem in word_problems(200, split=split):
        assert exact_match(to_prompt_completion(problem)["completion"], problem.answer)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" 12", 12),
        ("12", 12),
        ("The answer is 12 apples.", 12),
        ("12.", 12),
        ("12.0", 12),
        ("12.00 dollars", 12),
        ("12.5", None),
        (".5", None),
        ("about .0", 0),
        ("007", 7),
        ("0", 0),
        ("-3", -3),
        (" -3.0", -3),
        ("−3", -3),
        ("10-3", 10),
        ("route-7", 7),
        ("answer3", 3),
        ("$12", 12),
        ("1,234", 1234),
        ("1,234,567.0", 1234567),
        ("1,2", None),
        ("1, 234", 1),
        ("12,3456", None),
        ("9" * 400, None),
        ("3 + 4 = 7", 7),
        ("3 + 4", 3),
        ("12 - 5 = 7 apples, 3 left", 7),
        ("12\n13", 12),
        ("twelve", None),
        ("", None),
        ("-", None),
        ("...", None),
        ("٣", None),
    ],
)
def test_extract_integer(text: str, expected: int | None) -> None:
    assert extract_integer(text) == expected


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        (" 12", 12, True),
        (" 12.0", 12, True),
        (" 13", 12, False),
        ("", 0, False),
        ("112", 12, False),
        ("-12", 12, False),
    ],
)
def test_exact_match(text: str, answer: int, expected: bool) -> None:
    assert exact_match(text, answer) is expected


def test_the_module_imports_the_standard_library_alone() -> None:
    nodes = list(ast.walk(ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8"))))
    names = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    names |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names
