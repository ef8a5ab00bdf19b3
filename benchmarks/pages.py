"""Tables in texts, made from the JSON files of benchmarks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["fill", "load_results", "markdown", "source", "write_section"]

COST_PAGE = Path(__file__).parents[1] / "docs" / "cost.md"
"""What training costs: memory, time, and the importance loop."""
NOT_MEASURED = "Not measured yet."


def load_results(folder: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The results in a folder, of one program if one is named, in the order in which they were measured."""
    results = [
        {**json.loads(file.read_text(encoding="utf-8")), "file": file.name} for file in sorted(folder.glob("*.json"))
    ]
    chosen = [result for result in results if kind in (None, result.get("kind"))]
    return sorted(chosen, key=lambda result: result.get("date", ""))


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def source(result: dict[str, Any]) -> str:
    """Where figures come from."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return f"{result['device']}, commit {result['commit']} ({versions})"


def fill(page: str, marks: tuple[str, str], text: str) -> str:
    """The page with `text` between the marks.

    Raises:
        ValueError: the page lacks them.
    """
    begin, end = map(re.escape, marks)
    filled, count = re.subn(f"{begin}.*?{end}", lambda _: f"{marks[0]}\n\n{text}\n\n{marks[1]}", page, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"The page lacks the line {marks[0]}")
    return filled


def write_section(name: str, tables: Sequence[str], page: Path = COST_PAGE) -> None:
    """Fill one section of a page, which has its name in two comments."""
    marks = (f"<!-- {name}: made by `make tables` from JSON files -->", f"<!-- end of {name} -->")
    text = fill(page.read_text(encoding="utf-8"), marks, "\n\n".join(tables) or NOT_MEASURED)
    page.write_text(text, encoding="utf-8")
