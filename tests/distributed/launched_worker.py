"""One process of `ist train` that leaves a hash of the adapter that it has trained: `launched_worker.py FLAGS`."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from device import ON_CPUS
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

import ist.cli.train.command as command
from ist.cli.main import main

SHARD = "ACCELERATE_USE_FSDP" in os.environ
load_seeded, make_trainer = command.load_seeded, command.make_trainer


class Hash(TrainerCallback):
    """Writes the hash when training ends."""

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        trained = [p.detach() for p in model.parameters() if p.requires_grad]
        assert all(isinstance(p, DTensor) == SHARD for p in trained), "the backend is not the one that was asked for"
        whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in trained]
        digest = hashlib.sha256(b"".join(p.cpu().numpy().tobytes() for p in whole)).hexdigest()
        (Path(args.output_dir) / f"rank-{os.environ['RANK']}.txt").write_text(digest)


def load_to_be_sharded(run: Any, data: Any) -> Any:
    """Accelerate turns FSDP on beside GPUs only, and else trains with DDP without a word."""
    if SHARD and ON_CPUS:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        PartialState._shared_state["device"] = torch.device("cpu")  # FSDP1 knows no cpu:0.
    return load_seeded(run, data)


def make_trainer_with_hashes(*arguments: Any) -> Any:
    """The trainer of `ist train`, with one more callback."""
    trainer = make_trainer(*arguments)
    trainer.add_callback(Hash())
    return trainer


command.load_seeded, command.make_trainer = load_to_be_sharded, make_trainer_with_hashes  # type: ignore[assignment]
if __name__ == "__main__":
    sys.exit(main())
