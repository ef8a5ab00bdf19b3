"""Rows from JSON, JSON-lines, CSV and parquet files, with one line about what does not fit."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import logging
import os
import zlib
from pathlib import Path
from typing import Any

from .tables import UNPACKS, most_bytes, parse_table, read_parquet

__all__ = ["check_file", "read_rows", "read_text"]

logger = logging.getLogger(__name__)

UNUSABLE = "math_data.json"
"""The LLM-Adapters collection has a file of this name, whose rows contain most of the collection's own test sets."""

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""The encodings that a file names in its first bytes, the longer marks before those that they begin with."""

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
"""How files of these kinds begin, whatever they are called."""

OTHER_KINDS = {
    b"PK\x03\x04": "a zip archive or a spreadsheet (.xlsx)",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ\x00": "compressed by xz",
    b"\x28\xb5\x2f\xfd": "compressed by Zstandard",
    b"ARROW1": "an Arrow file",
    b"version https://git-lfs": "a pointer of Git LFS, not the data (`git lfs pull` brings them)",
}
"""How files begin that are not read, and what they are."""

SEPARATORS = {".csv": None, ".tsv": "\t"}
"""Suffixes of tables, with what stands between their cells where the suffix tells."""

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".parquet")
"""Of files with rows; the texts among them may end in `.gz` as well."""

WANTED = "give a list of objects (.json), one object a line (.jsonl), or a table (.csv, .tsv, .parquet)"
PATTERN = set("*?[")
"""Signs of a pattern that the shell left as it was."""


def read_rows(file: str | Path) -> list[Any]:
    """The rows of a file as they are.

    Args:
        file: a list of objects or one object a line (`.json`, `.jsonl`, whichever it holds), a table with a line of
            names (`.csv`, `.tsv`), or `.parquet`; the texts may be compressed (`.jsonl.gz`).

    Raises:
        ValueError: the file is missing, cannot be read, or holds no rows.
    """
    file = Path(file).expanduser()
    check_file(file)
    if file.name == UNUSABLE:
        logger.warning(
            "%s: the file of this name in the LLM-Adapters collection contains most of the collection's test items; "
            "train on math_10k.json, or give --test_tasks to leave them out.",
            file,
        )
    is_parquet = file.suffix.lower() == ".parquet" or first_bytes(file).startswith(PARQUET)
    rows = read_parquet(file) if is_parquet else _parse(file, read_text(file))
    if not isinstance(rows, list):
        raise ValueError(f"{file} {what_else(rows)}")
    if not rows:
        raise ValueError(f"{file} holds no rows: give a list of objects with instruction and output.")
    return [with_trimmed_names(row) for row in rows]


def with_trimmed_names(row: Any) -> Any:
    """A row whose names have no spaces at their ends, unless two would be the same."""
    if not isinstance(row, dict) or all(name == name.strip() for name in row):
        return row
    trimmed = {name.strip(): value for name, value in row.items()}
    return trimmed if len(trimmed) == len(row) else row


def what_else(content: Any) -> str:
    """What a file holds that holds no list of rows, for the message after its name."""
    if not isinstance(content, dict):
        return f"is a {type(content).__name__}, not a list: give a list of objects with instruction and output."
    within = [name for name, value in content.items() if isinstance(value, list) and value and is_row(value[0])]
    if len(within) == 1:
        return f"is an object that holds rows under {within[0]!r}: give that list alone, or one row a line (.jsonl)."
    return (
        "is an object, not a list: give a list of objects with instruction and output; pandas writes one with "
        "orient='records'."
    )


def is_row(value: Any) -> bool:
    """Whether a value is an object."""
    return isinstance(value, dict)


def check_file(file: Path, wanted: str = WANTED) -> None:
    """Raise ValueError unless there is a file; the message says what is there instead, and what is allowed.

    Args:
        file: as it was named.
        wanted: what to give.
    """
    if file.is_file():
        return
    if file.is_dir():
        held = sorted(path.name for path in file.iterdir() if path.suffix.lower() in SUFFIXES)
        names = f" (it holds {', '.join(held[:3])}{', …' if len(held) > 3 else ''})" if held else ""
        raise ValueError(f"{file} is a folder: name the files in it{names}; {wanted}.")
    if os.path.exists(file):
        raise ValueError(
            f"{file} is a pipe or a device, and files are read more than once: write its content to one; {wanted}."
        )
    if PATTERN & set(file.name):
        found = sorted(path.name for path in file.parent.glob(file.name))
        if found:
            raise ValueError(f"{file} is a pattern, and files go by name: leave out its quotes, or write {found[0]} ….")
        raise ValueError(f"{file} matches no file in {file.parent.absolute()}: {wanted}.")
    raise ValueError(f"There is no file {file} (looked for {file.absolute()}): {wanted}.")


def unknown_suffix(file: Path) -> str:
    """A note on a file whose name ends as none that is read does, for the message that it cannot be."""
    known = any(suffix.lower() in SUFFIXES for suffix in file.suffixes)
    return "" if known else f", and {file.suffix or 'no suffix'} is none of {', '.join(SUFFIXES)}"


def read_text(file: Path) -> str:
    """A text file, decompressed where its name ends in `.gz`, without its byte order mark.

    Raises:
        ValueError: it is not compressed as its name says, or not in UTF-8 or what its byte order mark names.
    """
    data = file.read_bytes()
    if kind := next((kind for mark, kind in OTHER_KINDS.items() if data.startswith(mark)), None):
        raise ValueError(f"{file} is {kind}: give text in UTF-8, or parquet; of compressed files, .gz is read.")
    if file.suffix.lower() == ".gz" or data.startswith(GZIP):
        try:
            data = decompress(data, file)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{file} is not a whole gzip file ({error}): compress it anew.") from error
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not text in UTF-8 (byte {error.start}{unknown_suffix(file)}): save it in that encoding; of "
            "compressed files, .gz is read."
        ) from error


def first_bytes(file: Path) -> bytes:
    """The first four bytes of a file."""
    with file.open("rb") as stream:
        return stream.read(4)


def decompress(data: bytes, file: Path) -> bytes:
    """The content of a gzip file.

    Raises:
        ValueError: a small file unpacks to more than any text does, which would fill the memory.
    """
    most = most_bytes(len(data))
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
        text = stream.read(most + 1)
    if len(text) > most:
        raise ValueError(f"{file} {UNPACKS}")
    return text


def _parse(file: Path, text: str) -> Any:
    """The content of a text file."""
    suffix = next((part for part in reversed([part.lower() for part in file.suffixes]) if part != ".gz"), "")
    try:
        if suffix in SEPARATORS:
            return parse_table(text, SEPARATORS[suffix])
        return _parse_json(text, lines=suffix in (".jsonl", ".ndjson"))
    except csv.Error as error:
        raise ValueError(f"{file} is not a table ({error}): give a line of names and one line a row (.csv).") from error
    except json.JSONDecodeError as error:
        where = f"{error.msg} in line {error.lineno}{unknown_suffix(file)}"
        raise ValueError(f"{file} is not JSON ({where}): {WANTED}.") from error
    except RecursionError as error:
        raise ValueError(f"{file} is not JSON that can be read (it nests too deep): {WANTED}.") from error
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{file} is not JSON that can be read ({error}): {WANTED}.") from error


def _parse_json(text: str, lines: bool) -> Any:
    """A list of objects, or objects in lines, whatever the file is called; errors count lines from its start.

    Args:
        text: of the file.
        lines: its name says that each line holds an object, so that a single one is a row.
    """
    if text.lstrip().startswith("["):
        return json.loads(text)
    if lines:
        return _parse_lines(text)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
    return _parse_lines(text)


def _parse_lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        line = line.removeprefix("\ufeff")  # Where files with byte order marks were joined.
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                error.lineno = number
                raise
    return rows
