"""What is compared of a finished training: hashes of its adapters and of the facts in its history, and its losses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ist import read_history

__all__ = ["Result", "facts", "fingerprint", "summarize"]

Result = dict[str, Any]


def facts(events: Iterable[dict[str, Any]]) -> list[list[Any]]:
    """The facts of a history: which layers trained, what was measured and learned; no names, versions or times."""
    found: list[list[Any]] = []
    for event in events:
        if event["event"] == "step":
            found.append(["step", event["step"], event["active"]])
        elif event["event"] == "importance":
            numbers = [event[name] for name in ("candidates", "losses", "rewards", "importance")]
            found.append(["importance", event["step"], *numbers, event["skipped"] is not None])
    return found


def fingerprint(parameters: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the names, types, shapes and bytes of parameters, sorted by name."""
    digest = hashlib.sha256()
    for name, parameter in sorted(parameters, key=lambda pair: pair[0]):
        value = parameter.detach()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def summarize(model: nn.Module, folder: Path, losses: list[float]) -> Result:
    """What is compared of a finished training."""
    (file,) = folder.glob("*.jsonl")
    history = facts(read_history(file))
    return {
        "adapters": fingerprint((name, value) for name, value in model.named_parameters() if value.requires_grad),
        "history": hashlib.sha256(json.dumps(history).encode()).hexdigest(),
        "num_steps": sum(fact[0] == "step" for fact in history),
        "num_updates": sum(fact[0] == "importance" for fact in history),
        "losses": losses,
    }
