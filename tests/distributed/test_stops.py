"""What ends a training ends it on every rank, with one line on each and no hang."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launch import launch

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "stops_worker.py"


@pytest.fixture(scope="module")
def said() -> list[dict[str, str]]:
    """The errors of each rank by case and engine."""
    finished = launch([WORKER], 2, timeout=120)
    assert all(process.returncode == 0 for process in finished), finished[0].stderr[-2000:]
    return [json.loads(process.stdout) for process in finished]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_weights_that_are_not_finite_on_one_rank(engine: str, said: list[dict[str, str]]) -> None:
    first, second = (errors[f"weights:{engine}"] for errors in said)
    start = "The trained weights are NaN or infinite after step 2 ("
    assert first.startswith(f"{start}on another process; they were finite at the start). Give a lower learning rate")
    assert second.startswith(f"{start}32 of 32 tensors, base_model")
    assert "\n" not in first + second


@pytest.mark.parametrize("engine", ["ddp", "ddp-unused", "fsdp2", "fsdp1"])
def test_a_gradient_that_ends_between_two_layers(engine: str, said: list[dict[str, str]]) -> None:
    seen = [errors[f"gradient:{engine}"] for errors in said]
    assert all(line.startswith("The gradient ends ") and "\n" not in line for line in seen), seen
    assert any("layers.1" in line and "layers.0" in line for line in seen)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_grad_scaler_that_skips_every_step_stops_all_ranks_at_one_step(
    engine: str, said: list[dict[str, str]]
) -> None:
    """Also one that holds nothing of a tensor."""
    first, second = (errors[f"skipped:{engine}"] for errors in said)
    assert first == second
    assert first.startswith(
        "50 steps: The gradients were NaN or infinite in the last 50 steps, which the GradScaler has"
    )


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_micro_batches_that_are_not_synchronised_are_no_skipped_steps(engine: str, said: list[dict[str, str]]) -> None:
    assert [errors[f"accumulated:{engine}"] for errors in said] == ["2 steps, 0 warnings"] * 2
