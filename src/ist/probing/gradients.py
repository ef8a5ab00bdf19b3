"""The gradient probe: how much an adapter of each module would learn first, before there are adapters.

LoRA starts with `B = 0`, so its output is the model's and the gradient by `A` is zero. The gradient by `B` is
`∂L/∂B = s · gᵀ(x Aᵀ)`, with a module's inputs `x`, the gradient `g` of its outputs, both flattened to tokens, and
LoRA's factor `s`. It needs no adapter: a hook on each module takes `x` in the forward and `g` in the backward. Blocks
are computed again in the backward, so that only one of them keeps its activations at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

from ..runtime.collation import private_state, readers_of
from ..runtime.distributed import current_ranks
from ..runtime.randomness import keyed_generator, keyed_seed, private_randomness
from .loss_scale import GradientSums, LossScale
from .passes import run_passes, watching
from .probes import with_own_iteration
from .suppression import LossFunction, model_loss

__all__ = ["ModuleGradient", "Target", "adapter_gradients", "take_batches"]


@dataclass(frozen=True)
class Target:
    """A module whose adapter's first gradient is measured."""

    rank: int
    """`r`, rows of `A`."""
    scaling: float = 1.0
    """`s`, the factor on the adapter's response."""


@dataclass(frozen=True)
class ModuleGradient:
    """The gradient `G = ∂L/∂B` of one module, `[out, r]`, in two numbers; `L` is the mean loss of the batches."""

    squared_norm: float
    """`Σ G²`: the loss that a small step of gradient descent saves, by its size."""
    absolute_sum: float
    """`Σ |G|`: the loss that a first step of Adam saves, by its learning rate, since Adam moves each weight as far."""


def adapter_gradients(
    model: nn.Module,
    targets: Mapping[str, Target],
    batches: Iterable[Mapping[str, Any]],
    *,
    num_batches: int = 4,
    blocks: Sequence[nn.Module] = (),
    seed: int = 0,
    loss_function: LossFunction = model_loss,
    beside: Sequence[AbstractContextManager[Any]] = (),
) -> dict[str, ModuleGradient]:
    """The first gradients of adapters that are not there.

    `A` is drawn as PEFT draws it, `U(−1/√in, 1/√in)`, the same for all modules of a width: layers differ by their
    gradients alone. The weights, flags, mode and hooks of the model are as before afterwards, also after an exception,
    and the global random state is not touched.

    Args:
        model: any model, quantised ones too. Evaluation mode is on while it is measured: no dropout.
        targets: the modules by qualified name; each has to map its last dimension, as linear modules do.
        batches: what the model takes; at most `num_batches` are read. Their gradients are averaged.
        num_batches: at least 1.
        blocks: the blocks to compute again in the backward.
        seed: of `A`.
        loss_function: `(model, batch) -> loss`, a scalar in nats.
        beside: contexts for the same forwards, such as `OutputNorms`.

    Raises:
        ValueError: there is no batch, a loss is no finite scalar, a gradient overflows float16, or none reaches a
            module.
    """
    matrices, sums = FirstMatrices(seed), GradientSums(LossScale(model))
    watches = [
        ModuleProbe(name, target, matrices, sums).watching(model.get_submodule(name))
        for name, target in targets.items()
    ]
    given = take_batches(batches, num_batches, seed)
    run_passes(model, watches, given, blocks=blocks, seed=seed, loss_function=loss_function, sums=sums, beside=beside)
    summed = sums.take()
    found = {name: mean_gradient(summed.get(name), target, len(given)) for name, target in targets.items()}
    if not any(gradient.squared_norm for gradient in found.values()):
        raise ValueError(
            f"The loss has no gradient by any of the {len(found)} modules that the adapters would be put on: give "
            "batches whose labels are not all ignored, and a loss_function that keeps the graph of the model."
        )
    return found


def take_batches(batches: Iterable[Mapping[str, Any]], num_batches: int, seed: int = 0) -> list[Mapping[str, Any]]:
    """The first `num_batches` batches, or fewer where there are fewer.

    A loader that shuffles draws its order from `seed` and the rank: the same batches each time, and the global random
    state is as before.

    Raises:
        ValueError: there is none, or they are no batches.
    """
    if isinstance(batches, (str, bytes, Mapping)) or not isinstance(batches, Iterable):
        raise ValueError(
            f"batches is a {type(batches).__name__}: give what a training loop would iterate over, such as a "
            "DataLoader, or a list of batches."
        )
    if isinstance(batches, DataLoader):
        batches = with_own_iteration(batches)
    key = keyed_seed(seed, "batches", current_ranks().rank)
    collate = getattr(batches, "collate_fn", None)
    with private_randomness(key), private_state(collate, key, readers_of(batches)):
        given = list(islice(batches, num_batches))
    if not given:
        raise ValueError("batches gave no batch: importance is measured on at least one, so give at least one.")
    if is_row(given[0]):
        raise ValueError(
            "batches gave a row and not a batch: give tokenised rows that are collated into tensors, such as "
            "DataLoader(rows, batch_size=4, collate_fn=…) with the Trainer's data_collator, or "
            "trainer.get_train_dataloader()."
        )
    return given


def is_row(batch: Any) -> bool:
    """Whether this is a text, or a row of token ids that no collator has made a tensor with a dimension for rows."""
    if isinstance(batch, str):
        return True
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return ids is not None and not (isinstance(ids, Tensor) and ids.ndim > 1)


class FirstMatrices:
    """Draws LoRA's `A`, once for each width and rank.

    Args:
        seed: of the draws; they do not depend on their order.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._drawn: dict[tuple[Any, ...], Tensor] = {}

    def like(self, inputs: Tensor, rank: int) -> Tensor:
        """`A` of shape `[rank, in]`, in the precision and on the device of inputs `[…, in]`."""
        width = inputs.shape[-1]
        key = (width, rank, inputs.dtype, inputs.device)
        if key not in self._drawn:
            bound = 1 / math.sqrt(width)
            generator = keyed_generator(self._seed, "probe", width)
            matrix = torch.empty(rank, width).uniform_(-bound, bound, generator=generator)
            self._drawn[key] = matrix.to(device=inputs.device, dtype=inputs.dtype)
        return self._drawn[key]


class ModuleProbe:
    """Adds up `gᵀ(x Aᵀ)` of one module over the batches.

    Args:
        name: of the module, for messages.
        target: what its adapter would be.
        matrices: where `A` comes from.
        sums: what is added to.
    """

    def __init__(self, name: str, target: Target, matrices: FirstMatrices, sums: GradientSums) -> None:
        self._name = name
        self._target = target
        self._matrices = matrices
        self._sums = sums

    def watching(self, module: nn.Module) -> AbstractContextManager[None]:
        """Within the context the gradients that pass through `module` are added up."""
        return watching(module, self._name, self._project, self._add, self._sums.scale)

    def _project(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self._matrices.like(inputs, self._target.rank))

    def _add(self, gradient: Tensor, projected: Tensor) -> None:
        self._sums.add(self._name, gradient.T @ projected)


def mean_gradient(summed: Tensor | None, target: Target, num_batches: int) -> ModuleGradient:
    """The gradient of the mean loss, from the sum over the batches of those without LoRA's factor; 0 without one."""
    if summed is None:
        return ModuleGradient(0.0, 0.0)
    gradient = summed.double() * (target.scaling / num_batches)
    return ModuleGradient(gradient.square().sum().item(), gradient.abs().sum().item())
