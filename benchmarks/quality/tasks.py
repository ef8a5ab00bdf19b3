"""The tasks: rows to train on, rows that choose the learning rate, and tests; tokens are made once and shared."""

from __future__ import annotations

import hashlib
import json
import pickle
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ist.experiments.data import TASKS, Option, Task, TaskRow, read_task, without_contamination
from ist.experiments.data.encoding import encode_pair
from ist.experiments.evaluation.likelihood import option_texts
from ist.experiments.evaluation.loss import completion_losses, text_windows
from ist.experiments.evaluation.scoring import Continuations

__all__ = [
    "PREPARE",
    "Choice",
    "Prepared",
    "Test",
    "prepare",
    "prepared_file",
]

COMMONSENSE = ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")
"""Those of the paper's eight whose training and test sets are at hand."""
SENTIMENT = Task(name="sst2", family="sentiment", kind="label", max_new_tokens=4, prefix=" ")
LABELS = ("negative", "positive")
FORMAT = 3  # counts changes of what is prepared
PROBE = "It's 12.5 unbelievably long; naïve words."  # tells tokenizers apart


@dataclass(frozen=True)
class Choice:
    """A question and its options in tokens: options that differ in their last token alone stand together."""

    parts: tuple[tuple[Continuations, tuple[int, ...]], ...]
    """Each with the indices of the options that it holds."""
    right: int
    """The index of the right option."""


@dataclass(frozen=True)
class Test:
    """What a trained model is tested by."""

    protocol: str
    """`generate`, `likelihood` or `loss`, as of `ist.experiments.evaluation.evaluate`."""
    data: Sequence[Any]
    """Rows for `generate`, a `Choice` each for `likelihood`, tokens for `loss`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the evaluation."""


@dataclass(frozen=True)
class Prepared:
    """A task in tokens."""

    name: str
    train: list[Continuations]
    validation: list[Continuations]
    tests: dict[str, Test]
    """By the name of the figure."""
    counts: dict[str, int]
    """Rows of each part, and training rows that were left out because they are test or validation rows."""


@dataclass(frozen=True)
class Rows:
    """A task in texts."""

    train: Sequence[TaskRow]
    validation: Sequence[TaskRow]
    tests: Mapping[str, tuple[str, Sequence[TaskRow]]]
    """Protocol and rows by name."""


def prepare(name: str, data: str | Path, tokenizer: Any, setting: Mapping[str, Any], folder: str | Path) -> Path:
    """Read a task and turn it into tokens, unless that was done already.

    Args:
        name: a key of `PREPARE`.
        data: the folder with `commonsense`, `math`, `sst2` and `wikitext-2`.
        tokenizer: the model's.
        setting: of the trainings; lengths and numbers of rows count here.
        folder: where the file goes.

    Returns:
        The file, a pickled `Prepared`.

    Raises:
        ValueError: there is no such task, or its files are not there.
    """
    file = prepared_file(name, tokenizer, setting, folder)
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        work = file.with_suffix(".part")
        work.write_bytes(pickle.dumps(PREPARE[name](Path(data), tokenizer, setting)))
        work.replace(file)
    return file


def prepared_file(name: str, tokenizer: Any, setting: Mapping[str, Any], folder: str | Path) -> Path:
    """The file of a task, named by a digest of what its tokens depend on. It can be made on one machine and used on
    another.

    Raises:
        ValueError: there is no such task.
    """
    if name not in PREPARE:
        raise ValueError(f"task={name!r} is unknown: choose some of {', '.join(PREPARE)}.")
    names = ("max_length", "train_rows", "validation_rows", "test_rows")
    parts = [FORMAT, tokenizer(PROBE)["input_ids"], *(setting[name] for name in names)]
    code = hashlib.blake2b(json.dumps(parts).encode(), digest_size=4).hexdigest()
    return Path(folder) / f"{name}-{code}.pkl"


def from_rows(name: str, rows: Rows, tokenizer: Any, setting: Mapping[str, Any], tests: Mapping[str, Test]) -> Prepared:
    """Tokens of rows; a training row whose prompt is a test's or a validation row's is left out and counted."""
    asked = [row.prompt for part in (rows.validation, *(own for _, own in rows.tests.values())) for row in part]
    clean, left_out = without_contamination(rows.train, asked, lambda row: row.prompt)
    if not clean:
        raise ValueError(f"All training rows of {name} are test or validation rows: train on other data.")
    train = sample(clean, setting["train_rows"])
    validation = sample(rows.validation, setting["validation_rows"])

    def encode(part: Sequence[TaskRow]) -> list[Continuations]:
        return completion_losses(tokenizer, [row.to_prompt_completion() for row in part], setting["max_length"])

    counts = {"train": len(train), "validation": len(validation), "left_out": left_out}
    counts.update({f"test {test}": len(part.data) for test, part in tests.items()})
    return Prepared(name, encode(train), encode(validation), dict(tests), counts)


def sample(rows: Sequence[Any], num: int, seed: int = 0) -> list[Any]:
    """The same rows for everyone, in a random order: some of many."""
    return random.Random(seed).sample(list(rows), min(num, len(rows)))


def make_tests(rows: Rows, tokenizer: Any, setting: Mapping[str, Any], **options: Any) -> dict[str, Test]:
    """The tests of a task: so many rows each, in tokens where that is all that is needed of them."""
    tests = {}
    for name, (protocol, part) in rows.tests.items():
        chosen: Sequence[TaskRow] = sample(part, setting["test_rows"])
        if protocol == "loss":
            texts = [row.to_prompt_completion() for row in chosen]
            tests[name] = Test("loss", completion_losses(tokenizer, texts, setting["max_length"]))
        elif protocol == "likelihood":
            tests[name] = Test("likelihood", [choice(row, tokenizer, setting["max_length"]) for row in chosen])
        else:
            tests[name] = Test(protocol, chosen, options)
    return tests


