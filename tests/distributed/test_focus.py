"""Two processes look at data of their own: one score, one set of layers, one adapter."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from focus_worker import NUM_BATCHES, lora
from launch import found_by_both

from ist import layer_scores
from tests.helpers.tiny import tiny_batches, tiny_llama

pytestmark = pytest.mark.distributed


def test_scores_are_means_over_ranks_and_the_adapter_is_one(tmp_path: Path) -> None:
    found = found_by_both(Path(__file__).parent / "focus_worker.py", tmp_path)
    assert found["num_set"] == 6
    batches = tiny_batches(2 * NUM_BATCHES)
    alone = [layer_scores(tiny_llama(6), lora(), batches[rank::2]) for rank in range(2)]
    assert alone[0] != alone[1]
    assert found["scores"] == pytest.approx([(a + b) / 2 for a, b in zip(*alone, strict=True)])
    norms = [layer_scores(tiny_llama(6), lora(), batches[rank::2], criterion="activation") for rank in range(2)]
    sizes = [(a + b) / 2 for a, b in zip(*norms, strict=True)]
    expected = [score / size**2 for score, size in zip(found["scores"], sizes, strict=True)]
    assert found["relative"] == pytest.approx(expected)
