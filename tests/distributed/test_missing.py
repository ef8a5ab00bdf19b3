"""A rank that does not come to a collective of the library: the others end in time, with a line that names it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launch import launch
from matrix import note

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "missing_worker.py"
HELP = "Let every process begin and end the same steps"


def lines(case: str, num_processes: int = 2) -> list[list[str]]:
    finished = launch([WORKER, case], num_processes, timeout=90)
    return [process.stdout.strip().splitlines() for process in finished]


@pytest.mark.parametrize(
    ("case", "rank", "said"),
    [
        ("skips begin_step", 0, "Rank 1 did not come within 8 s"),
        ("lives on", 1, "Rank 0 did not come within 8 s"),
        ("ends early", 0, "Rank 1 ended"),
    ],
)
def test_the_rank_that_waits_names_the_one_that_does_not_come(case: str, rank: int, said: str) -> None:
    (line,) = lines(case)[rank]
    assert line.startswith(f"{said}, while rank {rank} waits at 'the layers of the next step'. {HELP}")
    note("DDP", f"one rank {case}", 2, "an error in time", "test_missing")


def test_join_is_refused_on_every_rank() -> None:
    seen = lines("join")
    assert seen[0] == seen[1]
    assert "leave join() off" in seen[0][0]


def test_ranks_at_different_collectives_are_told_on_each() -> None:
    seen = lines("measurement")
    assert seen[0] == seen[1]
    assert seen[0][0].startswith(
        "The processes disagree on what to do next (rank 0: whether all can continue; rank 1: the layers of the next "
        "step)"
    )


@pytest.mark.parametrize("num_processes", [2, 3])
def test_the_time_limit_of_the_group_ends_every_rank_and_every_later_round(num_processes: int) -> None:
    seen = lines("comes late", num_processes)
    here = {2: "rank 0 waits", 3: "ranks 0, 2 wait"}[num_processes]
    said = f"Rank 1 did not come within 3 s, while {here} at 'the weather'. {HELP}"
    for own in seen:
        assert len(own) == 4, own
        assert all(line.startswith(said) for line in own), own


def test_the_last_round_is_read_though_rank_0_has_ended() -> None:
    seen = lines("reads late", 3)
    assert seen == [["[1.0, 2.0, inf] True False"]] * 3
