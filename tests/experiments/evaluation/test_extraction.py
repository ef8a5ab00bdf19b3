"""Answers in generated texts, the odd ones among them."""

from __future__ import annotations

from typing import Any

import pytest

from ist.experiments.data import TASKS, TaskRow, make_row
from ist.experiments.evaluation import extract_answer, is_correct
from tests.helpers.task_rows import raw_row

# task, response, what `careful` finds, what `paper` finds
CASES: list[tuple[str, str, Any, Any]] = [
    # labels
    ("ARC-Easy", "the correct answer is answer2", "answer2", "answer2"),
    ("ARC-Easy", "answer3", "answer3", "answer3"),
    ("ARC-Easy", "  the correct answer is answer4.\n", "answer4", "answer4"),
    ("ARC-Easy", "", None, None),
    ("ARC-Easy", "I do not know.", None, None),
    ("ARC-Easy", "the correct answer is answer", None, None),
    ("ARC-Easy", "answer1 or answer2", "answer1", "answer1"),
    ("ARC-Easy", "the correct answer is answer3, not answer1", "answer3", "answer3"),
    ("ARC-Easy", "Answer1: iron Answer2: salt. the correct answer is answer2", "answer2", "answer2"),
    ("ARC-Easy", "Answer2", "answer2", None),
    ("ARC-Easy", "answer12", None, "answer1"),
    ("ARC-Easy", "answer5", None, "answer5"),
    ("ARC-Easy", "unanswer1able answer2", "answer2", "answer1"),
    ("ARC-Easy", "answer 2", None, None),
    ("ARC-Easy", "\n### Response:\nanswer2", None, "answer2"),
    ("ARC-Easy", "hm\n\n### Instruction:\nAnswer1: a answer2", None, "answer2"),
    ("boolq", "the correct answer is true", "true", "true"),
    ("boolq", "the correct answer is False.", "false", None),
    ("boolq", "TRUE", "true", None),
    ("boolq", "untrue, so false", "false", "true"),
    ("boolq", "true/false", "true", "true"),
    ("boolq", "yes", None, None),
    ("piqa", "the correct answer is solution2", "solution2", "solution2"),
    ("piqa", "solution3", None, None),
    ("hellaswag", "the correct answer is ending3 ending1", "ending3", "ending3"),
    ("winogrande", "the correct answer is option2", "option2", "option2"),
    ("social_i_qa", "the correct answer is answer1", "answer1", "answer1"),
    # numbers
    ("MultiArith", "\nA: 3 + 4 = 7. The answer is 7.", 7, 7),
    ("MultiArith", "The answer is 7. Check: 7 - 4 = 3.", 7, 3),
    ("MultiArith", "7", 7, 7),
    ("MultiArith", "3 + 4 = 7", 7, 7),
    ("MultiArith", "", None, None),
    ("MultiArith", "seven", None, None),
    ("MultiArith", "The answer is seven, 3 and 4.", 3, 4),
    ("MultiArith", "The answer is unknown", None, None),
    ("MultiArith", "First the answer is 5. No, the answer is 7", 7, 7),
    ("MultiArith", "The answer is 1,234.", 1234, 1234),
    ("MultiArith", "The answer is $1,234,567.50.", 1234567.5, 1234567.5),
    ("MultiArith", "It is 3,4", 3.4, 34),
    ("MultiArith", "It is 3, 4", 4, 4),
    ("MultiArith", "It is 1,2,3", 3, 123),
    ("MultiArith", "The answer is -12.", -12, -12),
    ("MultiArith", "The answer is −12.", -12, 12),
    ("MultiArith", "5-3", 3, -3),
    ("MultiArith", "The answer is 0.5", 0.5, 0.5),
    ("MultiArith", "The answer is .5", 0.5, 5),
    ("MultiArith", "The answer is -3.25 dollars.", -3.25, -3.25),
    ("MultiArith", "The answer is 20%.", 20, 20),
    ("MultiArith", "answer: 8", 8, 8),
    ("MultiArith", "The answer is 7.\n\n### Instruction:\nAnn has 9", 7, 9),
    ("MultiArith", "The answer is 1.25 + 1.25 = 2.5", 2.5, 2.5),
    ("MultiArith", "The answer is $1.25 + $1.25 = $2.50 a day for 3 days", 2.5, 3),
    ("MultiArith", "The answer is 2 apples + 3 apples = 5 apples.", 5, 5),
    ("MultiArith", "The answer is 10% of 30 = 3, not 7", 3, 7),
    ("MultiArith", "The answer is 3 x 4 - 5 = 7, and 9 more", 7, 9),
    ("MultiArith", "The answer is 5-3 = 2 for 8", 2, 8),
    ("MultiArith", "The answer is 7 (3 + 4 = 7 of 9)", 7, 9),
    ("MultiArith", "The answer is 7, as 3 * 2 = 6", 7, 6),
    ("MultiArith", "The answer is 3 + 4", 3, 4),
    ("MultiArith", "The answer must be 7 of 9", 7, 9),
    ("MultiArith", "The answer is 1/2", 0.5, 2),
    ("MultiArith", "1 1/2", 1.5, 2),
    ("MultiArith", "It was on 1/2/2020", 2020, 2020),
    ("MultiArith", "The answer is 1/2 + 1/4 = 3/4", 0.75, 4),
    ("MultiArith", "1.200,50", 1200.5, 1.2005),
    ("MultiArith", "0,125", 0.125, 125),
    ("MultiArith", "1'200", 1200, 200),
    ("MultiArith", "1\u202f200", 1200, 200),
    ("MultiArith", "It is -$3", -3, 3),
    ("MultiArith", "–3", -3, 3),
    ("MultiArith", "3–5", 5, 5),
    ("MultiArith", "The answer is 1.5e3", 1500, 3),
    ("MultiArith", "The answer is 2^3 = 8", 8, 8),
    ("MultiArith", "The answer is (10-4)*2 = 12 of 20", 12, 20),
    ("MultiArith", "The answer is 3 + 4 = 7 * 2 = 14", 14, 14),
    ("MultiArith", "#### 42", 42, 42),
    ("MultiArith", "12 apples\n#### 42\n3 of them", 42, 3),
    ("MultiArith", "\\boxed{42}, and 7 more", 42, 7),
    ("MultiArith", "**Answer**: 8, and 7 more", 8, 7),
    # a model that repeats itself, which some regular expressions never get to the end of
    ("MultiArith", "The answer is " + "1 + " * 300, 1, 1),
    ("MultiArith", "The answer is " + "$ 1  -  $ 1 apple x " * 100, 1, 1),
    ("AQuA", "- " * 20_000, None, None),
    ("AQuA", "*" * 40_000 + "B", "B", "B"),
    ("MultiArith", "The answer is " + "1 + " * 300 + "1 = 301", 301, 301),
    ("MultiArith", "The answer is " + "(1) + " * 300, 1, 1),
    ("MultiArith", "The answer is " + "1 = " * 300, 1, 1),
    ("word-problems", " 2 % of " * 200, 2, 2),
    ("gsm8k", "She has 4 left.\n#### 4", 4, 4),
    ("mawps", "The answer is 10.333333333333334.", 10.333333333333334, 10.333333333333334),
    # letters
    ("AQuA", "\nRationale: half of 4 is 2. The answer is (C).", "C", "C"),
    ("AQuA", "The answer is C", "C", "C"),
    ("AQuA", "Answer: (D)", "D", "A"),
    ("AQuA", "C", "C", "C"),
    ("AQuA", "(C) 38", "C", "C"),
    ("AQuA", "C) 38", "C", "C"),
    ("AQuA", "A car needs 2 hours. The answer is (E).", "E", "A"),
    ("AQuA", "A car needs 2 hours.", None, "A"),
    ("AQuA", "Because (A) is too small and (B) fits", "B", "B"),
    ("AQuA", "The answer is (B). The answer is (C).", "C", "B"),
    ("AQuA", "The answer is a number (B)", "B", "B"),
    ("AQuA", "36", None, None),
    ("AQuA", "", None, None),
    ("AQuA", "Calculate it", None, "C"),
    ("AQuA", "B because it is 10% off", "B", "B"),
    ("AQuA", "A because it is 10% off", "A", "A"),
    ("AQuA", "B, because (A) is too small", "B", "B"),
    ("AQuA", "B. Because (A) is too small and (C) too big", "B", "B"),
    ("AQuA", "(B) since option A is too small", "B", "B"),
    ("AQuA", "option B", "B", "B"),
    ("AQuA", "Option (D) is right", "D", "D"),
    ("AQuA", "I choose option B", "B", "B"),
    ("AQuA", "It must be choice D, as 4 is left", "D", "D"),
    ("AQuA", "Choice D because 4 is left", "D", "C"),
    ("AQuA", "The answer is option B", "B", "B"),
    ("AQuA", "The correct option is B because 4 is left", "B", "B"),
    ("AQuA", "The answer is A because 4 is left", "A", "A"),
    ("AQuA", "The answer must be (C)", "C", "C"),
    ("AQuA", "The answer is a car", None, None),
    ("AQuA", "E is right", "E", "E"),
    ("AQuA", "A is right", "A", "A"),
    ("AQuA", "Option of a car", None, None),
    ("AQuA", "(b)", "B", None),
    ("AQuA", "b) 38", "B", None),
    ("AQuA", "b.", "B", None),
    ("AQuA", "the answer is (b)", "B", None),
    ("AQuA", "The answer is a", "A", None),
    ("AQuA", "a car", None, None),
    ("AQuA", "**Answer**: B", "B", "A"),
    ("AQuA", "Answer: **B**", "B", "A"),
    ("AQuA", "$\\boxed{\\text{B}}$ and not (C)", "B", "B"),
    ("AQuA", "I think it is D.", "D", "D"),
    ("AQuA", "#### B", "B", "B"),
    ("AQuA", "It is A and B", None, "A"),
    ("AQuA", "(A) is wrong, (B) is right", "B", "A"),
    ("AQuA", "Option B is right; option A is wrong", "B", "B"),
    ("AQuA", "Of these, option B is it and option A is wrong", "B", "B"),
    ("AQuA", "Because 4 is left, the answer is letter D", "D", "B"),
    # the built-in task takes the first number
    ("word-problems", " 12 apples, 3 left", 12, 12),
    ("word-problems", " -3", -3, -3),
    ("word-problems", " 12 + 3 = 15, 4 left", 15, 15),
    ("word-problems", " none", None, None),
]


