"""Where the processes of these tests train: on CPUs over gloo, or, with IST_TEST_DEVICE=cuda, on GPUs over NCCL."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

__all__ = ["BACKEND", "DEVICE", "ON_CPUS", "join", "moved", "on_one_gpu"]

DEVICE = torch.device(os.environ.get("IST_TEST_DEVICE", "cpu"))
ON_CPUS = DEVICE.type == "cpu"
BACKEND = "gloo" if ON_CPUS else "nccl"
if not ON_CPUS:  # Trainings are compared to the bit.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)


def join(limit: float | None = None) -> None:
    """Make this process known to the others; one GPU is its own.

    Args:
        limit: seconds that a collective may take; None is PyTorch's own.
    """
    if not ON_CPUS:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(BACKEND, timeout=None if limit is None else timedelta(seconds=limit))


def on_one_gpu(arguments: Any) -> Any:
    """Have a single process of the Trainer train on one GPU, where it would split batches over all that it sees."""
    if arguments.device.type == "cuda":
        arguments._n_gpu = 1
    return arguments


def moved(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The batches where the model is."""
    return [{name: tensor.to(DEVICE) for name, tensor in batch.items()} for batch in batches]
