"""Each equation of the paper is found by a search where it is computed, and nowhere else."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EQUATIONS = re.findall(
    r"^\| (equation \d+|algorithm \d+) \|.*\| `([^`]+)` \| `([^`]+)` \|$",
    (ROOT / "docs" / "paper-and-code.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
"""What of the paper is computed, in which module, and by what in it."""


def docstrings(file: Path) -> dict[str, str]:
    """The docstrings of a module's functions and classes by name, and of the module itself by ``."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    parts = {"": tree, **{node.name: node for node in ast.walk(tree) if isinstance(node, kinds)}}
    return {name: ast.get_docstring(node) or "" for name, node in parts.items()}


def test_each_equation_that_can_be_computed_has_its_row() -> None:
    assert [what for what, _, _ in EQUATIONS] == [*(f"equation {number}" for number in range(6, 14)), "algorithm 1"]


@pytest.mark.parametrize(("what", "module", "name"), EQUATIONS)
def test_a_search_for_an_equation_leads_to_its_one_implementation(what: str, module: str, name: str) -> None:
    source = ROOT / "src" / "ist"
    assert f"{what} of the paper" in docstrings(source / module)[name].lower()
    found = [
        file.relative_to(source).as_posix()
        for file in source.rglob("*.py")
        if re.search(rf"{what}\b", file.read_text(encoding="utf-8"), re.IGNORECASE)
    ]
    assert found == [module]
