"""Whole files: all of the new content or all of the old, and nothing beside them."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ist.runs.files import write_json, write_whole
from tests.helpers.house import SOURCE


@pytest.mark.parametrize("text", ["größer\n", "a\r\nb", ""])
def test_a_file_holds_what_was_written(text: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    for _ in range(2):
        write_whole(file, text)
        assert file.read_bytes() == text.encode()
    assert list(tmp_path.iterdir()) == [file]


def test_a_link_in_the_place_of_the_part_is_not_written_through(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    (tmp_path / f".file.{os.getpid()}.part").symlink_to(mine)
    write_whole(tmp_path / "file", "new")
    assert mine.read_text() == "precious"
    assert (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()


def test_a_folder_in_the_place_of_a_file_is_named_and_stays(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    with pytest.raises(ValueError, match="file is a folder, where a file has to be written"):
        write_whole(tmp_path / "file", "new")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_values_are_written_as_json(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [1, None]}, indent=None)
    assert (tmp_path / "a.json").read_text() == '{"a": [1, null]}\n'


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_is_as_it_was(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    write_whole(file, "old")

    def fail(*_: object) -> None:
        raise OSError("no room")

    monkeypatch.setattr(os, fails, fail)
    with pytest.raises(OSError, match="no room"):
        write_whole(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


WRITES = {"write_text", "write_bytes", "savefig", "save", "save_file", "tofile", "to_csv"}
DUMPS = {"dump", "safe_dump"}
OTHERWISE = {
    "runs/files.py: open": "the one writer",
    "runs/history.py: write_text": "empties a stream, which may be a link or a device: it is not replaced",
    "experiments/evaluation/answers.py: open": "appends a line for each answer",
    "cli/compare/runs.py: open": "appends a program's output, a log",
    "experiments/report/analysis.py: savefig": "into what `replacing` of the one writer gives",
    "experiments/report/comparison.py: savefig": "likewise",
    "experiments/report/lines.py: savefig": "likewise",
    "experiments/report/pictures.py: savefig": "likewise",
}
"""What writes in another way, and why."""


def writes(file: Path) -> Iterator[str]:
    """The calls in a source file that write a file: by one of `WRITES`, by one of `DUMPS` into something, or by `open`
    with a mode for it.
    """
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            values = [*node.args, *(keyword.value for keyword in node.keywords)]
            texts = [value.value for value in values if isinstance(value, ast.Constant)]
            opened = name == "open" and any(isinstance(text, str) and set(text) & set("wax+") for text in texts)
            if name in WRITES or opened or (name in DUMPS and len(node.args) > 1):
                yield name


def test_every_file_is_written_by_the_one_writer(tmp_path: Path) -> None:
    found = {f"{file.relative_to(SOURCE).as_posix()}: {name}" for file in SOURCE.rglob("*.py") for name in writes(file)}
    assert found <= set(OTHERWISE)
    (tmp_path / "a.py").write_text("p.write_text('')\nopen(p, 'w')\np.open(mode='ab')\nopen(p)\ndump(v, f)\ndump(v)\n")
    assert list(writes(tmp_path / "a.py")) == ["write_text", "open", "open", "dump"]


def test_a_file_has_one_name() -> None:
    """A constant `…_FILE` means one file wherever it is, and a file is written as text in one place."""
    names: dict[str, set[str]] = {}
    for file in SOURCE.rglob("*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
                for target in node.targets:
                    if isinstance(target, ast.Name) and target.id.endswith("_FILE"):
                        names.setdefault(target.id, set()).add(str(node.value.value))
    assert {name: files for name, files in names.items() if len(files) > 1} == {}
    files = sorted(file for own in names.values() for file in own)
    assert files == sorted(set(files))
    assert "ist_result.json" in files
