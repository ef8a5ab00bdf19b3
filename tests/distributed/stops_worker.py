"""One process of a launch whose trainings are to stop with an error on every rank; prints the errors as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from backends import ENGINES
from device import DEVICE, join, moved
from torch import distributed as dist

from ist import SparseTuner
from tests.helpers.tiny import tiny_batches, tiny_lora, trainable

CASES = {
    "weights": ["ddp", "fsdp2"],
    "gradient": ["ddp", "ddp-unused", "fsdp2", "fsdp1"],
}
"""What goes wrong, and the engines with which it does."""


def run(case: str, engine: str) -> str:
    """The error of a training: rank 1's weights are NaN after step 2, or no gradient comes to layer 0."""
    model = tiny_lora().to(DEVICE)
    if case == "gradient":
        block = model.base_model.model.model.layers[1]
        block.register_forward_pre_hook(lambda block, args: (args[0].detach(), *args[1:]))
    model = ENGINES[engine][1](model)
    try:
        with SparseTuner(model, selector="all") as tuner:
            train(model, tuner, poison=case == "weights" and dist.get_rank() == 1)
    except ValueError as error:
        return str(error)
    return "no error"


def train(model: Any, tuner: SparseTuner, poison: bool) -> None:
    """Three steps; the weights are looked at after the second."""
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    for batch in moved(tiny_batches(3)):
        with tuner.step(optimizer):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if tuner.num_steps == 2:
            if poison:
                fill(trainable(model), float("nan"))
            tuner.check_weights()


@torch.no_grad()
def fill(parameters: list[torch.nn.Parameter], value: float) -> None:
    """Have this rank's part of the parameters hold one value."""
    for parameter in parameters:
        local: Any = parameter
        (local.to_local() if hasattr(local, "to_local") else local).fill_(value)


if __name__ == "__main__":
    join(limit=60)
    print(json.dumps({f"{case}:{engine}": run(case, engine) for case, engines in CASES.items() for engine in engines}))
    dist.barrier()
    dist.destroy_process_group()
