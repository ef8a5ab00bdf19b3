"""Two processes with batches of 4 do what one does with batches of 8: the same layers, the same adapter."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from launch import launch
from matrix import note
from trainer_cases import ENGINES, make_trainer

from ist import read_history

pytestmark = pytest.mark.distributed

WORKER = Path(__file__).parent / "trainer_worker.py"
NUM_STEPS = 50


@cache
def alone() -> tuple[list[list[int]], list[float], dict[str, Tensor], list[dict[str, Any]]]:
    """One process with batches of 8."""
    with TemporaryDirectory() as folder:
        trainer, ist, actives = make_trainer(Path(folder), 1, steps=NUM_STEPS)
        trainer.train()
        trainer.save_model(folder + "/adapter")
        weights = load_file(folder + "/adapter/adapter_model.safetensors")
        history = read_history(folder)
    return actives.sets, ist.tuner.selector.state_dict()["importance"], weights, history


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_are_one(engine: str, tmp_path: Path) -> None:
    finished = launch([WORKER, tmp_path, engine, str(NUM_STEPS)], 2)
    assert all(process.returncode == 0 for process in finished), finished[0].stderr[-3000:]
    ranks = [json.loads((tmp_path / f"seen.{rank}.json").read_text()) for rank in range(2)]
    sets, importance, weights, history = alone()
    assert ranks[0] == ranks[1]
    assert ranks[0]["actives"] == sets
    assert len(sets) == NUM_STEPS
    torch.testing.assert_close(torch.tensor(ranks[0]["importance"]), torch.tensor(importance), rtol=1e-3, atol=1e-4)
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert saved.keys() == weights.keys()
    for name in weights:
        torch.testing.assert_close(saved[name], weights[name], rtol=1e-3, atol=1e-4, msg=name)
    written = read_history(tmp_path / "run")
    assert [event["event"] for event in written] == [event["event"] for event in history]
    assert [event.get("active") for event in written] == [event.get("active") for event in history]
    note(
        f"Trainer, {engine}", f"{NUM_STEPS} steps, 2 × batch 4 = 1 × batch 8", 2, "right", "test_two_processes_are_one"
    )
