"""One process of trainings around evaluations: `orders_worker.py FOLDER ENGINE`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from trainer_cases import make_trainer, preparation

from ist.runtime.sharding import is_sharded
from tests.helpers.tiny import tiny_rows

ORDERS = {
    "DDP": ["evaluate train", "predict train", "train evaluate train", "evaluate predict train predict train"],
    "FSDP2": ["train", "train evaluate predict", "train train", "train evaluate train", "evaluate train"],
}
NUM_STEPS = 6


def weights(model: Any) -> str:
    """A hash of what trains, whole on every rank."""
    trained = [p.detach() for p in model.parameters() if p.requires_grad]
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in trained]
    return hashlib.sha256(b"".join(p.cpu().numpy().tobytes() for p in whole)).hexdigest()


def main(folder: Path, engine: str) -> None:
    """Train in every order, each with a Trainer and a model of its own."""
    found = {}
    for number, order in enumerate(ORDERS[engine]):
        trainer, _, _ = make_trainer(folder / str(number), 2, engine, NUM_STEPS, preparation(engine))
        rows: Any = tiny_rows(8, seed=9)
        try:
            for act in order.split():
                if act == "train":
                    trainer.train()
                    wrapped = trainer.model_wrapped
                    assert isinstance(wrapped, DistributedDataParallel) or is_sharded(wrapped), order
                else:
                    getattr(trainer, act)(rows)
            found[order] = weights(trainer.model)
        except ValueError as error:
            found[order] = f"refused: {error}"
    (folder / f"found.{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
