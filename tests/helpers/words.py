"""Phrases of a private dialect, and what the field says instead; `tests/test_words.py` looks for them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["PHRASES", "Phrase", "markdown_prose", "misuses", "source_prose"]


@dataclass(frozen=True)
class Phrase:
    """A pattern, matched without regard to case and across line ends, and what to write instead."""

    pattern: str
    instead: str


PHRASES = (
    Phrase(
        r"\bt(?:old|ell|ells|elling) (?:(?:the|these|them|two|methods|layers) ){0,2}apart\b",
        "no significant difference",
    ),
    Phrase(r"(?<!there )\b(?:is|are|be|was|were|to) no numbers?\b", "NaN, not finite"),
    Phrase(r"\bas one function\b", "fused LoRA"),
    Phrase(r"\b(?:un)?damp(?:ed|ing|s|en|ens)?\b", "suppress, suppression"),
    Phrase(r"\bidle (?:layer|adapter|one|pair|parameter|block|weight|module)s?\b", "frozen layer"),
    Phrase(r"\bidle (?:layer|adapter)'s\b", "frozen layer"),
    Phrase(r"\b(?:go|goes|going|went) idle\b", "is frozen"),
    Phrase(r"\b(?:at|for) the price of\b", "cost"),
    Phrase(r"\bat a price\b", "cost"),
    Phrase(r"\bknows? the price\b", "cost-aware"),
    Phrase(r"\bexact answers?\b", "exact match"),
    Phrase(r"\blean (?:step|path)s?\b", "fused LoRA"),
    Phrase(r"\bseal(?:s|ed|ing)?\b", "checksum manifest"),
    Phrase(r"(?<!on )\bthe floor\b|÷ floor\b", "frozen-base lower bound"),
    Phrase(r"\bfloor, (?:Liger|compiled)\b", "frozen-base lower bound"),
    Phrase(r"\b(?:every|each|any|which|without|of the|an?|other|distributed) engines?\b", "distributed backend"),
    Phrase(r"\bengines,|\bengines? and\b|\| engine \|", "distributed backend"),
    Phrase(r"\b(?:all|paper's|whose|compare|by one|have the|has the) figures?\b(?! \d)", "metric, number, result"),
    Phrase(r"\bfigures (?:are|come|stand)\b", "metric, number, result"),
    Phrase(
        r"\b(?:go|goes|going|went|gone) on\b(?! (?:the|a|an|its|all) \w*(?:layer|module|input|output)s?)",
        "continue, resume",
    ),
    Phrase(r"\b(?:is|are|was|were) (?:not |also )?said\b", "is stated, says"),
    Phrase(r"\b(?:is|are) to be (?:measured|found|had|seen|said|given)\b", "can be …, must be …"),
    Phrase(r"\bnone of (?:theirs|ours)\b", "name the thing"),
    Phrase(r"\bis (?:the|their|its) bound\b|\bbound by the host\b", "launch-bound, memory-bound"),
    Phrase(r"\b(?:as a|than the|whose|the) deviations?\b(?! from| of the output)", "standard deviation"),
    Phrase(r"\ban own\b", "a separate"),
    Phrase(r"\byours to (?:say|give|set)\b", "you choose"),
    Phrase(r"\b(?:it|this) is dear\b", "expensive"),
    Phrase(r"\bwhole (?:checkpoints?|one before)\b", "complete checkpoint"),
    Phrase(r"\blast whole\b", "last complete"),
    Phrase(r"\bsays? what becomes of\b|\bwhat becomes of\b", "what happens to"),
    Phrase(r"\bdoes of itself\b", "by itself"),
)


def misuses(text: str) -> Iterator[tuple[int, str, str]]:
    """Line number, phrase found, and what to write instead. Line ends count as spaces."""
    flat = text.replace("\n", " ")
    for phrase in PHRASES:
        for match in re.finditer(phrase.pattern, flat, re.IGNORECASE):
            yield text.count("\n", 0, match.start()) + 1, match[0], phrase.instead


def blank(match: re.Match[str]) -> str:
    """As many signs and line ends, without words."""
    return re.sub(r"[^\n]", "·", match[0])


def markdown_prose(text: str) -> str:
    """A page without code blocks, code spans, comments and addresses; lines keep their numbers."""
    for pattern in (r"```.*?```", r"<!--.*?-->", r"``[^`]+``", r"`[^`]+`", r"\]\([^)\s]*\)", r"https?://\S+"):
        text = re.sub(pattern, blank, text, flags=re.DOTALL)
    return text


def source_prose(text: str) -> Iterator[tuple[int, str]]:
    """The line and the text of every string in a module: docstrings, messages, help. Words alone are names, and exempt.

    The parts of an f-string count as one text, with a sign for each value.
    """
    tree = ast.parse(text)
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "·" for part in node.values)
            yield node.lineno, without_code("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.lineno, "" if is_names(node.value) else without_code(node.value)


def is_names(text: str) -> bool:
    """Whether a string is a name, or names with spaces between them, such as those of flags."""
    words = text.split()
    return all(word.isidentifier() for word in words) and (len(words) < 2 or "_" in text)


def without_code(text: str) -> str:
    """Without code spans, code blocks (after `::`) and the names of arguments in a docstring."""
    text = re.sub(r"^[ \t]+\w+: ", blank, text, flags=re.MULTILINE)
    text = re.sub(r"(?<=\n)([ \t]*)::\n(?:\n|\1[ \t]+[^\n]*(?:\n|$))+", blank, text)
    return re.sub(r"``?[^`]+``?", blank, text)
