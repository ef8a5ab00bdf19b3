"""The rooms stand on floors: nothing imports upwards, nothing imports in a circle, and every room has its place."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.helpers import house

MAX_ROOMS = 14


def test_every_room_has_its_place() -> None:
    unplaced = set(house.rooms()) - set(house.ORDER)
    assert not unplaced, f"new rooms {sorted(unplaced)}: give them a place in ORDER of tests/helpers/house.py"


def test_the_house_stays_small() -> None:
    assert len(house.rooms()) <= MAX_ROOMS


@pytest.mark.parametrize("room", house.rooms())
def test_no_import_goes_upwards(room: str) -> None:
    above = house.ORDER[house.ORDER.index(room) + 1 :]
    assert not house.room_imports()[room] & set(above)


def test_no_module_imports_in_a_circle() -> None:
    assert house.circles() == []


@pytest.mark.parametrize("room", house.rooms())
def test_every_room_says_its_purpose_in_one_line(room: str) -> None:
    assert house.purpose(room).endswith((".", "`."))


def test_imports_are_found_wherever_they_stand(tmp_path: Path) -> None:
    """Relative, absolute, indented, in functions, in the middle of a package."""
    (tmp_path / "method" / "inner").mkdir(parents=True)
    file = tmp_path / "method" / "inner" / "x.py"
    file.write_text(
        "import ist.step.depth\n"
        "from ist import tuner\n"
        "from ...config import ISTConfig\n"
        "from .. import sampling\n"
        "from . import y\n"
        "if True:\n    from ...runs.history import History\n"
        "def f():\n    from ...cli.main import main\n"
        "import torch\nfrom torch import nn\n"
    )
    assert set(house.imported_modules(file, tmp_path)) == {
        "step.depth",
        "tuner",
        "config.ISTConfig",
        "method.sampling",
        "method.inner.y",
        "runs.history.History",
        "cli.main.main",
    }


def test_a_circle_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("def f():\n    from .b import g\n")
    (tmp_path / "b.py").write_text("from .a import f\n")
    (tmp_path / "c.py").write_text("from .a import f\n")
    assert house.circles(tmp_path) == [("a", "b")]


MAX_FILE, MAX_FUNCTION, MAX_TUNER = 300, 60, 250
"""Lines."""


def num_lines(file: Path) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def test_no_file_is_long() -> None:
    found = {file.relative_to(house.SOURCE).as_posix(): num_lines(file) for file in house.SOURCE.rglob("*.py")}
    assert {name: lines for name, lines in found.items() if lines > MAX_FILE} == {}


def long_functions() -> dict[str, int]:
    """The lines of each function of the library that is longer than `MAX_FUNCTION`."""
    found = {}
    for file in sorted(house.SOURCE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                if lines > MAX_FUNCTION:
                    found[f"{file.relative_to(house.SOURCE)}: {node.name}"] = lines
    return found


def test_no_function_is_long() -> None:
    assert long_functions() == {}


def test_the_tuner_ties_the_parts_together_and_does_nothing_else() -> None:
    assert num_lines(house.SOURCE / "tuner.py") < MAX_TUNER


@pytest.mark.parametrize("name", ["Batch", "Products", "check_options", "has_gradient", "marks_of"])
def test_a_name_means_one_thing(name: str) -> None:
    """These once stood in two rooms with two meanings."""
    places = [
        file
        for file in house.SOURCE.rglob("*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if name == getattr(node, "name", None)
        or name in [getattr(target, "id", None) for target in getattr(node, "targets", ())]
    ]
    assert len(places) == 1, places
