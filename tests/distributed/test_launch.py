"""What the launcher of these tests says of processes that end, fail and hang."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launch import launch

pytestmark = pytest.mark.distributed

FAILS = "import os, sys, time\nif os.environ['RANK'] == '1':\n    sys.exit('rank 1 of ' + os.environ['WORLD_SIZE'])\n"
HANGS = "time.sleep(100)\n"


def run(folder: Path, code: str, timeout: float) -> list[subprocess.CompletedProcess[str]]:
    script = folder / "script.py"
    script.write_text(code)
    return launch([script], 2, timeout=timeout)


def test_each_rank_has_its_number_and_its_status(tmp_path: Path) -> None:
    first, second = run(tmp_path, FAILS, 60)
    assert (first.returncode, first.stderr) == (0, "")
    assert (second.returncode, second.stderr) == (1, "rank 1 of 2\n")


def test_where_one_has_failed_the_others_end_and_what_it_said_is_seen(tmp_path: Path) -> None:
    first, second = run(tmp_path, FAILS + HANGS, 5)
    assert first.returncode == -9
    assert (second.returncode, second.stderr) == (1, "rank 1 of 2\n")


def test_where_none_has_failed_a_hang_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        run(tmp_path, "import time\n" + HANGS, 2)
