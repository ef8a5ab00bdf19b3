"""One process of sampled training under FSDP2, whose last rank is on time, late, or does not come: `… FOLDER`."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from backends import fsdp2
from device import DEVICE, join, moved
from peft import LoraConfig
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ist import SparseTuner
from ist.focusing import find_focus
from ist.runtime import exchange
from ist.runtime.distributed import current_ranks
from tests.helpers.tiny import tiny_batches, tiny_llama, tiny_lora, trainable

DELAY = 1.0
"""Seconds by which the last rank comes late to each measurement."""
LIMIT = 3
"""Seconds that the others wait for one that does not come."""


def lora() -> LoraConfig:
    """What all layers would train with."""
    return LoraConfig(r=4, target_modules=["q_proj", "up_proj"])


def train(delay: float = 0.0, **options: Any) -> dict[str, Any]:
    """Four steps with two measurements, to which the last rank comes `delay` seconds late.

    Args:
        delay: in seconds.
        options: of `fully_shard`.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    model: Any = fsdp2(**options)(tiny_lora(4).to(DEVICE))
    tuner = SparseTuner(
        model, num_active_layers=2, probe_batches=tiny_batches(size * 2), update_interval=2, mu=50.0, seed=5
    )
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    waited, seen = [], []
    for number, batch in enumerate(moved(tiny_batches(4)), 1):
        active = tuner.begin_step()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == size - 1 and number % 2 == 0:
            time.sleep(delay)
        start = time.monotonic()
        update = tuner.end_step(optimizer)
        if update:
            waited.append(time.monotonic() - start)
            seen.append([list(active), list(update.losses), list(update.rewards)])
    losses = [loss for _, measured, _ in seen for loss in measured]
    seen.append(tuner.state_dict()["selector"])
    tuner.close()
    return {"waited": waited, "losses": losses, "digest": hashlib.sha256(json.dumps(seen).encode()).hexdigest()}


def miss() -> str:
    """What a rank is told at a measurement to which the last one does not come."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model: Any = fsdp2()(tiny_lora(4).to(DEVICE))
    tuner = SparseTuner(model, num_active_layers=2, probe_batches=tiny_batches(size * 2), update_interval=1)
    tuner.begin_step()
    model(**moved(tiny_batches(1))[0]).loss.backward()
    messages: Any = current_ranks()._exchange
    messages._limit = LIMIT
    if rank == size - 1:
        time.sleep(LIMIT + 1)
    try:
        tuner.end_step()
    except ValueError as error:
        return str(error)
    return "nothing"


def look() -> dict[str, Any]:
    """What `find_focus` finds in a sharded model of which each rank has a batch of its own, and what it leaves."""
    rank = dist.get_rank()
    whole: Any = tiny_llama(4)
    model = fsdp2()(whole.to(DEVICE))
    found = find_focus(model, lora(), [moved(tiny_batches(dist.get_world_size()))[rank]], num_layers=2)
    touched = [name for name, p in model.named_parameters() if p.grad is not None or not p.requires_grad]
    return {"scores": found.scores, "layers": found.layers, "touched": touched}


if __name__ == "__main__":
    exchange.PATIENCE = 0.5
    join()
    replicas = init_device_mesh(DEVICE.type, (dist.get_world_size() // 2, 2), mesh_dim_names=("replicate", "shard"))
    found = {
        "on time": train(),
        "late": train(DELAY),
        "hybrid": train(mesh=replicas),
        "focus": look(),
        "missing": miss(),
    }
    (Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()  # Rank 0 keeps the store, which the late rank still asks.
    dist.destroy_process_group()
