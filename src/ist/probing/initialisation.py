"""Start LoRA from the gradient of the loss by the weights: `A` from its right singular vectors, `B = 0`.

A weight `W` with the gradient `G = ∂L/∂W`, `[out, in]`, and LoRA `W + s·BA` at `B = 0`: the first step of gradient
descent on `B` changes the weight by `−η s² G AᵀA`. Of all `A` with r orthonormal rows that is nearest to the step of
full fine-tuning, `−η G`, where the rows are the r largest right singular vectors of `G` (Eckart and Young; GaLore,
arXiv 2403.03507, projects on the same space). LoRA-GA (arXiv 2407.05000) and LoRA-One (arXiv 2502.01235) take `B` from
the left singular vectors too, so that `BA ≠ 0`, and LoRA-GA subtracts `s·BA` from the base weight to keep the
function. Here the function stays exactly the model's, the base weight is unchanged, and what is saved is plain PEFT.

`G` itself is never made. A randomised singular value decomposition (Halko, Martinsson and Tropp, arXiv 0909.4061)
needs two passes over the batches and memory for `[out, r]` and `[r, in]` a module, as its adapter does:

1. `Y = G Ωᵀ = gᵀ(x Ωᵀ)` with a random `Ω`, which is what the gradient probe measures; `Q` spans `Y`;
2. `P = QᵀG = (gQ)ᵀx`, whose right singular vectors are those of `G` within the span of `Q`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from logging import getLogger
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional

from ..adapters.layers import discover_layers, find_adapters
from ..adapters.responses import active_names
from ..config import check_loss_function, check_seed, with_checked_keywords
from ..runtime.distributed import current_ranks
from ..runtime.sharding import is_deepspeed, is_sharded
from .criteria import check_num_batches
from .gradients import FirstMatrices, take_batches
from .loss_scale import GradientSums, LossScale
from .passes import run_passes, watching
from .suppression import LossFunction, model_loss

__all__ = ["gradient_init", "right_singular_vectors"]

logger = getLogger(__name__)

OVERSAMPLING = 8
"""Columns of the random sketch beyond the rank, as Halko, Martinsson and Tropp advise (5 to 10)."""


@with_checked_keywords
def gradient_init(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    num_batches: int = 4,
    layers: str | Sequence[str] | None = None,
    loss_function: LossFunction | None = None,
    seed: int = 0,
) -> int:
    """Set `A` of each LoRA module to the right singular vectors of its weight's gradient; `B` stays zero.

    ::

        model = get_peft_model(model, config)
        gradient_init(model, batches)

    The rows of `A` are orthogonal and have together the norm of those that PEFT drew. The model's output does not
    change. A module that the gradient does not reach keeps its `A`, as do adapters of embeddings and convolutions.

    Args:
        model: a PEFT model with LoRA, DoRA or rank-stabilised LoRA before its first step; quantised bases too.
        batches: batches of the training data; at most `num_batches` are read, twice. Their gradients are averaged,
            of several processes over ranks too.
        num_batches: at least 1.
        layers: the stack of blocks, where the model has several: see `discover_layers`.
        loss_function: `(model, batch) -> loss` in nats; `model(**batch).loss` if None.
        seed: of the random sketch.

    Returns:
        How many modules were set.

    Raises:
        ValueError: the adapters are of another kind or have been trained, several are active, the model is sharded,
            or a batch does not fit.
    """
    check_num_batches(num_batches)
    check_seed(seed)
    check_loss_function(loss_function)
    modules = linear_modules(model)
    ranks = {name: int(first.weight.shape[0]) for name, (first, _) in modules.items()}
    found = right_singular_vectors(
        model,
        ranks,
        take_batches(batches, num_batches, seed),
        blocks=[layer.module for layer in discover_layers(model, layers, at_least=1)],
        seed=seed,
        loss_function=loss_function or model_loss,
    )
    if not found:
        raise ValueError(
            f"The loss has no gradient by any of the {len(modules)} modules with LoRA: give batches whose labels are "
            "not all ignored, and a loss_function that keeps the graph of the model."
        )
    with torch.no_grad():
        for name, vectors in found.items():
            rows = modules[name][0].weight[: len(vectors)]
            size = torch.linalg.matrix_norm(rows.float()) / len(vectors) ** 0.5
            rows.copy_(vectors * size)
    logger.info("A of %d of %d LoRA modules starts from the gradient.", len(found), len(modules))
    return len(found)


def linear_modules(model: nn.Module) -> dict[str, tuple[nn.Linear, nn.Linear]]:
    """`A` and `B` of each linear module with LoRA by the module's name.

    Raises:
        ValueError: as `gradient_init`.
    """
    adapters, adapter = find_adapters(model), getattr(model, "active_adapter", None)
    kinds = {str(getattr(c.peft_type, "value", c.peft_type)) for c in getattr(model, "peft_config", {}).values()}
    if kinds != {"LORA"} or not isinstance(adapter, str):
        raise ValueError(
            f"gradient_init sets A of LoRA, and the model has {', '.join(sorted(kinds)) or 'no adapter'}: give a PEFT "
            "model with one LoraConfig (use_dora and use_rslora as you like), or start from PEFT's initialisation."
        )
    active = sorted({name for module in adapters.values() for name in active_names(module) or []})
    if len(active) > 1:
        raise ValueError(
            f"gradient_init sets one adapter, and {' and '.join(active)} are active: call "
            f"model.set_adapter({active[0]!r})."
        )
    if is_sharded(model) or is_deepspeed(model):
        raise ValueError("gradient_init sets whole matrices, and the model is sharded: call it before FSDP or ZeRO-3.")
    found: dict[str, tuple[nn.Linear, nn.Linear]] = {}
    for name, module in adapters.items():
        parts = [getattr(module, part, {}) for part in ("lora_A", "lora_B")]
        if not hasattr(module, "parameter_name") and all(  # which wraps a parameter of several experts
            adapter in part and isinstance(part[adapter], nn.Linear) for part in parts
        ):
            found[name] = cast("tuple[nn.Linear, nn.Linear]", tuple(part[adapter] for part in parts))
    if not found:
        raise ValueError("gradient_init sets A of linear modules, and LoRA is on none: give target_modules some.")
    started = next((name for name, (_, second) in found.items() if second.weight.any()), None)
    if started is not None:
        raise ValueError(
            f"B of {started} is not zero, so the adapter was trained or starts otherwise (init_lora_weights): "
            "gradient_init needs a fresh adapter with init_lora_weights=True or 'gaussian'."
        )
    return found


def right_singular_vectors(
    model: nn.Module,
    ranks: Mapping[str, int],
    batches: Sequence[Mapping[str, Any]],
    *,
    blocks: Sequence[nn.Module] = (),
    seed: int = 0,
    loss_function: LossFunction = model_loss,
) -> dict[str, Tensor]:
    """The largest right singular vectors of the gradient of the mean loss by modules' weights.

    Args:
        model: any model; it is left as it was.
        ranks: how many vectors by the qualified name of each module, which has to map its last dimension.
        batches: what the model takes.
        blocks: the blocks to compute again in the backward.
        seed: of the sketch.
        loss_function: `(model, batch) -> loss`, a scalar in nats.

    Returns:
        By name orthonormal rows `[rank, in]` in float32, fewer where a side of the weight is smaller; nothing of a
        module that no gradient reaches.

    Raises:
        ValueError: a loss is no finite scalar, or a gradient overflows float16.
    """
    matrices, sums = FirstMatrices(seed), GradientSums(LossScale(model))

    def project(rank: int, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, matrices.like(inputs, rank + OVERSAMPLING))

    def watch(name: str, keep: Any, *left: Tensor) -> Any:
        return watching(model.get_submodule(name), name, keep, partial(add, name, *left), sums.scale)

    def add(name: str, *tensors: Tensor) -> None:
        *left, gradient, kept = tensors
        sums.add(name, (gradient @ left[0] if left else gradient).T @ kept)

    def passes(watches: list[Any]) -> dict[str, Tensor]:
        run_passes(model, watches, batches, blocks=blocks, seed=seed, loss_function=loss_function, sums=sums)
        return mean_over_ranks(sums.take(), ranks)

    sketches = passes([watch(name, partial(project, rank)) for name, rank in ranks.items()])
    spans = {name: torch.linalg.qr(sketch).Q for name, sketch in sketches.items() if sketch.any()}
    rows = passes([watch(name, lambda inputs: inputs, span) for name, span in spans.items()])
    return {name: torch.linalg.svd(each, full_matrices=False).Vh[: ranks[name]] for name, each in rows.items()}


def mean_over_ranks(sums: Mapping[str, Tensor], names: Collection[str]) -> dict[str, Tensor]:
    """The sums of those of `names` that a gradient has reached, on all ranks, averaged over these."""
    ranks = current_ranks()
    if ranks.size > 1:
        reached = ranks.mean([float(name in sums) for name in names])
        sums = {name: sums[name] for name, share in zip(names, reached, strict=True) if share == 1}
        for each in sums.values():  # In one order on all ranks.
            moved = each.cuda() if dist.get_backend() == "nccl" else each  # A model that FSDP shards is on the CPU.
            dist.all_reduce(moved)
            each.copy_(moved / ranks.size)
    return {name: sums[name] for name in names if name in sums}
