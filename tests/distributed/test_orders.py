"""Evaluations before, between and after trainings: the ranks hold one adapter, whatever the order."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launch import launch
from matrix import note

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "orders_worker.py"


@pytest.mark.parametrize("backend", ["DDP", "FSDP2"])
def test_ranks_hold_one_adapter_in_every_order(backend: str, tmp_path: Path) -> None:
    finished = launch([WORKER, tmp_path, backend], 2)
    assert all(process.returncode == 0 for process in finished), finished[0].stderr[-3000:]
    first, second = (json.loads((tmp_path / f"found.{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert len(first) == 4
    assert first["evaluate train"] == first["predict train"], "and what was evaluated before changes no bit"
    note(f"Trainer, {backend}", "evaluate, predict and train in any order", 2, "right", "test_ranks_hold_one_adapter")
