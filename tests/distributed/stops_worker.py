"""One process of a launch whose trainings are to stop with an error on every rank; prints the errors as JSON."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from backends import ENGINES, synchronise
from device import DEVICE, join, moved
from torch import distributed as dist

from ist import SparseTuner
from ist.step.skipped import MOST_SKIPPED, SkippedError
from tests.helpers.tiny import tiny_batches, tiny_lora, trainable

CASES = {
    "weights": ["ddp", "fsdp2"],
    "gradient": ["ddp", "ddp-unused", "fsdp2", "fsdp1"],
    "skipped": ["ddp", "fsdp2"],
    "accumulated": ["ddp", "fsdp2"],
}
"""What goes wrong, and the engines with which it does."""
MANY = MOST_SKIPPED + 5
"""Micro-batches of a step."""


def run(case: str, engine: str) -> str:
    """The error of a training: rank 1's weights are NaN after step 2, no gradient comes to layer 0, a GradScaler skips
    every step; or none, of many micro-batches that are not synchronised.
    """
    if case in ("skipped", "accumulated"):
        return skip(engine) if case == "skipped" else accumulate(engine)
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


def narrow(engine: str) -> tuple[Any, torch.optim.Optimizer, Any]:
    """A model with LoRA of rank 1, whose A lies on one process alone where it is sharded, and a batch."""
    model = ENGINES[engine][1](tiny_lora(2, r=1).to(DEVICE))
    return model, torch.optim.SGD(trainable(model), lr=1e-3), moved(tiny_batches(1))[0]


def skip(engine: str) -> str:
    """The error of a training whose steps are all skipped, after the number of steps."""
    model, optimizer, batch = narrow(engine)
    scaler: Any = torch.amp.GradScaler(DEVICE.type, 3e38, backoff_factor=0.9999)  # pyright: ignore
    num = 0
    try:
        with SparseTuner(model, selector="random", num_active_layers=1) as tuner:
            while num < 2 * MOST_SKIPPED:
                with tuner.step(optimizer):
                    optimizer.zero_grad()
                    scaler.scale(model(**batch).loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
                num += 1
    except SkippedError as error:
        return f"{num} steps: {error}"
    return "no error"


def accumulate(engine: str) -> str:
    """How many warnings a training gives that synchronises its gradients only in the last of many micro-batches."""
    model, optimizer, batch = narrow(engine)
    with (
        warnings.catch_warnings(record=True) as said,
        SparseTuner(model, selector="random", num_active_layers=1) as tuner,
    ):
        for number in range(2 * MANY):
            last = (number + 1) % MANY == 0
            synchronise(model, last)
            with tuner.step(optimizer):
                model(**batch).loss.backward()
                if last:
                    optimizer.step()
                    optimizer.zero_grad()
        found = sum("ended without an update" in str(one.message) for one in said)
        return f"{tuner.num_steps} steps, {found} warnings"


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
