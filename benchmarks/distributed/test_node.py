"""Cells in real processes: what is on paper is what a training keeps and sends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

PATH = [*sys.path]
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import bytes_on_paper  # noqa: E402
import measuring  # noqa: E402
import model  # noqa: E402
from grid import Cell  # noqa: E402
from scaling import Row  # noqa: E402

sys.path[:] = PATH  # as other tests expect it

pytestmark = pytest.mark.distributed

SCHEDULE = {"interval": 2, "rounds": 1}


def measured(processes: int, engine: str, method: str, late: float = 0.0) -> Row:
    cell = Cell(size="tiny", processes=processes, engine=engine, method=method, rows=1, tokens=8, late=late)
    line = measuring.measure(cell, SCHEDULE, limit=300)
    assert "error" not in line, line["error"]
    assert len(line["step_seconds"]) == len(line["warm_up_seconds"]) == len(line["device_allocations"]) == 2
    assert len(line["step_collectives"]) == (2 if method == "sampled" else 1)
    assert len(line["peak_bytes"]) == processes
    fields: dict[str, Any] = {"cell": vars(cell), "schedule": SCHEDULE, **line}
    return Row(fields)


@pytest.mark.parametrize(("processes", "engine", "method"), [(4, "fsdp2", "focused"), (2, "ddp", "lora")])
def test_a_rank_keeps_and_sends_what_is_on_paper(processes: int, engine: str, method: str) -> None:
    row = measured(processes, engine, method)
    assert row.line["state_bytes"] == bytes_on_paper.state_bytes("tiny", method, engine, processes)
    assert row.counted == model.traffic("tiny", method, engine, processes)


def test_sampled_training_reduces_a_quarter_and_all_ranks_agree() -> None:
    row = measured(2, "fsdp2", "sampled", late=1.0)
    for kept, paper in zip(
        row.line["state_bytes"], bytes_on_paper.state_bytes("tiny", "sampled", "fsdp2", 2), strict=True
    ):
        # Layers get optimizer state when they are active for the first time.
        assert 0 < kept["optimizer"] <= paper["optimizer"]
        assert {**kept, "optimizer": 0} == {**paper, "optimizer": 0}
    assert row.counted.reduced == model.traffic("tiny", "sampled", "fsdp2", 2).reduced
    assert row.agreed
    assert row.line["digests"][0]
    assert row.probe is not None
    assert row.probe > 1.0  # The others waited for the late rank.
    *units, root = bytes_on_paper.gathered_bytes("tiny", "sampled", 2)
    # A forward of each of three candidate sets; the root stays gathered between them.
    assert row.line["probe_collectives"]["gathered"] == 3 * sum(units) + root


def test_an_error_of_a_worker_is_the_rows() -> None:
    cell = Cell(size="tiny", processes=1, engine="none", method="sampled", rows=1, tokens=8)
    line = measuring.measure(cell, {"interval": 0, "rounds": 1}, limit=300)
    assert line["error"].startswith("rank ")
    assert "update_interval=0" in line["error"]
