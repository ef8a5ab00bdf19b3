"""Rows from tables: CSV as spreadsheets write it, and parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy

from ...runtime.packages import how_to_install

__all__ = ["UNPACKS", "most_bytes", "parse_table", "read_parquet"]


MOST_RATIO, LEAST_LIMIT = 200, 1 << 24
"""How many times its size a compressed file may unpack to, and how many bytes any may."""

UNPACKS = f"unpacks to more than {MOST_RATIO} times its size, as no text does: unpack it yourself if you trust it."


def most_bytes(size: int) -> int:
    """How many bytes a compressed file of a size may unpack to; a small one could fill the memory otherwise."""
    return max(LEAST_LIMIT, MOST_RATIO * size)


def unpacked(parquet: Any, most: int) -> list[dict[str, Any]]:
    """The rows of an open parquet file.

    Raises:
        MemoryError: they take more than `most` bytes.
    """
    rows: list[dict[str, Any]] = []
    taken = 0
    singles = [field.name for field in parquet.schema_arrow if str(field.type) == "float"]

    def as_written(row: dict[str, Any]) -> dict[str, Any]:
        return row | {name: shortest(row[name]) for name in singles}

    for part in parquet.iter_batches(batch_size=256):
        taken += part.nbytes + 8 * part.num_rows
        if taken > most:
            raise MemoryError
        rows += [as_written(row) for row in part.to_pylist()] if singles else part.to_pylist()
    return rows


def shortest(value: Any) -> Any:
    """A number of single precision as it was written: 0.1, and not 0.10000000149011612."""
    return float(str(numpy.float32(value))) if isinstance(value, float) else value


def parse_table(text: str, separator: str | None = None) -> list[dict[str, str]]:
    """Rows by the names in the first line, whose spaces at both ends do not count.

    Args:
        text: of the file.
        separator: between cells; None: a comma, or a semicolon or a tab where the line of names has no comma.

    Raises:
        csv.Error: a name is missing or comes twice, or a line has more or fewer cells than the first.
    """
    first = text.lstrip("\r\n").partition("\n")[0]
    if separator is None:
        separator = next((sign for sign in (",", ";", "\t") if sign in first), ",")
    # Where a space follows the separator of the names, it follows those of the rows too, before quotes among others.
    spaced = f"{separator} " in first
    limit = csv.field_size_limit(max(len(text), csv.field_size_limit()))
    try:
        table = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=separator, skipinitialspace=spaced)
        names = [name.strip() for name in next(filter(None, table), [])]
        check_names(names)
        rows = []
        for cells in filter(None, table):
            if len(cells) != len(names):
                raise csv.Error(f"line {table.line_num} has not as many cells as the first")
            rows.append(dict(zip(names, cells, strict=True)))
        return rows
    finally:
        csv.field_size_limit(limit)


def check_names(names: Sequence[str]) -> None:
    """Raise csv.Error where two columns have one name; columns without one, as pandas writes for its index, may."""
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise csv.Error(f"two columns are called {', '.join(map(repr, twice))}")


def read_parquet(file: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file; what a row lacks is None.

    Raises:
        ValueError: pyarrow is not installed, or the file is not parquet.
    """
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{file} is parquet, which pyarrow reads: {how_to_install('pyarrow')}, or give JSON lines."
        ) from error
    try:
        with parquet.ParquetFile(file) as table:
            check_names([name.strip() for name in table.schema_arrow.names])
            return unpacked(table, most_bytes(file.stat().st_size))
    except csv.Error as error:
        raise ValueError(f"{file} is not a table ({error}): rename one of them.") from error
    except MemoryError:
        raise ValueError(f"{file} {UNPACKS}") from None
    except (pyarrow.ArrowException, OSError) as error:
        said = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{file} is not parquet that can be read ({said}): write it anew, or give JSON lines."
        ) from error
