"""The folder of a run: which one it is, whether another run is in it, and which checkpoint to resume from."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from ...runs.checkpoints import check_checkpoint, checkpoints, last_checkpoint
from ...runs.files import EVALUATION_FILE, FOCUS_FILE, RESULT_FILE
from ...runs.history import HISTORY_FILE
from ...runtime.distributed import Ranks
from ..recipes.files import QUICKSTART_RECIPE
from .arguments import RunArguments
from .greedy import GREEDY_FILE
from .lock import FolderLock

__all__ = ["find_checkpoint", "run_folder", "settle_former_run"]

LAST = ("auto", "last", "true")
"""Values of --resume_from_checkpoint that mean the last checkpoint of the run's folder."""


@contextlib.contextmanager
def run_folder(run: RunArguments, ranks: Ranks) -> Iterator[Path]:
    """The run's folder, made, tried and locked for this run; a folder that stays empty is removed again.

    Without `--output_dir` it is the first of `runs/ist`, `runs/ist-2`, … that holds no run, and where a run is resumed,
    the last that holds one. The main process chooses and locks, and tells the others.

    Raises:
        ValueError: on every rank, where the folder cannot be written, is in use, or holds another run.
    """
    base = Path(run.training.output_dir or "runs/ist")
    number = 0
    refusal: Exception = ValueError("The main process could not take the run's folder: its message says why.")
    with contextlib.ExitStack() as undo:
        if ranks.is_main:
            try:
                number = claim_folder(base, run, undo)
            except Exception as error:  # The others wait for an answer.
                refusal = error
        number = round(ranks.mean([float(number)])[0] * ranks.size)
        if number == 0:
            raise refusal
        folder = numbered(base, number)
        error = None if ranks.is_main else write_error(folder)
        if not ranks.all(error is None):
            raise error or ValueError(f"Another process cannot write into {folder}: its message says why.")
        run.training.output_dir = str(folder)
        yield folder


def claim_folder(base: Path, run: RunArguments, undo: contextlib.ExitStack) -> int:
    """Make and lock the run's folder.

    Args:
        base: the folder, or the first of the numbered ones.
        run: what is to be trained.
        undo: gets what takes the lock, and folders that are empty then, away.

    Returns:
        Which of the numbered folders it is, from 1.

    Raises:
        ValueError: it cannot be written, is in use, has links in it, or holds another run.
    """
    lock = FolderLock(base)
    for number in candidates(base, run):
        folder = numbered(base, number)
        undo.callback(remove_empty, [path for path in (folder, *folder.parents) if not os.path.exists(path)])
        if error := write_error(folder):
            raise error
        lock = FolderLock(folder)
        if lock.take():
            undo.callback(lock.release)
            check_links(folder)
            settle_former_run(run, folder)
            return number
    raise ValueError(
        f"{lock.file.parent} is in use by another run ({lock.holder()}): wait for its end, or give another "
        "--output_dir."
    )


def candidates(base: Path, run: RunArguments) -> Iterable[int]:
    """Numbers of the folders that a run may have, the best first."""
    if "output_dir" in run.named or run.ist.overwrite or may_restart():
        return [1]
    siblings = [
        re.fullmatch(rf"{re.escape(base.name)}-(\d+)", path.name) for path in base.parent.glob(f"{base.name}-*")
    ]
    numbers = [1, *(int(match[1]) for match in siblings if match and int(match[1]) > 1)]
    taken = [number for number in numbers if holds_run(numbered(base, number))]
    value = run.training.resume_from_checkpoint
    if value is not None and value.lower() in LAST:
        return [max(taken, default=1)]
    if value is not None:
        own = [number for number in taken if numbered(base, number).resolve() == Path(value).resolve().parent]
        if own:
            return own
    return itertools.count(1 if run.recipe == QUICKSTART_RECIPE else max(taken, default=0) + 1)


def numbered(base: Path, number: int) -> Path:
    """`runs/ist`, `runs/ist-2`, `runs/ist-3`, …"""
    return base if number == 1 else base.with_name(f"{base.name}-{number}")


def write_error(folder: Path) -> ValueError | None:
    """Make a folder and try to write into it; the error where that fails."""
    trial = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        said = getattr(error, "strerror", None) or str(error)
        return ValueError(f"The folder {folder} cannot be written ({said}): give another one with --output_dir.")
    return None


