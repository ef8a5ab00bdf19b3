"""One process of a launch whose training is to stop with an error on every rank: `… CASE ENGINE`."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from backends import ENGINES
from torch import distributed as dist

from ist import SparseTuner
from tests.helpers.tiny import tiny_batches, tiny_lora, trainable


def train(model: Any, poison: bool) -> None:
    """Steps that train every layer; after the third one rank's weights are NaN, where they are to be, and looked at."""
    tuner = SparseTuner(model, selector="all")
    optimizer = torch.optim.SGD(trainable(model), lr=1e-2)
    for batch in tiny_batches(12):
        with tuner.step(optimizer):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if tuner.num_steps == 3:
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
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    case, engine = sys.argv[1:]
    try:
        base = tiny_lora()
        if case == "gradient":
            base.base_model.model.model.layers[1].register_forward_pre_hook(
                lambda block, args: (args[0].detach(), *args[1:])
            )
        train(ENGINES[engine][1](base), case == "weights" and dist.get_rank() == 1)
    except ValueError as error:
        print(error)
    dist.barrier()
    dist.destroy_process_group()
