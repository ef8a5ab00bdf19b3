"""Two processes look at data of their own: one score, one set of layers, one adapter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from focus_worker import NUM_BATCHES, lora
from launch import launch

from ist import layer_scores
from tests.helpers.tiny import tiny_batches, tiny_llama

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "focus_worker.py"


def test_scores_are_means_over_ranks_and_the_adapter_is_one(tmp_path: Path) -> None:
    finished = launch([WORKER, tmp_path], 2)
    assert all(process.returncode == 0 for process in finished), finished[0].stderr[-3000:]
    first, second = (json.loads((tmp_path / f"found.{rank}.json").read_text()) for rank in range(2))
    assert first == second, "one start from the gradients of both ranks, before DDP sends rank 0's, and one end"
    assert first["num_set"] == 6
    batches = tiny_batches(2 * NUM_BATCHES)
    alone = [layer_scores(tiny_llama(6), lora(), batches[rank::2]) for rank in range(2)]
    assert alone[0] != alone[1]
    assert first["scores"] == pytest.approx([(a + b) / 2 for a, b in zip(*alone, strict=True)])
