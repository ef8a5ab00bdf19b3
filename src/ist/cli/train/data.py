"""What `ist train` trains on: the built-in task, the paper's tasks, files, or a dataset as TRL takes it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from trl import get_dataset, is_conversational

from ...experiments.data.contamination import contaminated_rows
from ...experiments.data.instructions import read_instructions
from ...experiments.data.own_rows import OwnRow, own_row, rows_at
from ...experiments.data.word_problems import WordProblem, to_prompt_completion, word_problems
from ..task_data import training_rows, without_test_rows
from .arguments import RunArguments

__all__ = ["TaskData", "check_chats", "load_data", "report_cut_rows"]

logger = logging.getLogger(__name__)

TEST_SEED_OFFSET = 1
PLACE = {"ist_file", "ist_row"}
"""Columns that say where a row stands."""


@dataclass(frozen=True)
class TaskData:
    """What a run trains and is judged on."""

    train: Any
    evaluation: Any | None
    problems: tuple[WordProblem, ...] = ()
    """Held-out problems for exact match; empty for other datasets."""
    own_rows: tuple[OwnRow, ...] = ()
    """The validation rows for a metric of the user's choice; empty where none is asked for."""


def load_data(run: RunArguments) -> TaskData:
    """The datasets that the flags name.

    Raises:
        ValueError: none is named, more than one is, a file does not fit, or there are no answers for a metric to mark.
    """
    data = find_data(run)
    return with_own_rows(data) if run.ist.marks else data


def find_data(run: RunArguments) -> TaskData:
    """The datasets, with the place of each row in its file where a metric needs it."""
    named = [
        name
        for name, given in {
            "--task": run.ist.task,
            "--data_files": run.ist.data_files,
            "--dataset_name or datasets": run.script.dataset_name or run.mixture.datasets,
        }.items()
        if given
    ]
    own = bool(run.ist.data_files or run.ist.task) and run.ist.task != ["word-problems"]
    if run.ist.validation_files and not own:
        raise ValueError("--validation_files goes with --data_files, or with --task and tasks of the paper.")
    if len(named) != 1:
        raise ValueError(
            f"{' and '.join(named) or 'No dataset'} given: name one of --task word-problems, --data_files FILES, "
            "--dataset_name NAME. `ist train` alone runs the quickstart."
        )
    if run.ist.task == ["word-problems"]:
        return word_problem_data(run)
    if run.ist.task:
        return hold_out(clean_rows(training_rows(run.ist.task, run.ist.data_folder, run.ist.from_hub), run), run)
    if run.ist.data_files:
        return instruction_data(run)
    if run.script.dataset_name and Path(run.script.dataset_name).is_file():
        raise ValueError(f"--dataset_name {run.script.dataset_name} is a file: give --data_files.")
    if run.mixture.datasets:
        loaded: Any = get_dataset(run.mixture)
    else:
        loaded = datasets.load_dataset(
            str(run.script.dataset_name), name=run.script.dataset_config, streaming=run.script.dataset_streaming
        )
    name = run.script.dataset_train_split
    if name not in loaded:
        raise ValueError(f"The dataset has no split {name!r}: --dataset_train_split takes one of {', '.join(loaded)}.")
    check_columns(loaded[name], run.training.dataset_text_field)
    if run.script.dataset_test_split in loaded:
        return TaskData(loaded[name], loaded[run.script.dataset_test_split])
    return hold_out(loaded[name], run) if isinstance(loaded[name], datasets.Dataset) else TaskData(loaded[name], None)


def check_chats(rows: Any, tokenizer: Any, run: RunArguments) -> None:
    """Raise ValueError where rows are chats, and nothing says how the model takes them.

    Args:
        rows: to train on; those that can only be iterated are left to TRL.
        tokenizer: the model's.
        run: whose `--chat_template_path` gives a template too.
    """
    if (
        getattr(tokenizer, "chat_template", None)
        or run.training.chat_template_path
        or not isinstance(rows, datasets.Dataset)
    ):
        return
    if len(rows) and is_conversational(rows[0]):
        raise ValueError(
            "The rows are chats, and this model's tokenizer has no chat template: give --chat_template_path with one, "
            "a model that was tuned for chats, or rows of instruction and output."
        )


def word_problem_data(run: RunArguments) -> TaskData:
    """The built-in task: training problems, and held-out ones worded by other templates."""
    training = word_problems(run.ist.num_train_problems, split="train", seed=run.training.seed)
    train_rows = datasets.Dataset.from_list([to_prompt_completion(problem) for problem in training])
    if run.ist.num_test_problems == 0:
        return TaskData(train_rows, None)
    held_out = word_problems(run.ist.num_test_problems, split="test", seed=run.training.seed + TEST_SEED_OFFSET)
    return TaskData(
        train_rows,
        datasets.Dataset.from_list([to_prompt_completion(problem) for problem in held_out]),
        tuple(held_out),
    )


