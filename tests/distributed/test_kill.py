"""A training that SIGKILL ends at a random moment, and that is resumed, ends as one that nobody killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from device import ON_CPUS
from matrix import FOLDER, note

WORKER = Path(__file__).parent / "kill_worker.py"
FORKED = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""GPUs are asked for in a way that leaves forked processes free to use them."""


def kill(tmp_path: Path, num_processes: int, num_kills: int, seed: int, timeout: float) -> dict[str, Any]:
    file = tmp_path / f"kills-{num_processes}.json"
    finished = subprocess.run(
        [sys.executable, str(WORKER), str(file), str(num_processes), str(num_kills), str(seed)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **FORKED},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return json.loads(file.read_text())


def check(result: dict[str, Any], num_kills: int) -> None:
    kills = [kill for run in result["runs"] for kill in run["kills"]]
    assert len(kills) >= num_kills
    assert any(kill["step"] for kill in kills), "every kill came before the first step"
    for run in result["runs"]:
        assert "error" not in run, run["error"]
        assert run["differing"] == [], run
        assert run["steps"] == list(range(1, result["steps"] + 1)), "the history lacks steps or has some twice"


@pytest.mark.distributed
@pytest.mark.parametrize("num_processes", [1, 2])
def test_killed_runs_end_as_the_whole_one(num_processes: int, tmp_path: Path) -> None:
    check(kill(tmp_path, num_processes, num_kills=3, seed=1, timeout=240 if ON_CPUS else 480), num_kills=3)
    note("SIGKILL and resume", "3 kills, equal to the bit", num_processes, "right", "test_killed_runs")


@pytest.mark.nightly
@pytest.mark.parametrize("num_processes", [1, 2])
def test_twenty_random_kills(num_processes: int, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    result = kill(tmp_path, num_processes, num_kills=20, seed=seed, timeout=1800)
    check(result, num_kills=20)
    aims = [kill["aim"] for run in result["runs"] for kill in run["kills"]]
    assert "after the last checkpoint" in aims, "no kill came after the last checkpoint"
    if folder := os.environ.get(FOLDER):
        (Path(folder) / "kills").mkdir(parents=True, exist_ok=True)
        (Path(folder) / "kills" / f"kills-{num_processes}.json").write_text(json.dumps(result, indent=1))
