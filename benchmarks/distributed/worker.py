"""One process of a cell: train for some rounds and write what a step cost. Started by run.py."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from build import local, make_sharded, weightless  # noqa: E402
from collectives import CollectiveBytes  # noqa: E402
from grid import Cell  # noqa: E402
from workers import wait_for_go  # noqa: E402

from harness import model_config, now, peak, reset_peak, shorten  # noqa: E402
from ist import SparseTuner  # noqa: E402

OPTIONS: dict[str, dict[str, Any] | None] = {"lora": None, "sampled": {"mu": 100.0}, "focused": {"selector": "all"}}
"""What the tuner is told; None is PEFT alone."""


@dataclass(frozen=True)
class Schedule:
    """How long a cell trains: rounds to warm up, those that are timed, and then steps whose collectives are counted."""

    interval: int
    """Steps of a round; at the end of each sampled training measures importance."""
    rounds: int
    """Those that are timed."""
    warm_up: int = 1
    """Rounds before those that are timed."""


class LateBatches:
    """The same batch again and again, each after some seconds."""

    def __init__(self, batch: dict[str, Tensor], seconds: float) -> None:
        self._batch, self._seconds = batch, seconds

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            time.sleep(self._seconds)
            yield self._batch


class Training:
    """A model in training in one process."""

    def __init__(self, cell: Cell, interval: int, device: torch.device, model: Any = None) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        self.cell, self.kind = cell, device.type
        self.model = make_sharded(cell.size, cell.method, cell.engine, device, model)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True if self.kind == "cuda" else None)
        self._generator = torch.Generator().manual_seed(rank)
        self._vocabulary: int = model_config(cell.size).vocab_size  # type: ignore[attr-defined]
        self.device = device
        options = OPTIONS[cell.method]
        self.tuner = None
        if options is not None:
            # Of an iterable each rank reads past the batches of the others.
            probes = LateBatches(self.batch(rows=1), cell.late / size if rank == size - 1 else 0.0)
            self.tuner = SparseTuner(self.model, probe_batches=probes, update_interval=interval, **options)  # type: ignore[arg-type]
        self.gradient_bytes = 0
        """Of this rank's gradients, the most of the steps that were looked at."""

    def batch(self, rows: int) -> dict[str, Tensor]:
        """Random tokens of this rank, which are their own labels."""
        ids = torch.randint(self._vocabulary, (rows, self.cell.tokens), generator=self._generator).to(self.device)
        return {"input_ids": ids, "labels": ids}

    def train(self, look: bool = False) -> None:
        """Forward, backward and optimizer on the next batch; `look` notes how large the gradients are."""
        if self.tuner:
            self.tuner.begin_step()
        self.model(**self.batch(self.cell.rows), use_cache=False).loss.backward()
        if look:
            held = sum(local(p.grad).nbytes for p in self.model.parameters() if p.grad is not None)
            self.gradient_bytes = max(self.gradient_bytes, held)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def finish(self) -> None:
        """What follows a step: the measurement of importance, where one is due."""
        if self.tuner:
            self.tuner.end_step(self.optimizer)

    def time(self) -> tuple[float, float]:
        """Seconds of the next step, and of what follows it."""
        start = now(self.kind)
        self.train()
        middle = now(self.kind)
        self.finish()
        return middle - start, now(self.kind) - middle

    def digest(self) -> str:
        """Of what every rank has to have in common: layers, losses and rewards of the last measurement, importance."""
        if self.tuner is None:
            return ""
        state = {name: self.tuner.state_dict()[name] for name in ("num_steps", "last_update", "selector")}
        return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()

    def state_bytes(self) -> dict[str, int]:
        """What this rank keeps between steps, and the most that its gradients took."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()  # A measurement leaves the root's weights gathered until the next backward.
        parameters = [(p.requires_grad, local(p).nbytes) for p in self.model.parameters()]
        moments = [value for state in self.optimizer.state.values() for value in state.values()]
        return {
            "base": sum(count for trains, count in parameters if not trains),
            "adapters": sum(count for trains, count in parameters if trains),
            "gradients": self.gradient_bytes,
            "optimizer": sum(local(value).nbytes for value in moments if isinstance(value, Tensor)),
        }


def measure(training: Training, schedule: Schedule) -> dict[str, Any]:
    """The figures of this rank."""
    interval = schedule.interval
    warm_up = [training.time() for _ in range(schedule.warm_up * interval)]
    reset_peak(training.kind)
    times, allocations = [], [device_allocations(training.kind)]
    for _ in range(schedule.rounds * interval):
        times.append(training.time())
        allocations.append(device_allocations(training.kind))
    cuda = training.kind == "cuda"
    top = peak("cuda") if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    sampled = training.cell.method == "sampled"
    counted = count(training, interval if sampled else 1)  # The steps of the others are all alike.
    return {
        "step_seconds": [step for step, _ in times],
        "warm_up_seconds": [step for step, _ in warm_up],
        "device_allocations": [after - before for before, after in pairwise(allocations)],
        "probe_seconds": [after for number, (_, after) in enumerate(times, 1) if number % interval == 0]
        if sampled
        else [],
        **counted,
        "state_bytes": training.state_bytes(),
        "peak_bytes": top,
        "digest": training.digest(),
    }


def device_allocations(kind: str) -> int:
    """How often PyTorch has asked the GPU's driver for memory, which makes a step slow; 0 on a CPU."""
    return torch.cuda.memory_stats().get("num_device_alloc", 0) if kind == "cuda" else 0


def count(training: Training, steps: int) -> dict[str, Any]:
    """The collectives of some steps, and of the measurement at their end."""
    counted: list[dict[str, int]] = []
    probe = {"gathered": 0, "reduced": 0, "calls": 0}
    with CollectiveBytes() as counter:
        for _ in range(steps):
            training.train(look=True)
            counted.append(counter.take())
            training.finish()
            taken = counter.take()
            probe = {name: probe[name] + taken[name] for name in probe}
    return {"step_collectives": counted, "probe_collectives": probe}


def merge(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """One row of the figures of all ranks: a step ends with the slowest of them; collectives are the same on each."""
    first = ranks[0]
    most = ("step_seconds", "warm_up_seconds", "device_allocations", "probe_seconds")
    return {
        **{name: [max(own) for own in zip(*(rank[name] for rank in ranks), strict=True)] for name in most},
        "step_collectives": first["step_collectives"],
        "probe_collectives": first["probe_collectives"],
        "state_bytes": [rank["state_bytes"] for rank in ranks],
        "peak_bytes": [rank["peak_bytes"] for rank in ranks],
        "digests": [rank["digest"] for rank in ranks],
        "device": first["device"],
    }


def main(cell: Cell, schedule: Schedule, file: Path, limit: float) -> None:
    """Measure the cell; rank 0 writes the row to `file`."""
    model = weightless(cell.size, cell.method)
    wait_for_go()
    local_rank = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=limit))
    figures = measure(Training(cell, schedule.interval, device, model), schedule)
    figures["device"] = torch.cuda.get_device_name() if cuda else "CPU"
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, figures)
    if dist.get_rank() == 0:
        file.write_text(json.dumps(merge(everyone)), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    try:
        main(Cell(**given["cell"]), Schedule(**given["schedule"]), Path(sys.argv[2]), given["limit"])
    except Exception as error:
        # The last line of a process's errors becomes the cell's outcome.
        print(shorten(error), file=sys.stderr, flush=True)
        os._exit(1)  # Not at the mercy of collectives that other ranks never enter.
