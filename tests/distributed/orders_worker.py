"""One process of trainings around evaluations: `orders_worker.py FOLDER BACKEND`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from torch.nn.parallel import DistributedDataParallel
from trainer_cases import ENGINES, make_trainer
from trainer_worker import let_accelerate_shard_on_cpus

from ist.runtime.sharding import is_sharded
from tests.helpers.tiny import tiny_rows

ORDERS = ["evaluate train", "predict train", "train evaluate train", "evaluate predict train predict train"]
NUM_STEPS = 6


def weights(model: Any) -> str:
    """A hash of what trains, gathered where it is sharded."""
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in state.values()]
    return hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in whole)).hexdigest()


def main(folder: Path, backend: str) -> None:
    """Train in every order, each with a Trainer and a model of its own."""
    shard = "fsdp" in ENGINES[backend]
    prepare = let_accelerate_shard_on_cpus if shard and os.environ.get("IST_TEST_DEVICE") != "cuda" else None
    found = {}
    for number, order in enumerate(ORDERS):
        trainer, _, _ = make_trainer(folder / str(number), 2, backend, NUM_STEPS, prepare)
        rows: Any = tiny_rows(8, seed=9)
        for act in order.split():
            if act == "train":
                trainer.train()
                wrapped = trainer.model_wrapped
                assert is_sharded(wrapped) if shard else isinstance(wrapped, DistributedDataParallel), order
            else:
                getattr(trainer, act)(rows)
        found[order] = weights(trainer.model)
    (folder / f"found.{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
