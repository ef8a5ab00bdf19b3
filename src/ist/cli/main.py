"""The command `ist`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence

from .._version import __version__
from .failures import describe_failure, describe_missing
from .nearest import did_you_mean
from .printable import one_line, printable, printable_logs
from .streams import steady_streams
from .wording import in_flags

__all__ = ["main"]

USAGE = """ist: fine-tune the layers that matter

  ist train                    the quickstart: a small model learns word problems
  ist train --recipe NAME      a recipe, with any flag beside it to change it
  ist train --FLAG VALUE …     without a recipe; `ist train --help` lists the flags
  ist compare --recipe NAME    methods × seeds on one task: table, intervals, curves (quick: minutes on two cores)
  ist analyse FOLDER           which layers of a trained adapter matter, and whether IST learned it
  ist recipes                  the recipes that come with the library
  ist eval --FLAG VALUE …      a model's answers or loss on tasks; `ist eval --help` lists the flags
  ist report FOLDER …          pictures of a run: importance over time, layers chosen, losses; several side by side
  ist --version

`ist COMMAND --help` explains a command. An error is one line; IST_DEBUG=1 shows where it comes from.
"""


def train(arguments: Sequence[str]) -> None:
    """Fine-tune a model; exits with 130 or 143 where a signal stopped it."""
    from .train.command import train
    from .train.interrupt import Stopped

    try:
        train(arguments)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            say("train", str(stopped))
        raise SystemExit(stopped.status) from None


def compare(arguments: Sequence[str]) -> None:
    """Compare methods over seeds."""
    from .compare.command import compare

    compare(arguments)


def analyse(arguments: Sequence[str]) -> None:
    """Measure which layers of a trained adapter matter."""
    from .analyse.command import analyse

    analyse(arguments)


def recipes(arguments: Sequence[str]) -> None:
    """List the recipes with the first line of each."""
    if asks_for_help(arguments):
        print(
            "usage: ist recipes\n\nThe recipes that come with the library: for --recipe of ist train and ist compare."
        )
        return
    if arguments:
        raise ValueError(f"ist recipes takes no {arguments[0]!r}: give it alone.")
    from .recipes.files import list_comparisons, list_recipes

    for file in [*list_recipes(), *list_comparisons()]:
        title = file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        print(printable(f"{file.stem:32} {title}"))


def report(arguments: Sequence[str]) -> None:
    """Draw the pictures of a run."""
    if asks_for_help(arguments):
        print(
            "usage: ist report FOLDER [FOLDER ...]\n\nDraw the pictures of a run: FOLDER is its --output_dir. Several "
            "are drawn side by side,\nsuch as one model on two tasks, into the first of them."
        )
        return
    from ..experiments.report import draw_report, draw_side_by_side

    if not arguments:
        raise ValueError("ist report takes the folder of a run, which holds ist_history.jsonl, or several.")
    if flag := next((argument for argument in arguments if argument.startswith("-")), None):
        raise ValueError(f"ist report has no flag {flag}: give the folder of a run, or several, and nothing else.")
    print(printable(str(draw_report(arguments[0]) if len(arguments) == 1 else draw_side_by_side(arguments))))


def evaluate(arguments: Sequence[str]) -> None:
    """Evaluate a model."""
    from .eval.command import evaluate_command

    evaluate_command(arguments)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "train": train,
    "eval": evaluate,
    "compare": compare,
    "analyse": analyse,
    "recipes": recipes,
    "report": report,
}
PANICS = "pyo3_runtime"
"""The module of exceptions by which libraries written in Rust give up, as tokenizers does at an expression in a
tokenizer.json that takes too long. They are no `Exception`."""
GOES_ON = {
    "train": "--resume_from_checkpoint last resumes from the last checkpoint",
    "eval": "the same command continues from the answers that are there",
    "compare": "the same command continues where it was",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command of `ist`; returns the exit status: 0, or 2 after an error that the user can put right."""
    with steady_streams():
        return run(list(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """`main` without care for where the output goes."""
    command = arguments[0] if arguments else "--help"
    if command in ("--help", "-h"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(f"ist {__version__}")
        return 0
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # It speaks of kernels as it is imported.
    try:
        if command not in COMMANDS:
            hint = did_you_mean(command, COMMANDS)
            raise ValueError(f"there is no command {command!r}{hint}: choose one of {', '.join(COMMANDS)}.")
        with printable_logs():
            COMMANDS[command](arguments[1:])
    except KeyboardInterrupt:
        say(command, f"stopped; {GOES_ON[command]}" if command in GOES_ON else "stopped")
        return 130
    except ModuleNotFoundError as error:
        if is_debugging():
            raise
        say(command, f"error: {in_flags(describe_missing(error, command))}")
        return 2
    except Exception as error:
        if is_debugging():
            raise
        say(command, f"error: {in_flags(describe_failure(error))}")
        return 2
    except BaseException as error:
        if is_debugging() or type(error).__module__ != PANICS:
            raise
        say(command, f"error: {in_flags(describe_failure(error))}")
        return 2
    return 0


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether a command is to say what it does, and no more."""
    return not {"-h", "--help"}.isdisjoint(arguments)


def is_debugging() -> bool:
    """Whether an error shows where it comes from."""
    return os.environ.get("IST_DEBUG", "").lower() not in ("", "0", "false", "no")


def say(command: str, message: str) -> None:
    """One printable line on stderr, which names the process where several were started."""
    rank = int(os.environ.get("RANK", "0"))
    print(one_line(f"ist {command}: {f'[rank {rank}] ' if rank else ''}{message}"), file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
