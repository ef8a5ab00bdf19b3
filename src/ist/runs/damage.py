"""What is wrong with a checkpoint, in words. Files of a stranger are read here: no content may raise, hang or run."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError, safe_open

__all__ = ["MANIFEST_FILE", "find_fault", "is_count", "is_needed", "sha256", "shown"]

MANIFEST_FILE = "ist_manifest.json"
"""The checksum manifest in a checkpoint's folder: files that a resume needs, with their sizes and SHA-256 sums."""

STATE_FILE = "trainer_state.json"
"""What the Trainer writes last."""

MAX_JSON_BYTES = 1 << 28
"""A longer JSON file was written by no Trainer."""

CHANGED = "was changed after it was written"

ARCHIVES = (".pt", ".pth", ".bin")

UNREADABLE = (
    *(OSError, ValueError, RecursionError, MemoryError, OverflowError, EOFError, RuntimeError, struct.error),
    *(zipfile.BadZipFile, zlib.error),
)
"""What the standard library raises over files that are not what their names say."""


def is_needed(name: str) -> bool:
    """Whether a resume needs a file of a checkpoint: weights, optimizer, schedule, generators and the Trainer's state.

    Cards, configurations and tokenizers are not among them: a run makes its own from its command.

    Args:
        name: path within the checkpoint, with slashes.
    """
    path = PurePosixPath(name)
    if path.name == "training_args.bin":
        return False
    weights = (".safetensors", ".distcp", *ARCHIVES)
    return name == STATE_FILE or path.suffix in weights or path.name == ".metadata" or name.endswith(".index.json")


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        if not folder.is_dir():
            return "there is no such folder"
        if not (folder / STATE_FILE).is_file():
            return f"it was never finished, {STATE_FILE} is missing"
        listed = (folder / MANIFEST_FILE).is_file()
        fault = find_fault_by_manifest(folder) if listed else find_fault_in_files(folder)
        return fault or find_fault_in_state(folder, check_ranks=not listed)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"


def find_fault_by_manifest(folder: Path) -> str | None:
    """Which needed file is not as the manifest lists it, or None."""
    content = read_json(folder / MANIFEST_FILE)
    files = content.get("files") if isinstance(content, dict) else None
    if not isinstance(files, dict):
        return f"{MANIFEST_FILE} cannot be read"
    for name, entry in files.items():
        size, digest = (entry.get("bytes"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        if not isinstance(size, int) or not isinstance(digest, str) or not is_inside(name):
            return f"{MANIFEST_FILE} has an entry that is none, {name[:80]!r}"
        if not is_needed(name):
            continue
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (found := path.stat().st_size) != size:
            return f"{name} has {found} of {size} bytes"
        if sha256(path) != digest:
            return f"{name} {CHANGED}"
    return None


def is_inside(name: str) -> bool:
    """Whether a name in a manifest is of a file within the checkpoint."""
    path = PurePosixPath(name)
    proper = path.as_posix() == name and not path.is_absolute() and ".." not in path.parts
    return proper and len(name) < 1000 and "\0" not in name


def find_fault_in_files(folder: Path) -> str | None:
    """What can be seen to be wrong with the files of a checkpoint without a manifest, or None."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not is_needed(name) or path.is_dir():
            continue
        if not path.is_file():
            return f"{name} is no file"
        if path.suffix == ".json" and not isinstance(read_json(path), dict):
            return f"{name} is cut short or no JSON object"
        if path.suffix == ".safetensors" and not is_whole_safetensors(path):
            return f"{name} is cut short or no safetensors file"
        if path.suffix in ARCHIVES and not is_whole_archive(path):
            return f"{name} is cut short or no archive of torch"
    return None


def find_fault_in_state(folder: Path, check_ranks: bool) -> str | None:
    """What is wrong with the Trainer's state, as far as a resume reads it, or None."""
    state = read_json(folder / STATE_FILE)
    if not isinstance(state, dict):
        return f"{STATE_FILE} is cut short or no JSON object"
    if not is_count(state.get("global_step")):
        return f"{STATE_FILE} is of step {shown(state.get('global_step'))}"
    if wrong := next((name for name, is_right in STATE.items() if name in state and not is_right(state[name])), None):
        return f"{STATE_FILE} has {shown(state[wrong])} as {wrong}"
    named = re.fullmatch(r"checkpoint-(\d{1,15})", folder.name)
    if named and int(named[1]) != state["global_step"]:
        return f"{STATE_FILE} is of step {state['global_step']}"
    callbacks = state.get("stateful_callbacks") or {}
    own = (callbacks.get("IST") or {}) if isinstance(callbacks, dict) else None
    tuner = (own.get("tuner") or {}) if isinstance(own, dict) else None
    if not isinstance(tuner, dict):
        return f"{STATE_FILE} holds a state of IST that is none"
    num_processes = tuner.get("num_processes", 1)
    if not is_count(num_processes) or num_processes < 1:
        return f"{STATE_FILE} is of {shown(num_processes)} processes"
    if check_ranks and num_processes > 1:
        # Ends at the first that is missing, however many it claims.
        names = (f"rng_state_{rank}.pth" for rank in range(num_processes))
        missing = next((name for name in names if not (folder / name).is_file()), None)
        return missing and f"{missing} is missing"
    return None


def is_number(value: Any) -> bool:
    """Whether a value is a number, or null; NaN and infinities are, since a loss can be one."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def is_period(value: Any) -> bool:
    """Whether a value can be the steps between two events."""
    return is_number(value) and (value is None or 0 < value < 1 << 53)


def is_log(value: Any) -> bool:
    """Whether a value is a list of objects."""
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


STATE = {
    **dict.fromkeys(("epoch", "best_metric", "total_flos", "num_input_tokens_seen", "max_steps"), is_number),
    **dict.fromkeys(("logging_steps", "eval_steps", "save_steps"), is_period),
    "train_batch_size": lambda value: value is None or is_count(value),
    "log_history": is_log,
    "stateful_callbacks": lambda value: isinstance(value, dict),
}
"""What the Trainer's state may hold, of what a resume computes with."""


def is_count(value: Any) -> bool:
    """Whether a value of a JSON file can count steps or processes."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def shown(value: Any) -> str:
    """A value of a stranger's file as a message shows it: on one line, short, control characters escaped."""
    small = isinstance(value, str | float | None) or (isinstance(value, int) and abs(value) < 1 << 63)
    text = ascii(value) if small else type(value).__name__
    return text if len(text) <= 40 else text[:39] + "…"


def read_json(path: Path) -> Any:
    """The content of a JSON file, or None where it holds none."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except UNREADABLE:
        return None


def is_whole_safetensors(path: Path) -> bool:
    """Whether the format's own reader takes a file: its header is one, and the file as long as it says."""
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, *UNREADABLE):
        return False


def is_whole_archive(path: Path) -> bool:
    """Whether a file that torch wrote has all its parts, each with the right sum. Nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            # torch compresses nothing; a small file that unpacks to terabytes is not its.
            stored = all(part.compress_type == zipfile.ZIP_STORED for part in parts)
            if not stored or sum(part.file_size for part in parts) > path.stat().st_size:
                return False
            return archive.testzip() is None
    except (NotImplementedError, *UNREADABLE):
        return False


def sha256(path: Path) -> str:
    """A file's SHA-256 sum in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in blocks(file):
            digest.update(block)
    return digest.hexdigest()


def blocks(file: Any) -> Iterator[bytes]:
    """The content of a file in parts that fit into memory."""
    while block := file.read(1 << 20):
        yield block
