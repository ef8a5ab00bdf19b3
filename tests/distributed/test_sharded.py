"""Measurements on a sharded model: the ranks agree, wait for a late one, and name one that does not come."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from device import ON_CPUS
from launch import launch
from sharded_worker import DELAY, LIMIT, lora

from ist import layer_scores
from tests.helpers.tiny import tiny_batches, tiny_llama

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "sharded_worker.py"


@pytest.fixture(scope="module", params=[2, 4])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of 2 and 4 ranks saw."""
    if not ON_CPUS and torch.cuda.device_count() < request.param:
        pytest.skip(f"needs {request.param} GPUs")
    folder = tmp_path_factory.mktemp("sharded")
    finished = launch([WORKER, folder], request.param, timeout=90)
    assert all(process.returncode == 0 for process in finished), finished[0].stderr[-2000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)]


def test_every_rank_chooses_measures_and_learns_the_same(found: list[dict[str, Any]]) -> None:
    assert len({rank["on time"]["digest"] for rank in found}) == 1


def test_a_late_rank_is_waited_for_and_changes_nothing(found: list[dict[str, Any]]) -> None:
    assert {rank["late"]["digest"] for rank in found} == {rank["on time"]["digest"] for rank in found}
    for rank in found[:-1]:
        assert len(rank["late"]["waited"]) == 2
        assert min(rank["late"]["waited"]) > DELAY / 2


def test_shards_within_groups_of_replicas_learn_what_shards_of_all_ranks_learn(found: list[dict[str, Any]]) -> None:
    assert len({rank["hybrid"]["digest"] for rank in found}) == 1
    assert found[0]["hybrid"]["losses"] == pytest.approx(found[0]["on time"]["losses"], rel=1e-5)
    assert len(found[0]["hybrid"]["losses"]) == 6


def test_a_rank_that_does_not_come_is_named_on_every_rank(found: list[dict[str, Any]]) -> None:
    last = len(found) - 1
    for rank in found:
        assert rank["missing"].startswith(f"Rank {last} did not come within {LIMIT} s, while rank"), rank["missing"]
        assert "at 'whether all can continue'" in rank["missing"], "the weights are checked before a measurement"


def test_importance_before_training_is_measured_on_a_sharded_model_as_on_a_whole_one(
    found: list[dict[str, Any]],
) -> None:
    alone = [layer_scores(tiny_llama(4), lora(), [batch]) for batch in tiny_batches(len(found))]
    expected = [sum(own) / len(found) for own in zip(*alone, strict=True)]
    for rank in found:
        assert rank["focus"]["scores"] == pytest.approx(expected, rel=1e-5 if ON_CPUS else 1e-4)  # which are of the CPU
        assert rank["focus"]["layers"] == found[0]["focus"]["layers"]
        assert rank["focus"]["touched"] == []
