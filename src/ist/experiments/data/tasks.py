"""The paper's tasks: eight of commonsense, seven of arithmetic, and what their answers look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["TASKS", "AnswerKind", "Task", "find_tasks"]

AnswerKind = Literal["label", "letter", "number", "first_number"]
"""`label`: one of the row's options ("answer2", "true"); `letter`: A to E; `number`: the last number of the response;
`first_number`: the first one."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task whose answers can be marked right or wrong."""

    name: str
    """As the collection's folders have it."""
    family: str
    """`commonsense`, `arithmetic`, or `built-in`."""
    kind: AnswerKind
    max_new_tokens: int
    """Tokens that the paper's protocol generates for an answer."""
    prefix: str = ""
    """What comes before the answer in a response that says nothing else."""


_COMMONSENSE = (
    "boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa",
)  # fmt: skip
_ARITHMETIC = ("MultiArith", "gsm8k", "AddSub", "AQuA", "SingleEq", "SVAMP", "mawps")

TASKS: dict[str, Task] = {
    **{
        name: Task(name=name, family="commonsense", kind="label", max_new_tokens=32, prefix="the correct answer is ")
        for name in _COMMONSENSE
    },
    **{
        name: Task(
            name=name,
            family="arithmetic",
            kind="letter" if name == "AQuA" else "number",
            max_new_tokens=256,
            prefix="The answer is ",
        )
        for name in _ARITHMETIC
    },
    "word-problems": Task(name="word-problems", family="built-in", kind="first_number", max_new_tokens=8, prefix=" "),
}
"""By name; `word-problems` is the task that comes with the library."""


def find_tasks(names: str | Sequence[str]) -> list[Task]:
    """The tasks of names, each of which may be several with commas between, or a family.

    Args:
        names: such as `"boolq,piqa"` or `["commonsense", "GSM8K"]`; upper and lower case are alike.

    Raises:
        ValueError: a name is unknown, comes twice, or there is none.
    """
    parts = [part.strip() for name in ([names] if isinstance(names, str) else names) for part in name.split(",")]
    found = [task for part in parts if part for task in _matching(part)]
    if not found:
        raise ValueError(f"No task given: name some of {_all_names()}.")
    twice = sorted({task.name for task in found if found.count(task) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} given twice: name each task once.")
    return found


def _matching(name: str) -> list[Task]:
    tasks = [task for task in TASKS.values() if name.lower() in (task.name.lower(), task.family)]
    if not tasks:
        raise ValueError(f"task={name!r} is unknown: choose some of {_all_names()}.")
    return tasks


def _all_names() -> str:
    return ", ".join([*TASKS, "or a family: commonsense", "arithmetic"])
