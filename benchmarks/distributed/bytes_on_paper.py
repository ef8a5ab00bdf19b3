"""Memory of each rank, before any is taken: what it keeps between steps exactly, and the activations of a step.

The state follows from the shapes of a model without weights (`meta`): FSDP2 splits the first dimension of each
parameter as `torch.chunk` does. Activations are counted by running two layers of full size on fake tensors, which have
shapes and no memory.
"""

from __future__ import annotations

import sys
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

sys.path.insert(0, str(Path(__file__).parents[1]))

from build import renew_buffers, weightless

from harness import model_config

__all__ = ["activation_bytes", "gathered_bytes", "num_layers", "shard_shape", "state_bytes", "trained_layers"]

STEP_BYTES = 4
"""AdamW counts the steps of each parameter in a float32."""


def shard_shape(shape: tuple[int, ...], rank: int, size: int) -> tuple[int, ...]:
    """The part of a tensor that FSDP2 leaves on a rank."""
    chunk = -(-shape[0] // size)
    return (max(0, min(chunk, shape[0] - rank * chunk)), *shape[1:])


@lru_cache
def shapes(size: str, method: str) -> tuple[tuple[str, tuple[int, ...], int, bool], ...]:
    """Name, shape, bytes of an element, and whether it trains, of each parameter."""
    model = weightless(size, method)
    return tuple((name, tuple(p.shape), p.element_size(), p.requires_grad) for name, p in model.named_parameters())


@lru_cache
def num_layers(size: str) -> int:
    """Decoder layers of a shape."""
    return model_config(size).num_hidden_layers  # type: ignore[attr-defined]


def trained_layers(size: str, method: str) -> int:
    """Layers whose adapters a step trains."""
    return {"lora": num_layers(size), "sampled": num_layers(size) // 4, "focused": num_layers(size) // 2}[method]


def state_bytes(size: str, method: str, engine: str, processes: int) -> list[dict[str, int]]:
    """What each rank keeps: base weights, adapters, the gradients of a step, and AdamW's state.

    Sampled training keeps optimizer state of every layer, once each has been active, and has gradients of a quarter of
    them: all layers have the same shapes, so that is a quarter of the bytes. DDP has those of frozen layers too, as
    zeros that it does not send.
    """
    sharded = engine == "fsdp2"
    ranks = []
    for rank in range(processes):
        held = {"base": 0, "adapters": 0, "gradients": 0, "optimizer": 0}
        for _, shape, width, trains in shapes(size, method):
            count = prod(shard_shape(shape, rank, processes) if sharded else shape)
            held["adapters" if trains else "base"] += count * width
            if trains:
                held["gradients"] += count * width
                held["optimizer"] += 2 * count * width + STEP_BYTES
        if method == "sampled" and engine != "ddp":
            held["gradients"] = held["gradients"] * trained_layers(size, method) // num_layers(size)
        ranks.append(held)
    return ranks


def gathered_bytes(size: str, method: str, processes: int) -> list[int]:
    """The bytes that FSDP2 gathers for each decoder layer, and last those for the root, padded to whole parts."""
    units = [0] * (num_layers(size) + 1)
    for name, shape, width, _ in shapes(size, method):
        layer = name.partition(".layers.")[2].split(".")[0]
        padded = prod(shard_shape(shape, 0, processes)) * processes
        units[int(layer) if layer else -1] += padded * width
    return units


def activation_bytes(size: str, method: str, rows: int, tokens: int) -> int:
    """Bytes that PEFT's forward holds for the backward on each rank, without activation checkpointing.

    Of sampled and focused training it is what PEFT holds for the same layers, with the first of them as low as it can
    be; the library's fused step holds less. Memory that operations need for a moment comes on top.
    """
    rest, trained, frozen = layer_activations(size, method, rows, tokens)
    active = trained_layers(size, method)
    return rest + active * trained + (num_layers(size) - active) * frozen


@lru_cache
def layer_activations(size: str, method: str, rows: int, tokens: int) -> tuple[int, int, int]:
    """Bytes held by everything but the layers, by a layer whose adapters train, and by a frozen layer above one."""
    both = held_bytes(size, method, (0, 1), rows, tokens)
    low = held_bytes(size, method, (0,), rows, tokens)
    high = held_bytes(size, method, (1,), rows, tokens)
    trained = both - high
    frozen = low - high
    return high - trained, trained, frozen


def held_bytes(size: str, method: str, trained: tuple[int, ...], rows: int, tokens: int) -> int:
    """Bytes held after the forward of two layers, of which some have adapters."""
    model = weightless(size, method, layers=2, only=trained)
    renew_buffers(model, torch.device("cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    fake = torch.empty_like(parameter, device="cpu")
                    module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.forward = partial(gpu_dropout, probability=module.p)
        ids = torch.zeros((rows, tokens), dtype=torch.long)
        return saved_bytes(model.train(), {"input_ids": ids, "labels": ids})


def gpu_dropout(input: Tensor, probability: float) -> Tensor:
    """Dropout that keeps a mask of bytes, as GPUs do; on CPUs PyTorch keeps one of the input's type."""
    return torch.native_dropout(input, probability, True)[0]


def saved_bytes(model: nn.Module, inputs: dict[str, Tensor]) -> int:
    """Bytes that the graph of a forward holds for the backward, apart from the model's parameters."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    held: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            held[storage._cdata] = storage
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs, use_cache=False).loss
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in held.values())