def instruction_data(run: RunArguments) -> TaskData:
    """Files in the paper's format, with rows held out for the loss before and after."""
    return hold_out(clean_rows(read_instructions(run.ist.data_files or [], numbered=run.ist.marks), run), run)


def clean_rows(rows: list[dict[str, Any]], run: RunArguments) -> datasets.Dataset:
    """Rows to train on without the test rows of the tasks that are named."""
    names = list(dict.fromkeys([*(run.ist.task or ()), *(run.ist.test_tasks or ())]))
    if names:
        rows = without_test_rows(rows, names, run.ist.data_folder, run.ist.from_hub)
    return datasets.Dataset.from_list(rows)


def hold_out(rows: datasets.Dataset, run: RunArguments) -> TaskData:
    """Keep `validation_size` rows for the loss before and after."""
    if run.ist.validation_files:
        return TaskData(rows, validation_rows(rows, run.ist.validation_files, run.ist.marks))
    num_held_out = run.ist.num_held_out(len(rows))
    if num_held_out == 0:
        return TaskData(rows, None)
    split = rows.train_test_split(test_size=num_held_out, seed=run.training.seed)
    return TaskData(split["train"], split["test"])


def validation_rows(train: datasets.Dataset, files: Sequence[str], numbered: bool) -> datasets.Dataset:
    """The rows of `--validation_files`; those that are trained on too are counted in a warning.

    Raises:
        ValueError: a file cannot be read, or holds chats where the training rows are texts, or the reverse.
    """
    rows = read_instructions(files, numbered=numbered)
    if "prompt" not in train.column_names or not isinstance(rows[0]["prompt"], type(train[0]["prompt"])):
        raise ValueError(
            f"{', '.join(files)} and the training rows are not of one kind: give chats for chats, and instructions or "
            "prompts with completions for those."
        )
    seen = contaminated_rows(map(pair_text, rows), map(pair_text, train))
    if seen:
        logger.warning("%d of %d validation rows are training rows too: their loss says little.", len(seen), len(rows))
    return datasets.Dataset.from_list(rows)


def with_own_rows(data: TaskData) -> TaskData:
    """The validation rows with the answers that a metric compares.

    Raises:
        ValueError: there are none, or a row has no answer.
    """
    if data.problems:
        raise ValueError("--task word-problems marks its problems by itself: leave --metric out.")
    if not isinstance(data.evaluation, datasets.Dataset):
        raise ValueError("--metric needs validation rows: give --validation_files, or --validation_size above 0.")
    if set(data.evaluation.column_names) >= PLACE:
        rows = rows_at(zip(data.evaluation["ist_file"], data.evaluation["ist_row"], strict=True))
    else:
        rows = [own_row("the validation set", number, row) for number, row in enumerate(data.evaluation, start=1)]
    return TaskData(without_places(data.train), without_places(data.evaluation), own_rows=tuple(rows))


def without_places(rows: Any) -> Any:
    """Rows as they are trained on."""
    return rows.remove_columns(sorted(PLACE)) if set(rows.column_names or ()) >= PLACE else rows


def pair_text(row: Any) -> str:
    """A prompt with its completion as one text, by which rows are compared."""
    return "\0".join(
        text
        for part in (row["prompt"], row["completion"])
        for text in ([part] if isinstance(part, str) else [f"{m['role']}\0{m['content']}" for m in part])
    )


def check_columns(rows: Any, text_field: str) -> None:
    """Raise ValueError unless a dataset has the columns that TRL trains on."""
    columns = set(rows.column_names or ())
    formats = ({text_field}, {"messages"}, {"conversations"}, {"prompt", "completion"}, {"input_ids"})
    if columns and not any(needed <= columns for needed in formats):
        raise ValueError(
            f"The dataset has the columns {', '.join(sorted(columns))}, and training needs {text_field!r}, 'messages', "
            "or 'prompt' and 'completion': name the text with --dataset_text_field, or give --data_files."
        )


def report_cut_rows(given: Any, kept: Any, name: str, max_length: int | None) -> None:
    """Say how many rows TRL leaves out, since `max_length` cuts their whole answer off.

    Args:
        given: the rows before TRL prepared them.
        kept: those after, not packed.
        name: of the rows, for the message.
        max_length: tokens that TRL leaves of a row.

    Raises:
        ValueError: it leaves none.
    """
    if not (hasattr(given, "__len__") and hasattr(kept, "__len__")) or len(kept) == len(given):
        return
    which = f"longer than max_length={max_length} before their answer begins"
    if len(kept) == 0:
        raise ValueError(f"All {len(given)} {name} rows are {which}: give a greater --max_length.")
    logger.warning("%d of %d %s rows are %s, and are left out.", len(given) - len(kept), len(given), name, which)
