"""Pages, messages, docstrings and help are in the field's words: none of the phrases of `tests/helpers/words.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.words import PHRASES, markdown_prose, misuses, source_prose

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md")])
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def shown(file: Path, line: int, phrase: str, instead: str) -> str:
    return f"{file.relative_to(ROOT)}:{line}: {phrase!r}; write: {instead}"


@pytest.mark.parametrize("file", PAGES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_page_is_in_plain_words(file: Path) -> None:
    found = [shown(file, *misuse) for misuse in misuses(markdown_prose(file.read_text(encoding="utf-8")))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_messages_and_help_are_in_plain_words(file: Path) -> None:
    found = [
        shown(file, line + offset - 1, phrase, instead)
        for line, text in source_prose(file.read_text(encoding="utf-8"))
        for offset, phrase, instead in misuses(text)
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "phrases"),
    [
        ("The two are not told\napart.", ["told apart"]),
        ("The loss is no number.", ["is no number"]),
        ("LoRA computes as one function.", ["as one function"]),
        ("An idle layer is damped.", ["damped", "idle layer"]),
        ("Sampling that knows the price; at the price of memory.", ["at the price of", "knows the price"]),
        ("Exact answers take the lean step.", ["Exact answers", "lean step"]),
        ("It is sealed, and the run goes on.", ["sealed", "goes on"]),
        ("Twice the floor, on every engine.", ["the floor", "every engine"]),
        ("As a deviation that is small.", ["As a deviation"]),
        # Ordinary senses are free.
        ("A figure of 8 panels; figures 1 and 2; the search engine; no number is typed by hand.", []),
        ("The standard deviation; the deviation from zero; the adapters go on the layers' outputs.", []),
        ("The GPU has no idle time. A fixed price.", []),
        # Code is exempt, and line numbers stay.
        ("`damping` and `ist_seal.json`\n```\nidle layer\n```\n[x](lean-step.md)\nan idle layer", ["idle layer"]),
    ],
)
def test_the_list_knows_the_private_sense_from_the_ordinary_one(text: str, phrases: list[str]) -> None:
    assert [phrase for _, phrase, _ in misuses(markdown_prose(text).replace("\n", " "))] == phrases


def test_a_misuse_has_the_line_that_it_begins_in() -> None:
    assert [line for line, _, _ in misuses(markdown_prose("one\n```\ntwo\n```\nan idle\nlayer"))] == [5]


def test_strings_of_a_module_are_read_and_names_are_not() -> None:
    source = (
        '"""A docstring with\nan idle layer."""\n'
        'NAME = "damping"\n'
        'NAMES = "beta damping score_step"\n'
        'def g():\n    """Text.\n\n    ::\n\n        damped code\n\n    An idle adapter.\n    """\n'
        "def f(x):\n"
        '    raise ValueError(f"The layer {x} is " "damped, see `damping`.")\n'
    )
    found = [(line, phrase) for line, text in source_prose(source) for _, phrase, _ in misuses(text)]
    assert sorted(found) == [(1, "idle layer"), (6, "idle adapter"), (15, "damped")]


def test_no_phrase_is_listed_twice() -> None:
    assert len({phrase.pattern for phrase in PHRASES}) == len(PHRASES)
