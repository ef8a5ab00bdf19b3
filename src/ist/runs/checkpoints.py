"""Whole checkpoints told from damaged ones, so that a run which died goes on from the last good state.

A process can be killed, or a disk be full, while a checkpoint is being written. `IST` seals each checkpoint of the
Trainer when all ranks have written their files: a list of them with sizes and SHA-256 sums, put in place at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["MANIFEST_FILE", "check_checkpoint", "last_checkpoint", "write_manifest"]

MANIFEST_FILE = "ist_manifest.json"
"""Name of the list of files in a checkpoint's folder."""

STATE_FILE = "trainer_state.json"
"""What the Trainer writes last."""

Folder = str | os.PathLike[str]


def write_manifest(folder: Folder) -> None:
    """List the files of a checkpoint in it, with their sizes and sums. Called when all of them are written.

    Args:
        folder: of the checkpoint.
    """
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(Path(folder).rglob("*"))
        if path.is_file() and path.name != MANIFEST_FILE
    }
    temporary = Path(folder) / (MANIFEST_FILE + ".tmp")
    temporary.write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, Path(folder) / MANIFEST_FILE)


def check_checkpoint(folder: Folder) -> None:
    """Make sure that a checkpoint is whole.

    One without a seal (by a Trainer without IST, or by one killed just before sealing) is read as far as its formats
    tell a whole file from a part: JSON, safetensors and torch's archives.

    Args:
        folder: of the checkpoint.

    Raises:
        ValueError: it is damaged; the message says where, and names the last whole checkpoint before it.
    """
    fault = find_fault(Path(folder))
    if fault is None:
        return
    earlier = next((path for path in earlier_checkpoints(Path(folder)) if find_fault(path) is None), None)
    way_out = f"resume from {earlier}, the last whole one before it" if earlier else "none before it is whole"
    raise ValueError(f"The checkpoint {folder} is damaged ({fault}): {way_out}.")


def last_checkpoint(folder: Folder) -> Path | None:
    """The newest whole checkpoint of a run, for `trainer.train(resume_from_checkpoint=…)`.

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
    found = {int(m[1]): path for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"\D+(\d+)", path.name))}
    return [found[step] for step in sorted(found, reverse=True)]


def earlier_checkpoints(folder: Path) -> Iterator[Path]:
    """Those beside a checkpoint that came before it, the newest first."""
    siblings = checkpoints(folder.resolve().parent)
    names = [path.name for path in siblings]
    here = folder.resolve().name
    start = names.index(here) + 1 if here in names else 0
    return (folder.parent / name for name in names[start:])


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    if not folder.is_dir():
        return "there is no such folder"
    seal = folder / MANIFEST_FILE
    if not seal.is_file():
        return find_fault_without_manifest(folder)
    try:
        files: dict[str, dict[str, Any]] = json.loads(seal.read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError):
        return f"{MANIFEST_FILE} cannot be read"
    for name, listed in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != listed["bytes"]:
            return f"{name} has {size} of {listed['bytes']} bytes"
        if sha256(path) != listed["sha256"]:
            return f"{name} was changed after it was written"
    return None


def find_fault_without_manifest(folder: Path) -> str | None:
    """What can be seen to be wrong with a checkpoint that was not sealed, or None."""
    if not (folder / STATE_FILE).is_file():
        return f"it was never finished, {STATE_FILE} is missing"
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json" and not is_json(path):
            return f"{name} is cut short"
        if path.suffix == ".safetensors" and not is_whole_safetensors(path):
            return f"{name} is cut short"
        if path.suffix in (".pt", ".pth", ".bin") and not is_whole_archive(path):
            return f"{name} is cut short"
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    tuner = (state.get("stateful_callbacks", {}).get("IST") or {}).get("tuner") or {}
    num_processes = tuner.get("num_processes", 1)
    missing = [name for rank in range(num_processes) if not (folder / (name := f"rng_state_{rank}.pth")).is_file()]
    return f"{missing[0]} is missing" if num_processes > 1 and missing else None


def is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def is_whole_safetensors(path: Path) -> bool:
    """Whether a file is as long as its header says."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, path.stat().st_size)))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return path.stat().st_size == 8 + length + max(ends, default=0)


def is_whole_archive(path: Path) -> bool:
    """Whether a file that torch wrote has all its parts, each with the right sum."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is None


def sha256(path: Path) -> str:
    """A file's SHA-256 sum in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
