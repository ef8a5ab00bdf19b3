"""One process of a launch that trains every kind of adapter under DDP, and without it on the whole batch: `… FOLDER`.

Both trainings take the same steps in float64. Rank 0 writes how far their adapters came apart, by method.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ist import SparseTuner
from tests.helpers.tuner_types import METHODS, Method, is_available, make_adapted, make_batch

NUM_STEPS = 5
WHOLE = ("LILY", "POLY", "PVERA")
"""Of these each rank trains on the whole batch: LILY routes by its mean, POLY and PVeRA draw at random in training."""


def plain(model: nn.Module) -> nn.Module:
    return model


def dropless(model: nn.Module) -> nn.Module:
    """Ranks draw their own dropout."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def trained(entry: Method, wrap: Any, share: slice) -> tuple[dict[str, Tensor], list[list[float]]]:
    """The trained weights, and the importance after each step, from rows `share` of each batch."""
    model = dropless(make_adapted(entry).train())
    if entry.optimizer:
        optimizer = entry.optimizer(model)  # type: ignore[arg-type]
    else:
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tasks = {"task_ids": entry.inputs["task_ids"]} if "task_ids" in entry.inputs else {}
    batches = [{**make_batch(seed), **tasks} for seed in range(NUM_STEPS)]
    wrapped = wrap(model)
    learned = []
    with SparseTuner(wrapped, probe_batches=batches, num_active_layers=1, update_interval=2, mu=100.0) as tuner:
        tuner.attach_optimizer(optimizer)
        for batch in batches:
            tuner.begin_step()
            torch.manual_seed(0)
            wrapped(**{name: values[share] for name, values in batch.items()}).loss.backward()
            tuner.before_optimizer_step()
            optimizer.step()
            tuner.after_optimizer_step()
            optimizer.zero_grad()
            tuner.end_step(optimizer)
            learned.append(list(tuner.selector.importance))  # type: ignore[attr-defined]
    return {name: p.detach().clone() for name, p in model.named_parameters()}, learned


def apart(name: str, entry: Method, rank: int) -> float | str:
    """The largest difference between the two trainings relative to the largest step, or what stopped them."""
    try:
        alone, learned_alone = trained(entry, plain, slice(None))
        share = slice(None) if name in WHOLE else slice(2 * rank, 2 * rank + 2)
        together, learned = trained(entry, DistributedDataParallel, share)
    except Exception:
        return traceback.format_exc(limit=-3)
    moved = max(float((alone[name] - p.detach()).abs().max()) for name, p in make_adapted(entry).named_parameters())
    if not moved:
        return "nothing moved"
    weights = max(float((alone[name] - together[name]).abs().max()) for name in alone)
    importance = float((torch.tensor(learned_alone) - torch.tensor(learned)).abs().max())
    return max(weights / moved, importance)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    found = {name: apart(name, entry, rank) for name, entry in METHODS.items() if is_available(entry)}
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(found, indent=1))
    dist.barrier()
    dist.destroy_process_group()
