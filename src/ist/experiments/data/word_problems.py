"""One-step arithmetic word problems: a task that a small model learns in minutes and that can be checked exactly.

Every prompt holds two whole numbers and asks for their sum, difference, product or exact quotient. The templates of
the two splits are disjoint and worded differently, so that accuracy on `test` measures more than a learned sentence.
Numbers, names and objects come from the same pools in both.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .numbers import first_result

Operation = Literal["add", "subtract", "multiply", "divide"]
Split = Literal["train", "test"]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
SPLITS: tuple[Split, ...] = get_args(Split)

# fmt: off
_NAMES = (
    "Ana", "Ben", "Carla", "David", "Emma", "Finn", "Grace", "Hugo", "Iris", "Jack", "Kate",
    "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Zoe",
)
_THINGS = (
    "apples", "balloons", "beads", "books", "buttons", "candles", "cards", "coins", "cookies", "crayons", "eggs",
    "flowers", "marbles", "oranges", "pencils", "photos", "ribbons", "shells", "stamps", "stickers", "stones", "toys",
)
# fmt: on

_ANSWERS: dict[Operation, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a // b,
}

# The number pairs (a, b) of each operation. No number is 1, so that every noun is a plural; quotients are exact.
_NUMBERS: dict[Operation, tuple[tuple[int, int], ...]] = {
    "add": tuple((a, b) for a in range(2, 10) for b in range(2, 10)),
    "subtract": tuple((rest + b, b) for rest in range(2, 10) for b in range(2, 10)),
    "multiply": tuple((a, b) for a in range(2, 7) for b in range(2, 10)),
    "divide": tuple((quotient * b, b) for quotient in range(2, 7) for b in range(2, 10)),
}

# {a} and {b} are the operands in the order in which the operation takes them, wherever they stand in the sentence.
_TRAIN: dict[Operation, tuple[str, ...]] = {
    "add": (
        "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
        "There are {a} {things} on the table and {b} {things} on the floor. How many {things} are there in total?",
        "{name} found {a} {things} on Monday and {b} on Tuesday. How many {things} did {name} find altogether?",
        "{name} has {a} {things}. {other} has {b} {things}. How many {things} do they have together?",
        "A box holds {a} red {things} and {b} blue {things}. How many {things} does the box hold?",
        "{name} drove {a} miles before lunch and {b} miles after lunch. How many miles did {name} drive?",
        "A shop sold {a} {things} in the morning and {b} in the afternoon. How many {things} did the shop sell?",
        "{a} children were in the park when {b} more came. How many children are in the park now?",
        "A ticket costs {a} dollars and a drink costs {b} dollars. What is the price of both?",
        "{name} is {a} years old. How old will {name} be in {b} years?",
        "{name} put {a} {things} into a bag that already had {b} inside. How many {things} are in the bag?",
        "{name} read {a} pages yesterday and {b} pages today. How many pages is that in all?",
    ),
    "subtract": (
        "{name} had {a} {things} and lost {b}. How many {things} are left?",
        "{name} has {a} {things}. {name} gives {b} to {other}. How many {things} does {name} keep?",
        "There were {a} birds in a tree. {b} flew away. How many birds stayed?",
        "{name} has {a} {things} and {other} has {b}. How many more {things} does {name} have than {other}?",
        "A book has {a} pages. {name} has read {b} of them. How many pages remain?",
        "{name} had {a} dollars and spent {b} dollars on lunch. How much money is left?",
        "{a} people were on the bus. At the stop {b} got off. How many people are on the bus now?",
        "Of {a} {things}, {b} are broken. How many {things} are not broken?",
        "{name} wants {a} {things} and already has {b}. How many more does {name} need?",
        "The rope was {a} meters long before {name} cut off {b} meters. How long is it now?",
        "A shop had {a} {things} and sold {b} of them. How many {things} does the shop still have?",
        "{name} is {a} years old and {other} is {b}. How many years older is {name}?",
    ),
    "multiply": (
        "There are {a} boxes with {b} {things} in each. How many {things} are there in all?",
        "{name} buys {a} bags. Each bag has {b} {things}. How many {things} did {name} buy?",
        "One ticket costs {a} dollars. How much do {b} tickets cost?",
        "{name} runs {a} miles every day. How many miles does {name} run in {b} days?",
        "A room has {a} rows of {b} chairs. How many chairs are in the room?",
        "Each of {a} children has {b} {things}. How many {things} do the children have?",
        "{name} earns {a} dollars an hour. How much does {name} earn in {b} hours?",
        "{name} puts {b} {things} on each of {a} shelves. How many {things} are on the shelves?",
        "A farmer plants {a} rows with {b} trees per row. How many trees does the farmer plant?",
        "{name} reads {a} pages a night. How many pages does {name} read in {b} nights?",
        "A van carries {a} people. How many people do {b} vans carry?",
        "{name} makes {a} necklaces and uses {b} beads for each. How many beads does {name} use?",
    ),
    "divide": (
        "{name} shares {a} {things} equally among {b} friends. How many {things} does each friend get?",
        "{a} {things} are packed into {b} boxes, the same number in each. How many are in each box?",
        "{name} has {a} {things} and puts {b} in each bag. How many bags does {name} need?",
        "{b} tickets cost {a} dollars. How much is one ticket?",
        "{a} chairs stand in {b} equal rows. How many chairs are in a row?",
        "{name} ran {a} miles in {b} days, the same each day. How many miles a day is that?",
        "A class of {a} children splits into {b} equal teams. How many children are in a team?",
        "{name} earned {a} dollars in {b} hours. How much did {name} earn per hour?",
        "Each table seats {b} people. How many tables do {a} people need?",
        "A rope of {a} meters is cut into {b} equal pieces. How long is each piece?",
        "{name} reads a book of {a} pages at {b} pages a day. How many days does it take?",
        "{name} plants {a} trees with {b} in every row. How many rows are there?",
    ),
}
_TEST: dict[Operation, tuple[str, ...]] = {
    "add": (
        "In the garden grow {a} roses and {b} tulips. Counting every flower, what is the number?",
        "{name} walks {a} blocks to the store, then {b} blocks further to the library. How far is the whole walk?",
        "After winning {b} {things} at the fair, {name}, who owned {a} before, counts everything. What is the count?",
        "The kitchen needs {a} plates for adults plus {b} plates for children. What is the total number of plates?",
    ),
    "subtract": (
        "From a pile of {a} {things}, {name} takes away {b}. What is the size of the remaining pile?",
        "{a} guests were invited, but {b} could not come. How many guests came?",
        "A baker baked {a} loaves. By evening {b} had been eaten. What number of loaves was uneaten?",
        "The red tower is {a} feet tall, the blue tower {b} feet. What is the difference in height?",
    ),
    "multiply": (
        "Every week {name} saves {a} coins. What has {name} saved after {b} weeks?",
        "A garage has {a} levels, and {b} cars fit on every level. What is the number of cars when it is full?",
        "{name} bought {a} packs of gum at {b} dollars per pack. What did {name} pay?",
        "With {b} {things} per jar, what number of {things} fill {a} jars?",
    ),
    "divide": (
        "{b} cousins divide {a} {things} fairly. What is the share of every cousin?",
        "It takes {b} eggs to make a cake. With {a} eggs, how many cakes can {name} make?",
        "A teacher hands out {a} {things} evenly to {b} pupils. What does every pupil receive?",
        "An album has space for {b} photos on every page. What number of pages do {a} photos fill?",
    ),
}
_TEXTS: dict[Split, dict[Operation, tuple[str, ...]]] = {"train": _TRAIN, "test": _TEST}


@dataclass(frozen=True)
class WordProblem:
    """A question whose answer is one whole number; `template` numbers the sentence that it was made from."""

    prompt: str
    answer: int
    template: int
    operation: Operation


@dataclass(frozen=True)
class _Template:
    split: Split
    number: int
    operation: Operation
    text: str

    @property
    def slots(self) -> dict[str, Sequence[Any]]:
        """What may be chosen freely: the number pair, and every name and object that the text mentions."""
        slots: dict[str, Sequence[Any]] = {"numbers": _NUMBERS[self.operation]}
        for field, pool in {"name": _NAMES, "other": range(1, len(_NAMES)), "things": _THINGS}.items():
            if f"{{{field}}}" in self.text:
                slots[field] = pool
        return slots

    @property
    def num_problems(self) -> int:
        return math.prod(map(len, self.slots.values()))

    def problem(self, index: int) -> WordProblem:
        """The problem of one index in `range(num_problems)`: its digits in mixed radix choose from the slots."""
        fields: dict[str, Any] = {}
        for field, pool in self.slots.items():
            index, digit = divmod(index, len(pool))
            fields[field] = pool[digit]
        a, b = fields.pop("numbers")
        if "other" in fields:  # counted on from the first name, so that the two differ
            fields["other"] = _NAMES[(_NAMES.index(fields["name"]) + fields["other"]) % len(_NAMES)]
        prompt = self.text.format(a=a, b=b, **fields)
        return WordProblem(prompt, _ANSWERS[self.operation](a, b), self.number, self.operation)


def word_problems(
    num: int, *, split: Split = "train", seed: int = 0, operations: Sequence[Operation] = OPERATIONS
) -> list[WordProblem]:
    """Draw word problems: no prompt twice, templates (and so operations) as evenly as they can be, in random order.

    Args:
        num: how many problems, at least 1.
        split: `"train"` or `"test"`; the two share no template.
        seed: of a generator used by this call alone; equal arguments give equal problems.
        operations: the operations to draw from.

    Raises:
        ValueError: a value is out of its range, or `num` is more than the problems that exist.
    """
    templates = _templates(split, operations)
    available = sum(template.num_problems for template in templates)
    if not 1 <= num <= available:
        raise ValueError(f"num={num} word problems cannot be drawn; give a number from 1 to {available}.")
    generator = random.Random(seed)
    generator.shuffle(templates)  # who gets one problem more when num does not divide evenly
    problems = [
        template.problem(index)
        for template, count in zip(templates, _even_counts(num, templates), strict=True)
        for index in generator.sample(range(template.num_problems), count)
    ]
    generator.shuffle(problems)
    return problems


def to_prompt_completion(problem: WordProblem) -> dict[str, str]:
    """The strings that the model is trained on, in TRL's prompt-completion format; the trainer appends the end token.

    Generation starts from the same `"prompt"`. With SmolLM2's tokenizer both together take about 20 to 35 tokens.
    """
    return {"prompt": f"Question: {problem.prompt}\nAnswer:", "completion": f" {problem.answer}"}


def extract_integer(text: str) -> int | None:
    """The first number of `text` if it is whole ("-3", "1,200", "12.0"), else None (also when there is no number).

    Of a calculation ("3 + 4 = 7") the result counts.
    """
    number = first_result(text)
    return int(number) if number is not None and number.is_integer() else None


def exact_match(text: str, answer: int) -> bool:
    """Whether the first number of a generated `text` is `answer`."""
    return extract_integer(text) == answer


def _templates(split: Split, operations: Sequence[Operation]) -> list[_Template]:
    """The templates of a split, numbered through both splits, that belong to the given operations."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; choose one of {', '.join(SPLITS)}.")
    unknown = [operation for operation in operations if operation not in OPERATIONS]
    if unknown or not operations:
        raise ValueError(f"operations={operations!r} is not allowed; give a list of some of {', '.join(OPERATIONS)}.")
    numbered: list[_Template] = []
    for part in SPLITS:
        for operation in OPERATIONS:
            numbered += [
                _Template(part, len(numbered) + i, operation, text) for i, text in enumerate(_TEXTS[part][operation])
            ]
    return [template for template in numbered if template.split == split and template.operation in operations]


def _even_counts(num: int, templates: Sequence[_Template]) -> list[int]:
    """Share `num` among the templates: as evenly as can be, none above the number of its problems."""
    counts = [0] * len(templates)
    while left := num - sum(counts):
        open_templates = [i for i, template in enumerate(templates) if counts[i] < template.num_problems]
        for i in open_templates[:left]:
            share = max(1, left // len(open_templates))
            counts[i] += min(share, templates[i].num_problems - counts[i])
    return counts