def choice(row: TaskRow, tokenizer: Any, max_length: int) -> Choice:
    """The options of a row in tokens, as in `ist.experiments.evaluation`'s protocol `likelihood` with labels."""
    prompt, texts = option_texts(row, "label")
    groups: dict[tuple[tuple[int, ...], int], list[tuple[int, int]]] = {}
    for index, text in enumerate(texts):
        first, second = encode_pair(tokenizer, prompt, text, max_length=max_length)
        groups.setdefault(((*first, *second[:-1]), len(first)), []).append((index, second[-1]))
    parts = tuple(
        (Continuations(ids, start, tuple(last for _, last in found)), tuple(index for index, _ in found))
        for (ids, start), found in groups.items()
    )
    return Choice(parts, [option.label for option in row.options].index(row.answer))


def commonsense(data: Path, tokenizer: Any, setting: Mapping[str, Any]) -> Prepared:
    """Four training sets joined, and the likelihood of the options on the four test sets."""
    train = [row for name in COMMONSENSE for row in read_task(data, TASKS[name], "train")]
    train, validation = held_out(train, setting["validation_rows"])
    rows = Rows(train, validation, {name: ("likelihood", read_task(data, TASKS[name])) for name in COMMONSENSE})
    return from_rows("commonsense", rows, tokenizer, setting, make_tests(rows, tokenizer, setting))


def mawps(data: Path, tokenizer: Any, setting: Mapping[str, Any]) -> Prepared:
    """Exact answers to word problems, and the loss of the right ones."""
    parts = {split: read_task(data, TASKS["mawps"], split) for split in ("train", "validation", "test")}
    tests = {"exact answers": ("generate", parts["test"]), "answers": ("loss", parts["test"])}
    rows = Rows(parts["train"], parts["validation"], tests)
    return from_rows("mawps", rows, tokenizer, setting, make_tests(rows, tokenizer, setting, max_new_tokens=16))


def gsm8k(data: Path, tokenizer: Any, setting: Mapping[str, Any]) -> Prepared:
    """The loss of worked solutions: a model this small solves almost none of the problems."""
    train, validation = held_out(read_task(data, TASKS["gsm8k"], "train"), setting["validation_rows"])
    rows = Rows(train, validation, {"solutions": ("loss", read_task(data, TASKS["gsm8k"]))})
    return from_rows("gsm8k", rows, tokenizer, setting, make_tests(rows, tokenizer, setting))


def sst2(data: Path, tokenizer: Any, setting: Mapping[str, Any]) -> Prepared:
    """The sentiment of a sentence as a word, by the likelihood of the two words; and the loss of the right one."""
    files = {split: data / "sst2" / f"{split}.tsv" for split in ("train", "dev", "test")}
    train, validation, test = (read_sentiment(file) for file in files.values())
    tests = {"sentiment": ("likelihood", test), "words": ("loss", test)}
    rows = Rows(train, validation, tests)
    return from_rows("sst2", rows, tokenizer, setting, make_tests(rows, tokenizer, setting))


def wikitext2(data: Path, tokenizer: Any, setting: Mapping[str, Any]) -> Prepared:
    """Adaptation to the language of a text: every token counts."""
    texts = {
        split: next((data / "wikitext-2").glob(f"{split}*.txt")).read_text(encoding="utf-8")
        for split in ("train", "valid", "test")
    }
    window = setting["max_length"]
    windows = {split: text_windows(tokenizer, text, window) for split, text in texts.items()}
    train, validation = (
        sample(windows[split], setting[f"{part}_rows"]) for split, part in (("train", "train"), ("valid", "validation"))
    )
    tests = {"text": Test("loss", sample(windows["test"], setting["test_rows"]))}
    counts = {"train": len(train), "validation": len(validation), "left_out": 0, "test text": len(tests["text"].data)}
    return Prepared("wikitext2", train, validation, tests, counts)


def held_out(rows: Sequence[TaskRow], num: int) -> tuple[list[TaskRow], list[TaskRow]]:
    """Rows without some, and those: the same for every method and seed."""
    order = sample(rows, len(rows), seed=1)
    num = min(num, len(order) // 10)
    return order[num:], order[:num]


def read_sentiment(file: Path) -> list[TaskRow]:
    """Sentences and labels, with a line of names above them."""
    lines = file.read_text(encoding="utf-8").splitlines()[1:]
    return [sentiment_row(*line.rsplit("\t", 1)) for line in lines if "\t" in line]


def sentiment_row(sentence: str, label: str) -> TaskRow:
    """A sentence as a prompt that a word completes."""
    answer = LABELS[int(label)]
    return TaskRow(
        task=SENTIMENT,
        prompt=f"Review: {sentence.strip()}\nSentiment:",
        completion=f" {answer}",
        answer=answer,
        question=sentence.strip(),
        options=tuple(Option(name, name) for name in LABELS),
    )


PREPARE: dict[str, Callable[[Path, Any, Mapping[str, Any]], Prepared]] = {
    "mawps": mawps,
    "sst2": sst2,
    "commonsense": commonsense,
    "wikitext2": wikitext2,
    "gsm8k": gsm8k,
}
