"""Answers as JSON lines, one file a task: an interrupted evaluation resumes from them, and another one is refused."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...runs.files import open_own, read_object, write_whole

__all__ = ["AnswerFile", "OtherAnswersError", "claim_folder", "claimed", "row_id"]

IDENTITY_FILE = "identity.json"


class OtherAnswersError(ValueError):
    """A folder has the answers of another evaluation."""


def claim_folder(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make a folder for the answers of one model with one protocol and its settings.

    Args:
        folder: made where it is not there.
        identity: what the answers depend on, plain JSON.

    Raises:
        ValueError: the folder cannot be made.
        OtherAnswersError: it has answers that came about otherwise; the message names the difference.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"The folder {folder} cannot be written ({error.strerror}): give another one with --output_dir."
        ) from error
    file = folder / IDENTITY_FILE
    wanted = json.loads(json.dumps(identity))
    if not file.exists():
        if next(folder.glob("*.jsonl"), None):
            raise OtherAnswersError(f"{folder} has answers of unknown origin: give another folder with --output_dir.")
        write_whole(file, json.dumps(wanted, indent=2) + "\n")
        return
    known = read_object(file, "give another folder with --output_dir.")
    differences = [
        f"{name} {known.get(name)!r}, now {wanted.get(name)!r}"
        for name in {**known, **wanted}
        if known.get(name) != wanted.get(name)
    ]
    if differences:
        raise OtherAnswersError(
            f"{folder} has the answers of another evaluation ({'; '.join(differences)}): give another folder with "
            "--output_dir."
        )


@contextlib.contextmanager
def claimed(folder: Path, identity: Mapping[str, Any]) -> Iterator[None]:
    """Within the block the folder is claimed; where it ends by an error before the first answer, what was made is
    removed, so that the command can be mended and given again.

    Raises:
        ValueError: as `claim_folder`.
    """
    made = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    claim_folder(folder, identity)
    try:
        yield
    except BaseException:
        if made and not next(folder.rglob("*.jsonl"), None):
            with contextlib.suppress(OSError):
                (folder / IDENTITY_FILE).unlink(missing_ok=True)
                for path in made:
                    path.rmdir()
        raise


def row_id(*parts: Any) -> str:
    """A digest of what was asked, by which an answer knows its row."""
    return hashlib.blake2b(json.dumps(parts, ensure_ascii=False).encode(), digest_size=8).hexdigest()


def is_answer(answer: Mapping[str, Any]) -> bool:
    """Whether a line has the index of a row, and of what a result is made from at most what can be summed up."""
    index, correct = answer["index"], answer.get("correct", False)
    numbers = [answer.get(name, 0) for name in ("score", "loss")]
    tokens = answer.get("tokens", 1)
    return (
        type(index) is int
        and index >= 0
        and isinstance(correct, bool)
        and all(isinstance(number, (int, float)) and abs(number) < math.inf for number in numbers)
        and type(tokens) is int
        and tokens >= 1
    )


def kind_of(answer: Mapping[str, Any]) -> str | None:
    """What of an answer its result is made from."""
    return next((name for name in ("correct", "score", "loss") if name in answer), None)


class AnswerFile:
    """The answers to the rows of one task, written as they come.

    Args:
        file: read where it exists; a last line that was cut off is dropped, and rows beyond the last are passed over.
        ids: of the rows, see `row_id`.

    Raises:
        ValueError: a line is no answer.
        OtherAnswersError: an answer belongs to another row.
    """

    def __init__(self, file: Path, ids: Sequence[str]) -> None:
        self.file = file
        self._ids = list(ids)
        self.answers: dict[int, dict[str, Any]] = {}
        """By the row's index."""
        if file.exists():
            self._read()

    def _read(self) -> None:
        text = self.file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_whole(self.file, whole)
        for number, line in enumerate(whole.split("\n")[:-1], start=1):
            try:
                answer = json.loads(line)
                index, row = answer["index"], answer["id"]
                if not is_answer(answer):
                    raise ValueError
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f"{self.file}, line {number} is no answer: remove the file.") from error
            if index >= len(self._ids):
                continue  # of an evaluation of more rows
            if self._ids[index] != row:
                raise OtherAnswersError(
                    f"{self.file}, line {number} answers another row than number {index} of the task's: the data "
                    "changed; give another folder with --output_dir."
                )
            self.answers[index] = answer
            kinds = {kind_of(answer), kind_of(next(iter(self.answers.values())))}
            if len(kinds) > 1 or ("loss" in kinds and "tokens" not in answer):
                raise ValueError(f"{self.file}, line {number} is no answer like those before it: remove the file.")

    def add(self, answers: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        """Write the answers of some rows, by index, to disk."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file, "a", encoding="utf-8", opener=open_own) as stream:
            for index, answer in answers:
                self.answers[index] = {"index": index, "id": self._ids[index], **answer}
                stream.write(json.dumps(self.answers[index], ensure_ascii=False) + "\n")
            stream.flush()
