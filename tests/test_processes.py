"""The forked processes of the tests behave as ones that Python has just started."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.helpers.processes import Forked, run

SAYS = """
import os, sys, random, numpy
print(__name__, sys.argv[1:], os.environ.get("OMP_NUM_THREADS"), "torch" in sys.modules, "ist" in sys.modules)
print("a warning", file=sys.stderr)
print(random.random(), numpy.random.random())
"""


def test_it_runs_as_a_script_with_its_own_streams_and_nothing_of_the_library() -> None:
    first, second = (run(SAYS, "a", 2) for _ in range(2))
    said, numbers = first.stdout.splitlines()
    assert said == "__main__ ['a', '2'] 1 True False"
    assert (first.returncode, first.stderr) == (0, "a warning\n")
    assert numbers != second.stdout.splitlines()[1], "two processes draw the same"


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('a sentence')", 1, "a sentence\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import atexit, sys\natexit.register(lambda: print('last', file=sys.stderr))\nsys.exit(4)", 4, "last\n"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM, ""),
    ],
)
def test_statuses_are_those_of_a_script(code: str, status: int, said: str) -> None:
    done = run(code)
    assert done.returncode == status
    assert done.stderr.endswith(said)
    assert said or not done.stderr


def test_one_that_does_not_end_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import time\ntime.sleep(100)\n")
    process = Forked(script)
    with pytest.raises(subprocess.TimeoutExpired):
        process.completed(timeout=0.5)
    process.communicate()
    assert process.poll() == -signal.SIGKILL


def test_several_run_at_once_each_in_its_environment(tmp_path: Path) -> None:
    """Each waits for the other's file."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, time\n"
        "rank, folder = int(os.environ['RANK']), pathlib.Path(__file__).parent\n"
        "(folder / str(rank)).touch()\n"
        "while not (folder / str(1 - rank)).exists():\n"
        "    time.sleep(0.01)\n"
        "print(rank)\n"
    )
    processes = [Forked(script, env={**os.environ, "RANK": str(rank)}) for rank in range(2)]
    assert [process.completed().stdout for process in processes] == ["0\n", "1\n"]
