"""One process of a launch of the Trainer: `trainer_worker.py FOLDER ENGINE STEPS`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from trainer_cases import make_trainer


def main(folder: Path, engine: str, steps: int) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    trainer, ist, actives = make_trainer(folder / "run", size, engine, steps)
    trainer.train()
    trainer.save_model(str(folder / "adapter"))
    seen = {"actives": actives.sets, "importance": ist.tuner.selector.state_dict()["importance"]}
    (folder / f"seen.{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
