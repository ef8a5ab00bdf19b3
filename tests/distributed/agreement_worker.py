"""One process of a launch whose ranks differ in something, or use an engine that is refused: `… CASE`."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import backends
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from ist import SparseTuner
from ist.method.registry import RandomSelector
from tests.helpers.tiny import tiny_batches, tiny_lora


class Stubborn(RandomSelector):
    """Chooses layers of its own on each rank."""

    def choose(self, step: int) -> tuple[int, ...]:
        return (dist.get_rank(),)


def tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    return parallelize_module(model, mesh, {"base_model.model.lm_head": ColwiseParallel()})


def run(case: str, rank: int) -> None:
    if case == "seeds":
        SparseTuner(tiny_lora(), seed=rank)
    elif case == "options":
        SparseTuner(tiny_lora(), beta=0.25 + rank / 2)
    elif case == "selectors":
        SparseTuner(tiny_lora(), selector=("ist", "random")[rank])
    elif case == "layers":
        SparseTuner(tiny_lora(layers_to_transform=[0, 1 + rank]), num_active_layers=1)
    elif case == "steps":
        tuner = SparseTuner(tiny_lora(), probe_batches=tiny_batches(2))
        for _ in range(1 + rank):
            tuner.num_steps += rank
            tuner.begin_step()
    elif case == "choices":
        SparseTuner(tiny_lora(), selector=Stubborn).begin_step()
    elif case == "tensor parallel":
        SparseTuner(tensor_parallel(tiny_lora()))
    elif case == "FSDP1, flat":
        model = tiny_lora()
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        SparseTuner(FullyShardedDataParallel(model, device_id=torch.device("cpu")))
    elif case == "FSDP1, one process":
        SparseTuner(backends.fsdp1()(tiny_lora()))


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    try:
        run(sys.argv[1], int(os.environ["RANK"]))
    except ValueError as error:
        print(error)
    dist.barrier()
    dist.destroy_process_group()
