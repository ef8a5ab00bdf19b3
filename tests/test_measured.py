"""The plugin that leaves cases of a parametrised test unmeasured where they bring no new line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULE = """\
def name(number):
    if number == 2:
        return "two"
    if number == 7:
        return "seven"
    return "many"
"""
TESTS = """\
import sys
import time
import pytest
from measured_module import name

@pytest.mark.parametrize("number", range(8))
def test_name(number):
    end = time.process_time() + {seconds}
    while time.process_time() < end:
        pass
    assert name(number)
    assert (sys.gettrace() is None) == ({seconds} > 0 and number >= 5)
"""


@pytest.mark.parametrize(
    ("seconds", "lines", "processes"),
    [
        (0, [1, 2, 3, 4, 5, 6], []),  # quick cases are all measured
        (0.15, [1, 2, 3, 4, 6], []),  # after 2, which brings a line, come two that bring none: 7 is not measured
        (0.15, [1, 2, 3, 4, 6], ["-n", "1"]),  # where pytest-cov measures twice
    ],
)
def test_slow_cases_without_a_new_line_end_the_measuring(
    tmp_path: Path, seconds: float, lines: list[int], processes: list[str]
) -> None:
    (tmp_path / "measured_module.py").write_text(MODULE)
    (tmp_path / "test_name.py").write_text(TESTS.format(seconds=seconds))
    assert lines_of(tmp_path, "8 passed", *processes) == lines


def lines_of(folder: Path, passed: str, *options: str) -> list[int]:
    """The lines of the module that pytest, run in a folder, reports as walked."""
    options = ("-p", "tests.helpers.measured", "--cov=measured_module", "--cov-report=json", *options)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "--rootdir", str(folder), "."],
        cwd=folder,
        env={"PYTHONPATH": f"{ROOT}:{folder}"},
        capture_output=True,
        text=True,
    )
    assert passed in done.stdout, done.stdout + done.stderr
    report = json.loads((folder / "coverage.json").read_text())
    return report["files"]["measured_module.py"]["executed_lines"]


def test_slow_tests_without_a_new_line_end_the_measuring_of_their_file(tmp_path: Path) -> None:
    """Whichever tests they are; another file's are measured."""
    (tmp_path / "measured_module.py").write_text(MODULE)
    tests = [TESTS.format(seconds=0.15).partition("@")[0]]
    for place, number in enumerate([1, 3, 4, 5, 6, 2]):  # the first brings lines, the next four bring none
        spent = "end = time.process_time() + 0.15\n    while time.process_time() < end:\n        pass"
        tests.append(f"def test_{place}():\n    {spent}\n    assert name({number})\n")
    (tmp_path / "test_a.py").write_text("\n".join(tests))
    (tmp_path / "test_b.py").write_text(f"{tests[0]}\ndef test_b():\n    assert name(7)\n")
    assert lines_of(tmp_path, "7 passed") == [1, 2, 4, 5, 6]
