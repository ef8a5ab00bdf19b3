"""One process of the benchmark: train LoRA or IST for some steps and say what a step cost. Started by run.py."""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from ist import SparseTuner


def make_model(config: dict[str, Any], device: torch.device) -> nn.Module:
    """LoRA on a Llama of random weights, the same on every rank."""
    torch.manual_seed(0)
    dtype = getattr(torch, config["dtype"])
    with device:
        base = LlamaForCausalLM._from_config(LlamaConfig(**config["model"]), dtype=dtype)
    lora = LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"], **config["lora"])
    return get_peft_model(base, lora)


def wrap(model: nn.Module, engine: str, device: torch.device) -> nn.Module:
    """The model under the engine; on one process it is left alone."""
    if dist.get_world_size() == 1:
        return model
    if engine == "ddp":
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    for block in model.base_model.model.model.layers:  # type: ignore[union-attr]
        fully_shard(block)
    fully_shard(model)
    return model


def gradient_bytes(model: nn.Module) -> int:
    """Of the gradients that are there, whole ones where each rank holds a part."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.grad is not None)


def main(config: dict[str, Any], method: str, engine: str, file: Path) -> None:
    local_rank = int(os.environ["LOCAL_RANK"])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(minutes=5))
    rank, size = dist.get_rank(), dist.get_world_size()
    wrapped = wrap(make_model(config, device), engine, device)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-4)
    generator = torch.Generator().manual_seed(rank)
    shape = (config["batch_size"], config["length"])

    def batch() -> dict[str, torch.Tensor]:
        ids = torch.randint(config["model"]["vocab_size"], shape, generator=generator).to(device)
        return {"input_ids": ids, "labels": ids}

    tuner = SparseTuner(wrapped, probe_batches=[batch()], **config["ist"]) if method == "ist" else None
    seconds, reduced = [], []
    for _ in range(config["warmup"] + config["steps"]):
        inputs = batch()
        sent = tuner.reduced_bytes[0] if tuner else 0
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        if tuner:
            tuner.begin_step()
        wrapped(**inputs).loss.backward()
        # DDP gives frozen layers zeros, which are not sent: there the count is the communication hook's.
        present = gradient_bytes(wrapped)
        optimizer.step()
        optimizer.zero_grad()
        if tuner:
            tuner.end_step(optimizer)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        reduced.append(tuner.reduced_bytes[0] - sent if tuner and engine == "ddp" and size > 1 else present)
    seconds, reduced = seconds[config["warmup"] :], reduced[config["warmup"] :]
    peak = torch.cuda.max_memory_allocated() if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    figures = {
        "median_step_seconds": statistics.median(seconds),
        "mean_step_seconds": statistics.mean(seconds),
        "reduced_bytes_per_step": statistics.mean(reduced) if size > 1 else 0,
        "peak_memory_bytes": peak,
        "device": torch.cuda.get_device_name() if cuda else "CPU",
    }
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, figures)
    if rank == 0:
        file.write_text(json.dumps(everyone), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], Path(sys.argv[4]))
