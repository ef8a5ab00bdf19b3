"""Evaluations before, between and after trainings: the ranks hold one adapter, whatever the order."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launch import found_by_both
from matrix import note

pytestmark = pytest.mark.distributed


def test_ranks_hold_one_adapter_in_every_order(tmp_path: Path) -> None:
    """On DDP; Accelerate itself refuses an evaluation before the first training on FSDP2."""
    found = found_by_both(Path(__file__).parent / "orders_worker.py", tmp_path)
    assert len(found) == 4
    assert found["evaluate train"] == found["predict train"], "and what was evaluated before changes no bit"
    note("Trainer, DDP", "evaluate, predict and train in any order", 2, "right", "test_ranks_hold_one_adapter")
