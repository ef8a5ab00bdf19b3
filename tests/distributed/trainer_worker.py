"""One process of a launch of the Trainer: `trainer_worker.py FOLDER ENGINE STEPS`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from trainer_cases import ENGINES, make_trainer, preparation

from ist.runtime.sharding import is_sharded


def main(folder: Path, engine: str, steps: int) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    shard = "fsdp" in ENGINES[engine]
    trainer, ist, actives = make_trainer(folder / "run", size, engine, steps, preparation(engine))
    trainer.train()
    assert is_sharded(trainer.model_wrapped) == shard, "the engine is not the one that is tested"
    trainer.save_model(str(folder / "adapter"))
    seen = {"actives": actives.sets, "importance": ist.tuner.selector.state_dict()["importance"]}
    (folder / f"seen.{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
