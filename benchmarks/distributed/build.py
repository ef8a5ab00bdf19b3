"""A Llama of random weights with adapters, made shard by shard: no rank ever holds more than its own part.

The model is made on PyTorch's `meta` device, wrapped there, and only then gets memory: of each parameter the part that
this rank keeps.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness import FIVE, model_config

__all__ = ["even_focus", "local", "lora_config", "make_sharded", "renew_buffers", "weightless"]

RANK, ALPHA, DROPOUT = 32, 64, 0.05


def weightless(size: str, method: str, layers: int | None = None, only: Sequence[int] | None = None) -> Any:
    """A PEFT model without weights (on `meta`): bfloat16, with float32 adapters as PEFT makes them.

    Args:
        size: a key of `harness.SHAPES`.
        method: `focused` has adapters in every second layer, with the rank of all layers moved there; the others have
            them in all.
        layers: another number of layers.
        only: the layers that have adapters, where these are others than the method's.
    """
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(model_config(size, layers), dtype=torch.bfloat16)
    lora = lora_config()
    config = even_focus(lora, base.config.num_hidden_layers) if method == "focused" else lora
    if only is not None:
        config.layers_to_transform = list(only)
    return get_peft_model(base, config, low_cpu_mem_usage=True)


def lora_config() -> LoraConfig:
    """LoRA of the paper's modules."""
    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=list(FIVE), task_type="CAUSAL_LM")


def even_focus(config: LoraConfig, layers: int) -> LoraConfig:
    """What `ist.focus(model, config, spread="even")` returns for a model of so many equal layers.

    Random weights have no important layers. Written out, since `focus` takes seconds for 80 layers, in every process.
    """
    alpha = config.lora_alpha * sqrt(2)  # Twice the rank with the same size of updates.
    return replace(config, r=2 * config.r, lora_alpha=alpha, layers_to_transform=[*range(1, layers, 2)])


def make_sharded(size: str, method: str, engine: str, device: torch.device, model: Any = None) -> nn.Module:
    """The model of `weightless` under a distributed backend, with random weights on the device.

    Args:
        size: a key of `harness.SHAPES`.
        method: as for `weightless`.
        engine: `none`, `ddp` or `fsdp2`; units of FSDP2 are the decoder layers, and the rest is the root's.
        device: of this rank.
        model: that of `weightless`, where it has been made.
    """
    model = weightless(size, method) if model is None else model
    if engine == "fsdp2":
        for block in model.base_model.model.model.layers:
            fully_shard(block)
        fully_shard(model)
    materialise(model, device)
    if engine == "ddp":
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    return model


def materialise(model: Any, device: torch.device) -> None:
    """Give every parameter memory and random values: of a sharded one, this rank's part alone."""
    model.to_empty(device=device)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            seed = number + (rank << 32 if isinstance(parameter, DTensor) else 0)
            generator = torch.Generator(device).manual_seed(seed)
            # Small enough for a finite loss in bfloat16; up-projections have begun to learn.
            std = 1e-3 if "lora_B" in name else 0.02
            fill(local(parameter), name, std, generator)
    renew_buffers(model, device)


def renew_buffers(model: Any, device: torch.device) -> None:
    """Make the rotary embedding again, whose buffers are computed when it is made and have no values on `meta`."""
    decoder = model.base_model.model.model
    with device:
        decoder.rotary_emb = type(decoder.rotary_emb)(decoder.config)


def fill(part: Tensor, name: str, std: float, generator: torch.Generator) -> None:
    """Values for one rank's part of a parameter: ones for a norm, otherwise normal ones."""
    if "norm" in name:
        part.fill_(1.0)
    else:
        part.normal_(std=std, generator=generator)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, or all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
