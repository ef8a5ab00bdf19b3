"""One training after the other, each in a process of its own: done once, and resumed where it was cut off."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...runs.files import EVALUATION_FILE, RESULT_FILE, open_own, write_json
from ..checkout import commit
from ..recipes.renamed import rename_arguments
from ..step_lines import STEP_MARK, told_environment
from .results import read_evaluation, read_record, read_result

__all__ = ["evaluate_once", "train_once"]

RUN_FILE = "run.json"
"""What a run was begun with: it is resumed with the same, or not at all."""

OnLine = Callable[[str], None]
"""Called with each line that a run prints, those that tell of a step among them, which no log takes (`step_lines`)."""


def train_once(arguments: Sequence[str], folder: Path, on_line: OnLine) -> dict[str, Any]:
    """The result of a training, which is run unless it is there.

    Args:
        arguments: of `ist train`.
        folder: the run's.
        on_line: called with each line of its console, which goes to `train.log` too.

    Raises:
        ValueError: the training failed, or the folder holds a run with other arguments.
    """
    begun = {"command": "train", "arguments": list(arguments)}
    result, record = folder / RESULT_FILE, folder / RUN_FILE
    if record.is_file():
        check_same(read_record(record)["arguments"], arguments, folder)
    if not result.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record, {**begun, "commit": commit()})
        run_command("train", arguments, folder / "train.log", on_line)
    at = read_record(record) if record.is_file() else {}
    return {**read_result(result), "commit": at.get("commit")}


def evaluate_once(arguments: Sequence[str], folder: Path, on_line: OnLine) -> dict[str, Any]:
    """The result of `ist eval` for a trained run, which is run unless it is there.

    Raises:
        ValueError: the evaluation failed, or the folder holds one with other arguments.
    """
    record = folder / RUN_FILE
    if record.is_file():
        check_same(read_record(record)["arguments"], arguments, folder)
    if not (folder / EVALUATION_FILE).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(record, {"command": "eval", "arguments": list(arguments), "commit": commit()})
        run_command("eval", arguments, folder / "eval.log", on_line)
    return read_evaluation(folder / EVALUATION_FILE)


def check_same(begun: Sequence[str], wanted: Sequence[str], folder: Path) -> None:
    """Raise ValueError where a run was begun with other arguments than it would resume with."""
    begun, wanted = rename_arguments(begun)[0], rename_arguments(wanted)[0]
    if begun == wanted:
        return
    only = [argument for argument in begun if argument not in wanted], [a for a in wanted if a not in begun]
    raise ValueError(
        f"{folder} holds a run with other flags (it has {' '.join(only[0]) or 'fewer'}, now asked for is "
        f"{' '.join(only[1]) or 'less'}): give another --output_dir, or remove that folder."
    )


def run_command(command: str, arguments: Sequence[str], log: Path, on_line: OnLine) -> None:
    """Run a command of `ist` in a process of its own. When this process is stopped, that one is first: it finishes its
    step and writes a checkpoint.

    Raises:
        ValueError: it failed; the message ends with the last line that it printed.
    """
    last = ""
    command_line = [sys.executable, "-m", "ist", command, *arguments]
    with (
        open(log, "a", encoding="utf-8", opener=open_own) as file,
        stopping_on_signals(),
        subprocess.Popen(
            command_line,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=told_environment(),
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.startswith(STEP_MARK):
                    on_line(line)
                    continue
                file.write(line)
                file.flush()
                last = line.strip() or last
                on_line(last)
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if status in (130, 143):  # a signal that came to both
        raise KeyboardInterrupt
    if status:
        raise ValueError(f"ist {command} ended with status {status} ({last}): see {log}.")


class stopping_on_signals:  # noqa: N801  (a context manager, read as a phrase)
    """Within the context, SIGTERM is as Ctrl-C is."""

    def __enter__(self) -> None:
        def stop(number: int, frame: Any) -> None:
            raise KeyboardInterrupt

        try:
            self._former = signal.signal(signal.SIGTERM, stop)
        except ValueError:  # not the main thread
            self._former = None

    def __exit__(self, *exception: object) -> None:
        if self._former is not None:
            signal.signal(signal.SIGTERM, self._former)
