"""Rows from JSON, JSON-lines and CSV files, with one line about what does not fit."""

from __future__ import annotations

import csv
import io
import json
import logging
from pathlib import Path
from typing import Any

__all__ = ["read_rows"]

logger = logging.getLogger(__name__)

UNUSABLE = "math_data.json"
"""The LLM-Adapters collection has a file of this name, whose rows contain most of the collection's own test sets."""


def read_rows(file: str | Path) -> list[Any]:
    """The rows of a file as they are.

    Args:
        file: a list of objects (`.json`), one object a line (`.jsonl`), or a table with a line of names (`.csv`).

    Raises:
        ValueError: the file is missing, cannot be read, or holds no rows.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file} is not a file: give JSON or JSON-lines files of rows with instruction and output.")
    if file.name == UNUSABLE:
        logger.warning(
            "%s: the file of this name in the LLM-Adapters collection contains most of the collection's test items; "
            "train on math_10k.json, or give --test_tasks to leave them out.",
            file,
        )
    try:
        rows = _parse(file)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{file} is not JSON ({error.msg} in line {error.lineno}): give a list of objects (.json) or one object a "
            "line (.jsonl)."
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8 (byte {error.start}): save it in that encoding.") from error
    except csv.Error as error:
        raise ValueError(f"{file} is not a table ({error}): give a line of names and one line a row (.csv).") from error
    if not isinstance(rows, list):
        raise ValueError(
            f"{file} is a {type(rows).__name__}, not a list: give a list of objects with instruction and output."
        )
    if not rows:
        raise ValueError(f"{file} holds no rows: give a list of objects with instruction and output.")
    return rows


def _parse(file: Path) -> Any:
    """The content of a file; errors count lines from the start of the file."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".csv":
        return _parse_table(text.removeprefix("\ufeff"))
    if file.suffix != ".jsonl":
        return json.loads(text)
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                error.lineno = number
                raise
    return rows


def _parse_table(text: str) -> list[dict[str, str]]:
    """Rows by the names in the first line."""
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows = []
    for row in table:
        if None in row or None in row.values():
            raise csv.Error(f"line {table.line_num} has not as many cells as the first")
        rows.append(row)
    return rows
