"""What ends a training ends it on every rank, with one line on each and no hang."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launch import launch

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "stops_worker.py"


def lines(case: str, engine: str) -> list[str]:
    finished = launch([WORKER, case, engine], 2, timeout=90)
    assert all(process.returncode == 0 for process in finished), finished[0].stderr[-2000:]
    return [process.stdout.strip() for process in finished]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_weights_that_are_not_finite_on_one_rank(engine: str) -> None:
    seen = lines("weights", engine)
    start = "The trained weights are NaN or infinite after step 3 ("
    assert seen[0].startswith(f"{start}on another process). Give a lower learning rate"), seen
    assert seen[1].startswith(f"{start}32 of 32 tensors, base_model"), seen
    assert not any("\n" in line for line in seen)


@pytest.mark.parametrize("engine", ["ddp", "ddp-unused", "fsdp2", "fsdp1"])
def test_a_gradient_that_ends_between_two_layers(engine: str) -> None:
    seen = lines("gradient", engine)
    assert all(line.startswith("The gradient ends ") for line in seen), seen
    assert any("layers.1" in line and "layers.0" in line for line in seen)
    assert not any("\n" in line for line in seen)
