"""One process of a launch that trains whole layers under DistributedDataParallel: `… FOLDER`."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ist import SparseTuner
from tests.helpers.tiny import checkpoint_activations, moved_layers, snapshot, tiny_batches, tiny_llama

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "find_unused_parameters": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
}
STEPS = 8


def train(selector: str, checkpointing: bool, mode: dict[str, Any] | None, rank: int, size: int) -> dict[str, Any]:
    """Train on this rank's share of each batch; on all of it where `mode` is None."""
    model = tiny_llama()
    if checkpointing:
        checkpoint_activations(model, use_reentrant=False)
    wrapper: Any = model if mode is None else DistributedDataParallel(model, **mode)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    tuner = SparseTuner(wrapper, selector=selector, num_active_layers=1, update_interval=2, seed=3)
    chosen, right = [], True
    for batch in tiny_batches(STEPS):
        share = batch if mode is None else {name: rows[rank::size] for name, rows in batch.items()}
        active = tuner.begin_step()
        before = snapshot(model)
        wrapper(**share, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tuner.end_step(optimizer)
        chosen.append(list(active))
        right &= moved_layers(before, snapshot(model)) == {*active, None}
    tuner.close()
    return {"chosen": chosen, "right": right, "bytes": tuner.reduced_bytes, "weights": snapshot(model)}


def main(folder: Path) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = []
    for selector in ("lisa", "lift-end-to-front", "full"):
        for checkpointing in (False, True):
            alone = train(selector, checkpointing, None, rank, size)
            for name, mode in MODES.items():
                shared = train(selector, checkpointing, mode, rank, size)
                # The same on all ranks to the bit, and one process's on whole batches within rounding.
                agree = True
                for weight in shared["weights"].values():
                    first = weight.clone()
                    dist.broadcast(first, 0)
                    agree &= torch.equal(first, weight)
                apart = max(float((alone["weights"][n] - w).abs().max()) for n, w in shared["weights"].items())
                result = {"case": f"{selector}, {name}, {checkpointing}", "agree": agree, "apart": apart}
                result["same sets"] = shared["chosen"] == alone["chosen"]
                result["right"], result["bytes"] = shared["right"], shared["bytes"]
                results.append(result)
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
