"""The size of what each layer puts out: the mean norm of a token's output, in forwards of one's own or in a probe's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.modes import evaluation_mode, to_device
from ..runtime.randomness import private_randomness
from ..runtime.sharding import compute_device
from .gradients import take_batches
from .repeats import with_own_batch
from .suppression import LossFunction, model_loss

__all__ = ["OutputNorms", "output_norms"]


class OutputNorms:
    """Within the context every forward through a block adds its output to the mean norm of its tokens.

    Padding counts for none, where the model is given an `attention_mask` `[rows, tokens]`; in models of two stacks,
    whose masks are of one of them, all tokens count.

    Args:
        model: it holds the blocks.
        blocks: modules that return a tensor `[…, width]`, or something whose first value is one.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self._model, self._blocks = model, blocks
        self._mask: Tensor | None = None
        self._sums = [0.0] * len(blocks)
        self._counts = [0] * len(blocks)

    def __enter__(self) -> OutputNorms:
        self._hooks = ExitStack()
        self._hooks.callback(self._model.register_forward_pre_hook(self._see_mask, with_kwargs=True).remove)
        for index, block in enumerate(self._blocks):
            self._hooks.callback(block.register_forward_hook(partial(self._add, index)).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def means(self) -> list[float]:
        """The mean norm of a token's output of each block so far; 0 of a block that has not run."""
        return [total / max(count, 1) for total, count in zip(self._sums, self._counts, strict=True)]

    def _see_mask(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        two_stacks = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self._mask = mask.bool() if isinstance(mask, Tensor) and not two_stacks else None

    @torch.no_grad()
    def _add(self, index: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        norms = hidden_states(block, output).float().norm(dim=-1)
        if self._mask is not None and self._mask.shape == norms.shape:
            norms = norms[self._mask.to(norms.device)]
        self._sums[index] += norms.double().sum().item()
        self._counts[index] += norms.numel()


def hidden_states(block: nn.Module, output: Any) -> Tensor:
    """The tensor in what a block returns: itself, or the first value.

    Raises:
        ValueError: it is none.
    """
    several = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else None
    hidden = output if several is None else next(iter(several), None)
    if not isinstance(hidden, Tensor):
        raise ValueError(
            f"A layer ({type(block).__name__}) returns a {type(hidden).__name__} where its output is expected, whose "
            "size cannot be measured: it should return a tensor, alone or first; or choose criterion='gradient'."
        )
    return hidden


@torch.no_grad()
def output_norms(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Iterable[Mapping[str, Any]],
    *,
    num_batches: int = 4,
    loss_function: LossFunction = model_loss,
    seed: int = 0,
) -> list[float]:
    """The mean norm of a token's output of each block, over at most `num_batches` batches; no backward.

    `seed` is of what a loader, the model and its loss draw; the global random state is not touched.

    Raises:
        ValueError: as `adapter_gradients`, or a block returns no tensor.
    """
    device = compute_device(model)
    given = take_batches(batches, num_batches, seed)
    norms = OutputNorms(model, blocks)
    with private_randomness(seed, device), norms, evaluation_mode(model):
        for batch in given:
            with_own_batch(loss_function)(model, to_device(batch, device))
    return norms.means()
