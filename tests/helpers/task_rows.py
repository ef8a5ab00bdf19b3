"""Rows of the paper's formats, made for the tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

INSTRUCTIONS: dict[str, tuple[str, str]] = {
    "boolq": (
        "Please answer the following question with true or false, question: is ice colder than steam?\n\n"
        "Answer format: true/false",
        "true",
    ),
    "piqa": (
        "Please choose the correct solution to the question: dry a wet plate\n\nSolution1: wipe it with a towel\n\n"
        "Solution2: hold it under the tap\n\nAnswer format: solution1/solution2",
        "solution1",
    ),
    "social_i_qa": (
        "Please choose the correct answer to the question: Kim lost a key. What will Kim do?\n\nAnswer1: sing "
        "Answer2: look for it Answer3: paint a door\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    ),
    "hellaswag": (
        "Please choose the correct ending to complete the given sentence: Baking: A man kneads dough. He\n\n"
        "Ending1: eats a chair. Ending2: flies away. Ending3: puts it into the oven. Ending4: reads it aloud.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending3",
    ),
    "winogrande": (
        "Please choose the correct answer to fill in the blank to complete the given sentence: The cup fell off the "
        "table because the _ was shaking.\n\nOption1: cup Option2: table Answer format: option1/option2",
        "option2",
    ),
    "ARC-Easy": (
        "Please choose the correct answer to the question: Which of these is a liquid at room temperature?\n\n"
        "Answer1: iron Answer2: salt Answer3: oxygen Answer4: water\n\nAnswer format: answer1/answer2/answer3/answer4",
        "answer4",
    ),
    "AQuA": (
        "A shirt of $40 is sold at 10% off (sale (A)). What does it cost? Answer Choices: (A) 30 (B) 36 (C) 38 (D) 40 "
        "(E) 44",
        "B",
    ),
    "MultiArith": (" Ann has 3 nuts and finds 4 more. How many has she now? ", "7.0"),
    "mawps": ("A bill was 3.5 dollars lower than 2 dollars . What was it ?", "-1.5"),
}
OUTPUTS = {
    "AQuA": "\nRationale: A tenth of 40 is 4, and 40 - 4 is 36.The answer is (B).",
    "MultiArith": "\nA: 3 + 4 = 7. The answer is 7.",
    "mawps": "",
}


def raw_row(name: str) -> dict[str, Any]:
    instruction, answer = INSTRUCTIONS[name]
    output = OUTPUTS.get(name, f"the correct answer is {answer}")
    return {"instruction": instruction, "input": "", "output": output, "answer": answer}


def numbered_rows(num: int, first: int = 0) -> list[dict[str, Any]]:
    """Questions of different lengths with two options."""
    return [
        {
            "instruction": f"Please answer the following question with true or false, question: is {number} "
            f"{'very ' * (number % 4)}big?\n\nAnswer format: true/false",
            "input": "",
            "output": f"the correct answer is {str(number % 2 == 0).lower()}",
            "answer": str(number % 2 == 0).lower(),
        }
        for number in range(first, first + num)
    ]


def write_collection(folder: Path, tasks: dict[str, list[dict[str, Any]]], split: str = "test") -> Path:
    for name, rows in tasks.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{split}.json").write_text(json.dumps(rows), encoding="utf-8")
    return folder
