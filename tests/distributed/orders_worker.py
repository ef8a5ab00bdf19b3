"""One process of trainings around evaluations: `orders_worker.py FOLDER`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from torch.nn.parallel import DistributedDataParallel
from trainer_cases import make_trainer

from tests.helpers.tiny import tiny_rows

ORDERS = ["evaluate train", "predict train", "train evaluate train", "evaluate predict train predict train"]
NUM_STEPS = 6


def weights(model: Any) -> str:
    """A hash of what trains."""
    trained = (p.detach().cpu() for p in model.parameters() if p.requires_grad)
    return hashlib.sha256(b"".join(p.numpy().tobytes() for p in trained)).hexdigest()


def main(folder: Path) -> None:
    """Train in every order, each with a Trainer and a model of its own."""
    found = {}
    for number, order in enumerate(ORDERS):
        trainer, _, _ = make_trainer(folder / str(number), 2, steps=NUM_STEPS)
        rows: Any = tiny_rows(8, seed=9)
        for act in order.split():
            if act == "train":
                trainer.train()
                assert isinstance(trainer.model_wrapped, DistributedDataParallel), order
            else:
                getattr(trainer, act)(rows)
        found[order] = weights(trainer.model)
    (folder / f"found.{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
