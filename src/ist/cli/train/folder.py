"""The folder of a run: whether it can be written, whether another run is in it, and which checkpoint to resume from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ...runs.checkpoints import check_checkpoint, checkpoints, last_checkpoint
from ...runs.files import RESULT_FILE
from ...runtime.distributed import Ranks
from ..recipes.files import QUICKSTART_RECIPE
from .arguments import RunArguments

__all__ = ["find_checkpoint", "prepare_folder", "settle_former_run"]


def prepare_folder(name: str | None, ranks: Ranks) -> Path:
    """The run's folder, made and tried before anything is computed.

    Raises:
        ValueError: it cannot be written.
    """
    folder = Path(name or "runs/ist")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        trial = folder / f".writable-{ranks.rank}"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise ValueError(
            f"The folder {folder} cannot be written ({error.strerror}): give another one with --output_dir."
        ) from error
    return folder


def settle_former_run(run: RunArguments, folder: Path, ranks: Ranks) -> None:
    """Keep a run from being overwritten by another one, unless `--overwrite` says so; then its checkpoints go, so that
    nothing resumes from them by mistake. The quickstart in its own folder is made anew each time.

    Raises:
        ValueError: the folder holds another run, and none is resumed.
    """
    found = checkpoints(folder)
    resumed = run.training.resume_from_checkpoint is not None or was_restarted()
    if resumed or not (found or (folder / RESULT_FILE).is_file()):
        return
    if run.ist.overwrite:
        if ranks.is_main:
            for path in found:
                shutil.rmtree(path)
            (folder / RESULT_FILE).unlink(missing_ok=True)
        return
    if run.recipe == QUICKSTART_RECIPE and "output_dir" not in run.given:
        return
    go_on = "resume it by --resume_from_checkpoint last, " if found else ""
    raise ValueError(f"{folder} holds another run: {go_on}give another --output_dir, or --overwrite.")


def was_restarted() -> bool:
    """Whether torchrun started this process again after one of its processes had died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


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
    if value.lower() not in ("auto", "last", "true"):
        if not Path(value).is_dir():
            raise ValueError(f"There is no folder {value}: give a checkpoint-N folder, `last` or `auto`.")
        check_checkpoint(value)
        return Path(value)
    checkpoint = last_checkpoint(folder)
    if checkpoint is None and value.lower() != "auto":
        raise ValueError(
            f"{folder} holds no complete checkpoint: leave --resume_from_checkpoint out, or give `auto`, "
            "which then starts afresh."
        )
    return checkpoint
