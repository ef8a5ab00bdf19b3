"""One process of a launch in which a rank does not come to where the others wait for it: `… CASE`."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ist import SparseTuner
from ist.runtime import exchange
from ist.runtime.distributed import current_ranks
from tests.helpers.tiny import tiny_batches, tiny_lora, trainable

LATE = 1
"""The rank that does something else."""


def train(case: str, rank: int) -> None:
    """Six steps under DDP, of which `LATE` does not do all as the others do."""
    model: Any = DistributedDataParallel(tiny_lora())
    tuner = SparseTuner(model, num_active_layers=2, probe_batches=tiny_batches(2), update_interval=2)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for number, batch in enumerate(tiny_batches(6)):
        odd = rank == LATE and number == 3
        if case == "ends early" and odd:
            return
        if case == "skips begin_step" and odd:
            pass
        elif case == "join" and number == 0:
            with model.join():
                model(**batch)
        else:
            tuner.begin_step()
        try:
            if case == "lives on" and odd:
                raise RuntimeError("of one rank")
            model(**batch).loss.backward()
            optimizer.step()
        except RuntimeError as error:
            if str(error) != "of one rank":
                raise
            continue
        finally:
            optimizer.zero_grad()
        tuner.end_step(optimizer)


def measure(case: str, rank: int) -> None:
    """A rank whose measurement fails, and which goes on to the next step all the same."""

    def loss(model: Any, batch: Any) -> Any:
        if rank == LATE:
            raise KeyboardInterrupt
        return model(**batch).loss

    tuner = SparseTuner(tiny_lora(), probe_batches=tiny_batches(2), update_interval=1, loss_function=loss)
    tuner.begin_step()
    try:
        tuner.end_step()
    except KeyboardInterrupt:
        tuner.begin_step()


def come_late(case: str, rank: int) -> None:
    """Ranks of a group with a time limit, of which one takes longer."""
    ranks = current_ranks()
    ranks.wait()
    time.sleep(6 if rank == LATE else 0)
    try:
        ranks.check_same("the weather", "fine")
    finally:
        start = time.monotonic()
        for ask in (ranks.wait, lambda: ranks.all(True), lambda: ranks.mean([1.0])):
            try:
                ask()
            except ValueError as error:
                print(error, flush=True)
        assert time.monotonic() - start < 1, "a failed exchange waits again"
        time.sleep(0 if rank == LATE else 8)  # Rank 0 keeps the store.


def read_late(case: str, rank: int) -> None:
    """Rank 0 ends at once after the last round, which the others have not read yet."""
    ranks = current_ranks()
    if rank == LATE:
        exchange: Any = ranks._exchange
        exchange._store = Slow(exchange._store)
    print(ranks.mean([float(rank), 2.0, float("inf")]), ranks.all(rank < 9), ranks.any(rank == 7))


class Slow:
    """A store that is asked late."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def wait(self, *arguments: Any) -> None:
        time.sleep(1)
        self._store.wait(*arguments)


CASES = {"measurement": measure, "comes late": come_late, "reads late": read_late}

if __name__ == "__main__":
    case = sys.argv[1]
    exchange.PATIENCE = 1.0
    exchange.DEFAULT_LIMIT = timedelta(seconds=8)
    dist.init_process_group("gloo", timeout=timedelta(seconds=3) if case == "comes late" else None)
    try:
        CASES.get(case, train)(case, int(os.environ["RANK"]))
    except ValueError as error:
        print(error, flush=True)
