"""The engines that tests train with, each a way to wrap a tiny Llama with LoRA, and one training that fits them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from device import DEVICE, ON_CPUS
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from ist import SparseTuner
from tests.helpers.tiny import tiny_lora, tiny_rows

NUM_LAYERS = 4
GLOBAL_BATCH = 8
NUM_STEPS = 9
OPTIONS: dict[str, Any] = {"num_active_layers": 2, "update_interval": 3, "num_candidates": 3, "mu": 50.0, "seed": 5}

Wrap = Callable[[nn.Module], nn.Module]


def plain(model: nn.Module) -> nn.Module:
    """No engine: what all others are compared with."""
    return model


def ddp(**options: Any) -> Wrap:
    def wrap(model: nn.Module) -> nn.Module:
        # A small bucket size, so that there are several buckets with some layers in each.
        return DistributedDataParallel(model, bucket_cap_mb=0.01, **options)

    return wrap


def fsdp2(own_units: bool = False, **options: Any) -> Wrap:
    def wrap(model: nn.Module) -> nn.Module:
        for module in list(model.modules()):
            if own_units and isinstance(module, nn.Linear) and module.weight.requires_grad:
                fully_shard(module, **options)
        for module in model.modules():
            if isinstance(module, LlamaDecoderLayer):
                fully_shard(module, **options)
        fully_shard(model, **options)
        return model

    return wrap


def fsdp1(own_units: bool = False, **options: Any) -> Wrap:
    def wrap(model: nn.Module) -> nn.Module:
        def policy(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
            if recurse:
                return True
            return isinstance(module, LlamaDecoderLayer) or (
                own_units and isinstance(module, nn.Linear) and module.weight.requires_grad
            )

        return FullyShardedDataParallel(
            model,
            use_orig_params=True,
            auto_wrap_policy=policy if own_units else ModuleWrapPolicy({LlamaDecoderLayer}),
            device_id=torch.device("cpu") if ON_CPUS else torch.cuda.current_device(),
            **options,
        )

    return wrap


BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

ENGINES: dict[str, tuple[str, Wrap]] = {
    "ddp-unused": ("DDP, find_unused_parameters=True", ddp(find_unused_parameters=True)),
    "ddp": ("DDP, find_unused_parameters=False", ddp()),
    "ddp-static": ("DDP, static_graph=True", ddp(static_graph=True)),
    "ddp-views": ("DDP, gradient_as_bucket_view=True", ddp(gradient_as_bucket_view=True)),
    "fsdp2": ("FSDP2, unit: decoder layer", fsdp2()),
    "fsdp2-units": ("FSDP2, units: layers and LoRA matrices", fsdp2(own_units=True)),
    "fsdp2-keep": ("FSDP2, reshard_after_forward=False", fsdp2(reshard_after_forward=False)),
    "fsdp2-bf16": ("FSDP2, mixed precision bf16", fsdp2(mp_policy=BF16)),
    "fsdp1": ("FSDP1, use_orig_params, unit: decoder layer", fsdp1()),
    "fsdp1-units": ("FSDP1, use_orig_params, units: layers and LoRA matrices", fsdp1(own_units=True)),
}
GPU_ENGINES: dict[str, tuple[str, Wrap]] = {
    **{name: engine for name, engine in ENGINES.items() if not name.startswith("fsdp1")},
    "fsdp2-offload": ("FSDP2, CPU offload", fsdp2(offload_policy=CPUOffloadPolicy())),
}
LOW_PRECISION = ("fsdp2-bf16",)

CHECKPOINTING: dict[str, bool | None] = {"none": None, "reentrant": True, "non-reentrant": False}


def train(
    wrap: Wrap, rank: int = 0, num_ranks: int = 1, checkpointing: str = "none", accumulation: int = 1
) -> dict[str, Any]:
    """Train a few steps with IST, and note at each step what has to hold.

    Returns:
        active sets, losses of candidate sets, importance, the steps in which a gradient other than zero reached an
        frozen weight, in which a frozen weight or its optimizer state moved or an active layer did not, final adapter
        weights, and bytes that DDP reduced.
    """
    model: nn.Module = tiny_lora(NUM_LAYERS).to(DEVICE)
    use_reentrant = CHECKPOINTING[checkpointing]
    if use_reentrant is not None:
        model.enable_input_require_grads()  # type: ignore[operator]
        model.base_model.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})  # type: ignore
    wrapped = wrap(model)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=2e-2, weight_decay=0.1)
    rows = tiny_rows(GLOBAL_BATCH * accumulation * NUM_STEPS)
    probes = torch.utils.data.DataLoader(
        tiny_rows(40, seed=3),  # pyright: ignore[reportArgumentType]
        batch_size=GLOBAL_BATCH // num_ranks,
        collate_fn=collate,  # type: ignore[arg-type]
    )
    share = GLOBAL_BATCH // num_ranks
    actives, losses, moved, unmoved, reached = [], [], [], [], []
    tuner = SparseTuner(wrapped, probe_batches=probes, **OPTIONS)
    for step in range(NUM_STEPS):
        active = tuner.begin_step()
        frozen = [p for layer in tuner.layers if layer.index not in active for p in layer.parameters]
        busy = [p for layer in tuner.layers if layer.index in active for p in layer.parameters]
        before = [(p, local(p).clone(), states(optimizer, p)) for p in (*frozen, *busy)]
        for micro in range(accumulation):
            start = (step * accumulation + micro) * GLOBAL_BATCH + rank * share
            batch = {key: value.to(DEVICE) for key, value in collate(rows[start : start + share]).items()}
            last = micro == accumulation - 1
            synchronise(wrapped, last)
            (wrapped(**batch).loss / accumulation).backward()
        if any(p.grad is not None and bool(local(p.grad).any()) for p in frozen):
            reached.append(step)
        optimizer.step()
        for p, value, state in before[: len(frozen)]:
            if not torch.equal(local(p), value) or not same(states(optimizer, p), state):
                moved.append(step)
        if all(torch.equal(local(p), value) for p, value, _ in before[len(frozen) :]):
            unmoved.append(step)
        optimizer.zero_grad()
        update = tuner.end_step(optimizer)
        actives.append(list(active))
        if update:
            losses.append(list(update.losses))
    tuner.close()
    return {
        "actives": actives,
        "losses": losses,
        "importance": tuner.selector.state_dict()["importance"],
        "frozen_moved": moved,
        "active_unmoved": unmoved,
        "frozen_reached": reached,
        "reduced_bytes": list(tuner.reduced_bytes),
        "weights": full_weights(wrapped),
    }


def synchronise(wrapped: nn.Module, last: bool) -> None:
    """Reduce gradients in the last backward of an accumulation only."""
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.require_backward_grad_sync = last
        if wrapped.static_graph:
            wrapped.require_backward_grad_sync = True  # no_sync() with a static graph fails without IST too.
    elif hasattr(wrapped, "set_requires_gradient_sync"):
        wrapped.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


def states(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    return {k: local(v).clone() for k, v in optimizer.state.get(parameter, {}).items() if isinstance(v, Tensor)}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The whole adapter weights by name, gathered from all ranks."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return {
                name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
                for name, p in model.named_parameters()
                if "lora" in name
            }
    return {
        name.removeprefix("module."): (cast(DTensor, p.to(DEVICE)).full_tensor() if isinstance(p, DTensor) else p)
        .detach()
        .clone()
        for name, p in model.named_parameters()
        if "lora" in name
    }


def ranks_agree(weights: dict[str, Tensor]) -> bool:
    """Whether all ranks hold the same bits."""
    if not dist.is_initialized():
        return True
    flat = torch.cat([weights[name].flatten() for name in sorted(weights)])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    return all(torch.equal(other, flat) for other in everyone)
