"""LISA, LIFT and full fine-tuning in two processes under DistributedDataParallel, in each of its modes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launch import launch

pytestmark = pytest.mark.distributed


def test_two_processes_train_whole_layers_as_one_does(tmp_path: Path) -> None:
    finished = launch([Path(__file__).with_name("whole_layers_worker.py"), tmp_path], 2)
    assert [process.returncode for process in finished] == [0, 0], finished[0].stderr + finished[1].stderr
    for rank in range(2):
        results = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(results) == 3 * 2 * 3
        for result in results:
            assert result["agree"], result
            assert result["same sets"], result
            assert result["right"], result
            assert result["apart"] < 1e-5, result
            sent, all_layers = result["bytes"]
            assert sent == all_layers if result["case"].startswith("full") else sent < 0.6 * all_layers, result
