"""Data: the paper's tasks from files and from the hub, rows of a user's own, and the built-in word-problem task."""

from .collection import read_task
from .contamination import contaminated_rows, without_contamination
from .hub import from_hub_row, load_hub_task
from .instructions import instruction_prompt, read_instructions
from .task_rows import Option, TaskRow, make_row, to_task_row
from .tasks import TASKS, Task, find_tasks
from .word_problems import (
    OPERATIONS,
    Operation,
    Split,
    WordProblem,
    exact_match,
    extract_integer,
    to_prompt_completion,
    word_problems,
)

__all__ = [
    "OPERATIONS",
    "TASKS",
    "Operation",
    "Option",
    "Split",
    "Task",
    "TaskRow",
    "WordProblem",
    "contaminated_rows",
    "exact_match",
    "extract_integer",
    "find_tasks",
    "from_hub_row",
    "instruction_prompt",
    "load_hub_task",
    "make_row",
    "read_instructions",
    "read_task",
    "to_prompt_completion",
    "to_task_row",
    "without_contamination",
    "word_problems",
]
