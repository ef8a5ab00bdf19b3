"""DeepSpeed is refused wherever it shows: the engine, its optimizer, parameters that ZeRO-3 took apart."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ist import SparseTuner
from tests.helpers.tiny import tiny_batches, tiny_lora

REFUSED = r"DeepSpeed is on, .*: train with DDP or FSDP2\.$"

REAL = """
import sys
import deepspeed, torch
from ist import SparseTuner
from tests.helpers.tiny import tiny_batches, tiny_lora

deepspeed.init_distributed("gloo")
for stage in (1, 2, 3):
    model = tiny_lora()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    config = {"train_batch_size": 1, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    engine, wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for what in (engine, model):
        try:
            tuner = SparseTuner(what, num_active_layers=1, probe_batches=tiny_batches(1))
            tuner.attach_optimizer(wrapped)
        except ValueError as error:
            print(stage, type(what).__name__, error)
"""


def made_by_deepspeed(kind: type) -> type:
    """A class that says it is DeepSpeed's."""
    return type("Engine", (kind,), {"__module__": "deepspeed.runtime.engine"})


def test_engine_is_refused() -> None:
    with pytest.raises(ValueError, match=REFUSED):
        SparseTuner(made_by_deepspeed(nn.Sequential)(tiny_lora()))


def test_parameters_of_zero_3_are_refused() -> None:
    model = tiny_lora()
    next(model.parameters()).ds_id = 0  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=REFUSED):
        SparseTuner(model)


def test_optimizer_is_refused_also_inside_a_wrapper() -> None:
    model = tiny_lora()
    optimizer = made_by_deepspeed(torch.optim.SGD)(model.parameters(), lr=1.0)
    wrapper = type("Wrapper", (), {"optimizer": optimizer})()
    with SparseTuner(model, probe_batches=tiny_batches(1)) as tuner:
        for given in (optimizer, wrapper):
            with pytest.raises(ValueError, match=REFUSED):
                tuner.attach_optimizer(given)
        tuner.attach_optimizer(torch.optim.SGD(model.parameters(), lr=1.0))


@pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="deepspeed is not installed")
def test_every_stage_of_the_real_one_is_refused() -> None:
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29551"}
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    finished = subprocess.run(
        [sys.executable, "-c", REAL],
        env={**os.environ, **env, "DS_ACCELERATOR": "cpu", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    said = [line for line in finished.stdout.splitlines() if "DeepSpeed is on" in line]
    assert [line.split()[:2] for line in said] == [
        [str(stage), kind] for stage in (1, 2, 3) for kind in ("DeepSpeedEngine", "PeftModel")
    ]
