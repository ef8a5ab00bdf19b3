"""Every kind of adapter trains under DDP as it does alone on the whole batch."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launch import launch
from matrix import FOLDER

from tests.helpers.tuner_types import METHODS, is_available

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "methods_worker.py"
TOLERANCE = 1e-6
"""Of the largest step. Some methods compute in float32 by themselves."""

Differences = list[dict[str, float | str]]


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> Differences:
    """What each rank found, by method."""
    folder = tmp_path_factory.mktemp("methods")
    finished = launch([WORKER, folder], 2)
    assert all(process.returncode == 0 for process in finished), finished[0].stderr[-2000:]
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    if notes := os.environ.get(FOLDER):
        (Path(notes) / "methods").mkdir(parents=True, exist_ok=True)
        (Path(notes) / "methods" / "ddp.json").write_text(json.dumps(found[0], indent=1) + "\n", encoding="utf-8")
    return found


@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if is_available(entry)])
def test_method_trains_alike_under_ddp(name: str, differences: Differences) -> None:
    for found in differences:
        difference = found[name]
        assert isinstance(difference, float), difference
        assert difference <= TOLERANCE