def row_of(name: str, answer: str = "1") -> TaskRow:
    if name in ("gsm8k", "word-problems"):
        return make_row(TASKS[name], {"instruction": "How many?", "answer": answer})
    return make_row(TASKS[name], raw_row(name))


@pytest.mark.parametrize(("name", "response", "careful", "paper"), CASES)
def test_the_answer_in_a_response(name: str, response: str, careful: Any, paper: Any) -> None:
    assert extract_answer(row_of(name), response) == careful
    assert extract_answer(row_of(name), response, "paper") == paper


@pytest.mark.parametrize(
    ("name", "label", "answer", "correct"),
    [
        ("boolq", "true", "true", True),
        ("boolq", "true", "false", False),
        ("boolq", "true", None, False),
        ("AQuA", "B", "B", True),
        ("AQuA", "B", None, False),
        ("mawps", "0.6666666666666666", 0.667, True),
        ("mawps", "0.6666666666666666", 0.66, False),
        ("mawps", "1,200", 1200.0, True),
        ("mawps", "12.0", 12.0, True),
        ("mawps", "-15.0", 15.0, False),
        ("mawps", "12", None, False),
        ("mawps", "12", float("inf"), False),
    ],
)
def test_what_is_right(name: str, label: str, answer: Any, correct: bool) -> None:
    row = make_row(TASKS[name], {**raw_row(name), "answer": label})
    assert is_correct(row, answer) is correct


def test_a_number_of_many_digits_is_an_answer() -> None:
    assert extract_answer(row_of("mawps"), "9" * 400) == float("inf")
