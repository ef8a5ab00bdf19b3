"""Complete checkpoints told from damaged ones, so that a run which died resumes from the last good state.

A process can be killed, or a disk be full, while a checkpoint is being written. When all ranks have written their files
of a checkpoint, `IST` adds a checksum manifest: a list of the files that a resume needs, put in place at once.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from .damage import CHANGED, MANIFEST_FILE, find_fault, is_needed, sha256
from .files import write_json

__all__ = ["MANIFEST_FILE", "check_checkpoint", "last_checkpoint", "write_manifest"]

Folder = str | os.PathLike[str]


def write_manifest(folder: Folder) -> None:
    """List the files of a checkpoint that a resume needs, with their sizes and sums. Called when all are written.

    Where that fails, as on a disk that has just become full, the checkpoint goes without, with a warning: training does
    not end for it.

    Args:
        folder: of the checkpoint.
    """
    try:
        files = {
            name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file() and is_needed(name := path.relative_to(folder).as_posix())
        }
        write_json(Path(folder) / MANIFEST_FILE, {"files": files}, indent=1)
    except OSError as error:
        warnings.warn(
            f"The checkpoint {folder} has no {MANIFEST_FILE} ({error.strerror or error}): training continues, and "
            "changes of its files will not all be found.",
            stacklevel=3,
        )


def check_checkpoint(folder: Folder) -> None:
    """Make sure that a checkpoint is whole.

    One without a manifest (by a Trainer without IST, or by one killed just before writing it) is read as far as its
    formats tell a whole file from a part: JSON, safetensors and torch's archives.

    Args:
        folder: of the checkpoint.

    Raises:
        ValueError: it is damaged; the message says where, names the last complete one before it, and how to resume
            from files that were changed on purpose.
    """
    fault = find_fault(Path(folder))
    if fault is None:
        return
    earlier = next((path for path in earlier_checkpoints(Path(folder)) if find_fault(path) is None), None)
    way_out = f"resume from {earlier}, the last complete one before it" if earlier else "none before it is complete"
    listed = (Path(folder) / MANIFEST_FILE).is_file()
    if CHANGED in fault or (listed and re.fullmatch(r"\S+ is missing", fault)):
        way_out += f"; where the change was meant, remove its {MANIFEST_FILE}"
    raise ValueError(f"The checkpoint {folder} is damaged ({fault}): {way_out}.")


def last_checkpoint(folder: Folder) -> Path | None:
    """The newest complete checkpoint of a run, for `trainer.train(resume_from_checkpoint=…)`.

    Args:
        folder: the run's output folder, with `checkpoint-N` in it.

    Returns:
        The checkpoint's folder, or None where there is no whole one. One warning names those that are damaged.
    """
    damaged = []
    found = None
    for path in checkpoints(Path(folder)):
        fault = find_fault(path)
        if fault is None:
            found = path
            break
        damaged.append(f"{path.name}: {fault}")
    if damaged:
        instead = f"{found.name} is taken" if found else "no checkpoint is left"
        warnings.warn(f"Damaged checkpoints in {folder} ({'; '.join(damaged)}): {instead}.", stacklevel=2)
    return found


def checkpoints(folder: Path) -> list[Path]:
    """The Trainer's checkpoints in a folder, the newest first."""
    paths = folder.glob("checkpoint-*")
    found = {int(m[1]): path for path in paths if (m := re.fullmatch(r"checkpoint-([0-9]+)", path.name))}
    return [found[step] for step in sorted(found, reverse=True)]


def earlier_checkpoints(folder: Path) -> Iterator[Path]:
    """Those beside a checkpoint that came before it, the newest first."""
    siblings = checkpoints(folder.resolve().parent)
    names = [path.name for path in siblings]
    here = folder.resolve().name
    start = names.index(here) + 1 if here in names else 0
    return (folder.parent / name for name in names[start:])
