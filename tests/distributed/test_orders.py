"""Evaluations before, between and after trainings: the ranks hold one adapter, whatever the order."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launch import found_by_both
from matrix import note

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "orders_worker.py"


def found(folder: Path, engine: str) -> dict[str, str]:
    """The hash of the adapter after each order, the same on both ranks."""
    return found_by_both(WORKER, folder, engine)


def test_ranks_hold_one_adapter_in_every_order(tmp_path: Path) -> None:
    orders = found(tmp_path, "DDP")
    assert len(orders) == 4
    assert orders["evaluate train"] == orders["predict train"], "and what was evaluated before changes no bit"
    note("Trainer, DDP", "evaluate, predict and train in any order", 2, "right", "test_ranks_hold_one_adapter")


def test_ranks_hold_one_adapter_in_every_order_that_fsdp2_takes(tmp_path: Path) -> None:
    """Accelerate itself refuses an evaluation before the first training: sharding wants the optimizer too."""
    orders = found(tmp_path, "FSDP2")
    assert "passed together to `Accelerator.prepare()`" in orders.pop("evaluate train")
    assert orders["train"] == orders["train evaluate predict"], "an evaluation changes no bit"
    assert orders["train train"] == orders["train evaluate train"] != orders["train"]
    note("Trainer, FSDP2", "evaluate, predict and train in any order", 2, "right", "test_ranks_hold_one_adapter")
