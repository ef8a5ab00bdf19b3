"""One process of a focused training under DDP: `focus_worker.py FOLDER`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ist import SparseTuner, layer_scores
from ist.focusing import find_focus, gradient_init
from tests.helpers.tiny import tiny_batches, tiny_llama

NUM_BATCHES = 4


def lora() -> LoraConfig:
    """What all layers would train with."""
    return LoraConfig(r=4, target_modules=["q_proj", "up_proj"])


def digest(model: Any) -> str:
    """Of the bits of what trains."""
    trained = [p.detach().numpy().tobytes() for p in model.parameters() if p.requires_grad]
    return hashlib.sha256(b"".join(trained)).hexdigest()


def main(folder: Path) -> None:
    """Choose layers from this rank's own batches, train them, and leave what came of it."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    batches = tiny_batches(size * NUM_BATCHES)[rank::size]
    base = tiny_llama(6)
    focus = find_focus(base, lora(), batches, num_layers=3)
    relative = layer_scores(base, lora(), batches, criterion="relative_gradient")
    torch.manual_seed(0)
    adapted = get_peft_model(base, focus.config)
    num_set = gradient_init(adapted, batches)
    start = digest(adapted)
    model: Any = DistributedDataParallel(adapted)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    tuner = SparseTuner(model, selector="all")
    for batch in batches:
        with tuner.step(optimizer):
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    tuner.close()
    found = {"scores": focus.scores, "layers": focus.layers, "adapter": digest(model)}
    found |= {"relative": relative, "num_set": num_set, "start": start}
    (folder / f"found.{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
