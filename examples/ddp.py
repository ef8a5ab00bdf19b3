"""Importance-aware Sparse Tuning in a loop of your own on several GPUs, each with the whole model (DDP).

    torchrun --nproc-per-node 2 examples/ddp.py                             # a tiny random model, on CPUs too
    torchrun --nproc-per-node 2 examples/ddp.py --model Qwen/Qwen3-0.6B     # a model of yours

The lines with `tuner` are those of `plain_loop.py`: all ranks choose the same layers, and DDP reduces the gradients of
these layers alone.
"""

from __future__ import annotations

import os

import torch
from peft import LoraConfig, get_peft_model
from starter import load, parse_arguments, sum_loader
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from ist import SparseTuner


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
    wrapped = DistributedDataParallel(model)
    learning_rate = 1e-2 if arguments.model is None else 3e-4
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=learning_rate)
    loader = sum_loader(tokenizer, device)  # your data goes here

    losses: list[float] = []
    with SparseTuner(wrapped, num_active_layers=0.25, mu=100.0, probe_batches=loader) as tuner:
        while len(losses) < arguments.steps:
            for batch in loader:
                with tuner.step(optimizer):
                    loss = wrapped(**batch).loss
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())

    if distributed.get_rank() == 0:
        print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
        model.save_pretrained(arguments.output)  # a plain PEFT adapter
    distributed.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
