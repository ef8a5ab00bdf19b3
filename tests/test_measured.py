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
import time
import pytest
from measured_module import name

@pytest.mark.parametrize("number", range(8))
def test_name(number):
    end = time.process_time() + {seconds}
    while time.process_time() < end:
        pass
    assert name(number)
"""


@pytest.mark.parametrize(
    ("seconds", "lines"),
    [
        (0, [1, 2, 3, 4, 5, 6]),  # quick cases are all measured
        (0.15, [1, 2, 3, 4, 6]),  # after 2, which brings a line, come two that bring none: 7 is not measured
    ],
)
def test_slow_cases_without_a_new_line_end_the_measuring(tmp_path: Path, seconds: float, lines: list[int]) -> None:
    (tmp_path / "measured_module.py").write_text(MODULE)
    (tmp_path / "test_name.py").write_text(TESTS.format(seconds=seconds))
    options = ["-p", "tests.helpers.measured", "--cov=measured_module", "--cov-report=json", "--strict-markers"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, "--rootdir", str(tmp_path), "."],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
    )
    assert "8 passed" in done.stdout, done.stdout + done.stderr
    report = json.loads((tmp_path / "coverage.json").read_text())
    assert report["files"]["measured_module.py"]["executed_lines"] == lines
