"""The questions behind the comparisons, each a paired difference of two methods by every figure of a task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pages import markdown

from .cells import show_difference
from .figures import FIGURES, Comparison

__all__ = ["QUESTIONS", "question_section"]

SETS = ("fixed, at random", "fixed, most important", "fixed, least important")
SPARSE = ("random", "IST, mu 10", "IST, mu 100", "IST, authors' rule", "LISA", *SETS)
QUESTIONS = {
    "some of the layers, or all": [(method, "LoRA") for method in SPARSE],
    "by importance, or at random": [(method, "random") for method in SPARSE if method.startswith("IST")],
    "the same, of 4 or 16 layers a step": [("N_u 4", "random, N_u 4"), ("N_u 16", "random, N_u 16")],
    "half of the layers, or all": [("random, N_u 16", "LoRA"), ("N_u 16", "LoRA")],
    "more layers, or fewer": [("N_u 16", "IST, mu 100"), ("IST, mu 100", "N_u 4")],
    "a large step size, or a small one": [("IST, mu 100", "IST, mu 10")],
    "the other options, one at a time": [
        (method, "IST, mu 100")
        for method in ("beta 0", "beta 0.1", "beta 0.5", "mu 1", "mu 1000", "N_c 2", "N_c 6", "T_c 5", "T_c 20")
    ],
    "the same trainings, on two devices": [("mu 10", "IST, mu 10")],
    "DoRA in the place of LoRA": [("DoRA", "LoRA"), ("DoRA + IST", "IST, mu 100"), ("DoRA + IST", "DoRA")],
    "one set, or a new one each step": [(one, many) for one in SETS for many in ("random", "IST, mu 100")],
    "one set by importance, or at random": [
        ("fixed, most important", "fixed, at random"),
        ("fixed, least important", "fixed, at random"),
        ("fixed, most important", "fixed, least important"),
    ],
}
"""What is asked, and the methods whose difference answers it."""


def question_section(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """A table of answers for every comparison and budget."""
    for comparison in comparisons:
        for budget, at in {"steps": "equal steps", "seconds": "equal time"}.items():
            rows = [row for question in QUESTIONS for row in answers(comparison, budget, question)]
            if rows:
                header = ("question", "difference", "seeds", *FIGURES[comparison.task].values())
                yield f"**{comparison.task}, {comparison.length}, at {at}.**"
                yield markdown(header, rows)


def answers(comparison: Comparison, budget: str, question: str) -> Iterator[tuple[str, ...]]:
    """The rows of a question, those of pairs that were both measured; the first one has its words."""
    if not comparison.methods(budget):
        return
    for one, other in QUESTIONS[question]:
        found = {title: comparison.difference(one, other, figure, budget) for figure, title in titles(comparison)}
        seeds = sorted({difference["num_pairs"] for difference in found.values() if difference})
        if seeds:
            cells = [show_difference(difference, title) for title, difference in found.items()]
            yield question, f"{one} − {other}", " or ".join(map(str, seeds)), *cells
            question = ""


def titles(comparison: Comparison) -> Sequence[tuple[str, str]]:
    """What a comparison is judged by, with its title."""
    return [*FIGURES[comparison.task].items()]