def check_links(folder: Path) -> None:
    """Raise ValueError where a run would write through a symbolic link; a folder may come from a stranger."""
    inside = (path for one in checkpoints(folder) if not one.is_symlink() for path in one.rglob("*"))
    for path in sorted([*folder.iterdir(), *inside]):
        if path.is_symlink() and not path.is_dir():
            raise ValueError(
                f"{path} is a symbolic link, and a run would write to the file that it leads to: remove it, or give "
                "another --output_dir."
            )


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders, the innermost first, up to the first that is not empty."""
    with contextlib.suppress(OSError, ValueError):
        for folder in folders:
            folder.rmdir()


def holds_run(folder: Path) -> bool:
    """Whether a folder has the checkpoints or the result of a run."""
    return bool(checkpoints(folder)) or (folder / RESULT_FILE).is_file()


def settle_former_run(run: RunArguments, folder: Path) -> None:
    """Keep a run from being overwritten by another one, unless `--overwrite` says so; then what it wrote goes, so that
    nothing resumes from it or loads it by mistake. The quickstart in its own folder is made anew each time.

    Raises:
        ValueError: the folder holds another run, and this one does not resume it; or it holds what is trained.
    """
    check_sources(run, folder)
    found = checkpoints(folder)
    if not holds_run(folder) or was_restarted() or resumes_in(run.training.resume_from_checkpoint, folder):
        return
    if run.ist.overwrite or (run.recipe == QUICKSTART_RECIPE and "output_dir" not in run.given):
        remove_run(folder)
        return
    go_on = "resume it by --resume_from_checkpoint last, " if found else ""
    raise ValueError(f"{folder} holds another run: {go_on}give another --output_dir, or --overwrite.")


def check_sources(run: RunArguments, folder: Path) -> None:
    """Raise ValueError where a run would write over the model or the adapter that it begins with."""
    own = [folder, *checkpoints(folder), *(path for pattern in WRITTEN for path in folder.glob(pattern))]
    for flag, value in (("--model_name_or_path", run.model.model_name_or_path), ("--adapter", run.ist.adapter)):
        if value and any(Path(value).resolve() == path.resolve() for path in own):
            raise ValueError(f"{flag} {value} would be written over by the run in {folder}: give another --output_dir.")


def resumes_in(value: str | None, folder: Path) -> bool:
    """Whether `--resume_from_checkpoint` resumes the run in a folder, and not one that lies elsewhere."""
    return value is not None and (value.lower() in LAST or Path(value).resolve().parent == folder.resolve())


WRITTEN = (
    "adapter_config.json",
    "adapter_model*",
    "model*.safetensors*",
    "pytorch_model*",
    "config.json",
    "generation_config.json",
    "training_args.bin",
    EVALUATION_FILE,
    FOCUS_FILE,
    GREEDY_FILE,
    HISTORY_FILE,
    "importance.png",
    RESULT_FILE,
)
"""What a run writes beside its checkpoints that another kind of run may leave as it is."""


def remove_run(folder: Path) -> None:
    """Remove what a run wrote into a folder; other files stay."""
    for path in checkpoints(folder):
        shutil.rmtree(path)
    for pattern in WRITTEN:
        for path in folder.glob(pattern):
            path.unlink()


def was_restarted() -> bool:
    """Whether torchrun started this process again after one of its processes had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def may_restart() -> bool:
    """Whether torchrun would start this process again, which then has to find the same folder."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0


def find_checkpoint(value: str | None, folder: Path) -> Path | None:
    """The checkpoint to resume from.

    Args:
        value: a checkpoint's folder; `last` (or `true`): the last complete one in its folder; `auto`: the same, or a
            fresh start where there is none. A process that torchrun starts again resumes as with `auto`.
        folder: of the run.

    Raises:
        ValueError: there is none, or it is damaged.
    """
    if value is None:
        return last_checkpoint(folder) if was_restarted() else None
    if value.lower() not in LAST:
        if not Path(value).is_dir():
            raise ValueError(f"There is no folder {value}: give a checkpoint-N folder, `last` or `auto`.")
        if found := checkpoints(Path(value)):
            raise ValueError(f"{value} is the folder of a run: give one of its checkpoints, such as {found[0]}.")
        check_checkpoint(value)
        return Path(value)
    checkpoint = last_checkpoint(folder)
    if checkpoint is None and value.lower() != "auto":
        raise ValueError(
            f"{folder} holds no complete checkpoint: leave --resume_from_checkpoint out, or give `auto`, "
            "which then starts afresh."
        )
    return checkpoint
