"""The comparison of two runs: what is equal, what differs, and what is missing."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent


def load(name: str) -> ModuleType:
    """A module of this folder, which is no package."""
    spec = importlib.util.spec_from_file_location(f"unchanged_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare_runs = load("compare_runs")

TRAINED: dict[str, Any] = {"adapters": "aa", "history": "bb", "losses": [3.0, 2.0, 1.0]}
CHANGES: dict[str, tuple[Any, list[str]]] = {
    "adapters": ({**TRAINED, "adapters": "ab"}, ["DIFFERENT", "equal", "equal"]),
    "history": ({**TRAINED, "history": "ba"}, ["equal", "DIFFERENT", "equal"]),
    "last digit of a loss": (
        {**TRAINED, "losses": [3.0, 2.0000000000000004, 1.0]},
        ["equal", "equal", "DIFFERENT from step 2"],
    ),
    "fewer losses": ({**TRAINED, "losses": [3.0, 2.0]}, ["equal", "equal", "DIFFERENT from step 3"]),
    "missing": (None, ["trained before, missing after"] * 3),
    "skipped": ({"skipped": "bitsandbytes is not installed"}, ["trained before, skipped after"] * 3),
    "failed": ({"failed": "ValueError: no"}, ["trained before, failed after"] * 3),
}


def run_of(**cases: Any) -> dict[str, Any]:
    return {"commit": "c", "device": "CPU", "versions": {}, "cases": copy.deepcopy(cases)}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "before.json", tmp_path / "after.json"


def compare(files: tuple[Path, Path], before: Any, after: Any) -> int:
    """The exit status for two runs in files."""
    for file, run in zip(files, (before, after), strict=True):
        file.write_text(json.dumps(run))
    return compare_runs.compare_files(*files)


def test_equal_runs(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(lora=TRAINED, dora=TRAINED)
    assert compare_runs.compare_runs(run, run) == ({"lora": ["equal"] * 3, "dora": ["equal"] * 3}, [])
    assert compare(files, run, {**run, "seconds": 2.0, "commit": "d"}) == 0
    assert capsys.readouterr().out.splitlines() == [
        "case  adapters  history  losses",
        "lora  equal     equal    equal",
        "dora  equal     equal    equal",
        "",
        "c and d: 2 of 2 cases are equal to the bit.",
    ]


@pytest.mark.parametrize("name", CHANGES)
def test_one_case_differs(files: tuple[Path, Path], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    changed, row = CHANGES[name]
    before = run_of(lora=TRAINED, dora=TRAINED)
    after = run_of(lora=TRAINED, **({} if changed is None else {"dora": changed}))
    assert compare_runs.compare_runs(before, after) == ({"lora": ["equal"] * 3, "dora": row}, ["dora"])
    assert compare(files, before, after) == 1
    assert compare(files, after, before) == 1
    assert "1 of 2 cases are equal" in capsys.readouterr().out


def test_a_case_that_failed_or_was_skipped_in_both_runs() -> None:
    skipped, failed = run_of(lora={"skipped": "no"}), run_of(lora={"failed": "no"})
    assert compare_runs.compare_runs(skipped, skipped)[1] == []
    assert compare_runs.compare_runs(failed, failed)[1] == ["lora"]


def test_other_versions_are_named(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run = run_of(lora=TRAINED)
    assert compare(files, run, {**run, "versions": {"torch": "3"}}) == 0
    assert "The runs had different versions, which can change rounding: {}, {'torch': '3'}" in capsys.readouterr().out


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"cases": {}}'])
def test_a_file_that_is_no_run_is_refused(files: tuple[Path, Path], text: str | None) -> None:
    files[0].write_text(json.dumps(run_of(lora=TRAINED)))
    if text is not None:
        files[1].write_text(text)
    with pytest.raises(ValueError, match=r"after\.json .*: give a file that run\.py wrote\.$"):
        compare_runs.compare_files(*files)


def test_the_recorded_run_is_whole() -> None:
    """Every case of the commit before the restructuring was trained and measured something."""
    run = compare_runs.read_run(HERE / "results" / "9bb573e.json")
    assert run["commit"].startswith("9bb573e")
    assert not run["commit"].endswith("-dirty")
    outcomes = {name: compare_runs.outcome(case) for name, case in run["cases"].items()}
    assert set(outcomes.values()) == {"trained"}, outcomes


def test_the_restructured_code_trained_the_same() -> None:
    """Recorded on one machine, before the restructuring and after it."""
    before, after = (compare_runs.read_run(HERE / "results" / f"{commit}.json") for commit in ("9bb573e", "4116c2f"))
    assert before["versions"] == after["versions"]
    rows, different = compare_runs.compare_runs(before, after)
    assert len(rows) == 18
    assert different == []
