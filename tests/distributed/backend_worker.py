"""One process of a launch that trains one case after the other: `backend_worker.py FOLDER CASE…`."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import backends
import torch
from device import join
from torch import distributed as dist


def main(folder: Path, cases: list[str]) -> None:
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    join(limit=60)
    for case in cases:
        engine, checkpointing, accumulation = case.split(":")
        try:
            result = backends.train(
                {**backends.ENGINES, **backends.GPU_ENGINES}[engine][1],
                rank,
                size,
                checkpointing,
                int(accumulation),
            )
            weights = result.pop("weights")
            result["ranks_agree"] = backends.ranks_agree(weights)
            if rank == 0:
                torch.save({name: weight.cpu() for name, weight in weights.items()}, folder / f"{case}.pt")
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        (folder / f"{case}.{rank}.json").write_text(json.dumps(result))
        if "error" in result:
            break  # The ranks may be out of step from here.
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
