"""What FSDP and tensor parallelism do to a model, as far as layers that sit a step out are concerned."""

from __future__ import annotations

from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from .wrappers import within_fsdp

__all__ = [
    "DEEPSPEED",
    "check_backend",
    "check_saves",
    "compute_device",
    "inner_units",
    "is_deepspeed",
    "is_sharded",
    "sharded_units",
]

DEEPSPEED = (
    "DeepSpeed is on, whose optimizers keep all gradients in flat buffers and so move frozen layers too (weight decay, "
    "momentum), at ZeRO-1, 2 and 3 alike: train with DDP or FSDP2."
)

FSDP1_WRAPPER = "_fsdp_wrapped_module."
"""In names of weights of a module that FSDP1 wraps."""


def sharded_units(module: nn.Module) -> list[nn.Module]:
    """The modules in `module`, itself included, whose weights `fully_shard` (FSDP2) gathers for their own forward."""
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FSDPModule

    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def wrapped_units(module: nn.Module) -> list[Any]:
    """The wrappers of FSDP1 in `module`, itself included."""
    if not dist.is_available():
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel

    return [part for part in module.modules() if isinstance(part, FullyShardedDataParallel)]


def inner_units(module: nn.Module) -> set[nn.Module]:
    """The modules in `module` whose forward begins when FSDP has gathered their own weights."""
    return {*sharded_units(module), *(unit.module for unit in wrapped_units(module))}


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward of the model is a collective, because each rank holds a part of the weights."""
    return bool(sharded_units(model) or wrapped_units(model))


def compute_device(model: nn.Module, sharded: bool | None = None) -> torch.device:
    """Where the model computes: where its weights are, or with FSDP's CPU offload where they are brought to."""
    device = next(model.parameters()).device
    if device.type == "cpu" and torch.cuda.is_available() and (is_sharded(model) if sharded is None else sharded):
        return torch.device("cuda", torch.cuda.current_device())
    return device


def is_deepspeed(thing: Any) -> bool:
    """Whether DeepSpeed made this model or optimizer, or (ZeRO-3) took the model's parameters apart."""
    if any(kind.__module__.split(".")[0] == "deepspeed" for kind in type(thing).__mro__):
        return True
    return isinstance(thing, nn.Module) and any(hasattr(parameter, "ds_id") for parameter in thing.parameters())


def check_backend(model: nn.Module) -> None:
    """Refuse what cannot train the adapters of single layers.

    Raises:
        ValueError: the model is under DeepSpeed or tensor parallelism, or under FSDP1 in a form that hides the
            parameters or holds a gradient back once a unit was frozen (`NO_SHARD`, which PyTorch also takes for one
            process).
    """
    if is_deepspeed(model):
        raise ValueError(DEEPSPEED)
    for unit in wrapped_units(model):
        if not unit._use_orig_params:
            raise ValueError(
                "FSDP1 hides the adapters in flat parameters: set use_orig_params=True (fsdp_use_orig_params in "
                "Accelerate), or better use FSDP2 (fsdp_version: 2)."
            )
        if unit.sharding_strategy.name == "NO_SHARD":
            raise ValueError(
                "FSDP1 shards nothing here (NO_SHARD, or a single process), and then no gradient comes to layers that "
                "sat a step out: use DDP or FSDP2 (fsdp_version: 2), or leave FSDP out where there is one process."
            )
    size = max((getattr(module, "_tp_size", None) or 1 for module in model.modules()), default=1)
    if size == 1 and dist.is_available() and not is_sharded(model):
        from torch.distributed.tensor import DTensor

        size = max((p.device_mesh.size() for p in model.parameters() if isinstance(p, DTensor)), default=1)
    if size > 1:
        raise ValueError(
            f"The model's weights are split over {size} ranks by tensor parallelism, and IST cannot train a layer's "
            "adapters apart there: use FSDP2 (fully_shard) or DistributedDataParallel."
        )


def check_saves(model: nn.Module) -> None:
    """Raise ValueError where PEFT would save an adapter's file without weights, as PEFT 0.21 does under FSDP1.

    It looks for the names of modules in those of weights, which know nothing of the wrappers of single layers.

    Args:
        model: as a Trainer has wrapped it.
    """
    inner = within_fsdp(model)
    if not wrapped_units(model) or not hasattr(inner, "peft_config"):
        return
    import peft

    weights: Any = {name.replace(FSDP1_WRAPPER, ""): weight for name, weight in inner.named_parameters()}
    if not peft.get_peft_model_state_dict(inner, state_dict=weights, save_embedding_layers=False):
        raise ValueError(
            f"PEFT {peft.__version__} saves no weights of an adapter on a model whose layers FSDP1 wraps, and the "
            "training would be lost: use FSDP2 (fsdp_version: 2)."
        )
