"""Ranks that disagree end with one clear line on each of them, never a hang; so do engines that cannot be right."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launch import launch
from matrix import note

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "agreement_worker.py"


def lines(case: str, num_processes: int = 2) -> list[str]:
    finished = launch([WORKER, case], num_processes, timeout=90)
    assert all(process.returncode == 0 for process in finished), finished[0].stderr[-2000:]
    return [process.stdout.strip() for process in finished]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("seeds", "The processes disagree on what is trained (rank 0: seed=0; rank 1: seed=1)."),
        ("options", "rank 0: beta=0.25; rank 1: beta=0.75"),
        ("selectors", "rank 0: selector_type='LearnedSelector'; rank 1: selector_type='RandomSelector'"),
        ("layers", "model.layers.2"),
        ("steps", "The processes disagree on the layers of the next step (rank 0: step=1, active="),
        ("choices", "rank 0: active=[0]; rank 1: active=[1]"),
    ],
)
def test_disagreement_is_an_error_on_every_rank(case: str, said: str) -> None:
    seen = lines(case)
    assert all(said in line and "\n" not in line for line in seen), seen
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("case", "num_processes", "said"),
    [
        ("tensor parallel", 2, "split over 2 ranks by tensor parallelism"),
        ("FSDP1, flat", 2, "set use_orig_params=True"),
        ("FSDP1, one process", 1, "NO_SHARD"),
    ],
)
def test_engine_is_refused(case: str, num_processes: int, said: str) -> None:
    assert all(said in line and "\n" not in line for line in lines(case, num_processes))
    engine, _, option = case.partition(", ")
    note(engine[0].upper() + engine[1:], option or "any", num_processes, "refused", "test_engine_is_refused")
