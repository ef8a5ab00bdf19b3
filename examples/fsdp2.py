"""Importance-aware Sparse Tuning in a loop of your own on several GPUs, each with a part of each layer (FSDP2).

    torchrun --nproc-per-node 2 examples/fsdp2.py                             # a tiny random model, on CPUs too
    torchrun --nproc-per-node 2 examples/fsdp2.py --model Qwen/Qwen3-0.6B     # a model of yours

The lines with `tuner` are those of `plain_loop.py`. With a Trainer, launch `trainer.py` through accelerate instead:

    accelerate launch --config_file examples/distributed/fsdp2.yaml examples/trainer.py --model Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import os

import torch
from peft import LoraConfig, get_peft_model
from starter import load, parse_arguments, sum_loader
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from ist import SparseTuner, discover_layers


def main() -> list[float]:
    """Train; returns this rank's losses."""
    arguments = parse_arguments(__doc__, steps=64)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")

    model, tokenizer = load(arguments.model)
    model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear")).to(device)
    for layer in discover_layers(model):
        fully_shard(layer.module)  # a unit for each layer
    fully_shard(model)
    learning_rate = 1e-2 if arguments.model is None else 3e-4
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    loader = sum_loader(tokenizer, device)  # your data goes here

    losses: list[float] = []
    with SparseTuner(model, num_active_layers=0.25, mu=100.0, probe_batches=loader) as tuner:
        while len(losses) < arguments.steps:
            for batch in loader:
                with tuner.step(optimizer):
                    loss = model(**batch).loss
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())

    # Every rank takes part in gathering the adapter; the first one writes it.
    adapter = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    )
    if distributed.get_rank() == 0:
        print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
        model.save_pretrained(arguments.output, state_dict=adapter)  # a plain PEFT adapter
    distributed.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
