"""Forward and backward passes that watch modules of a model whose weights stay as they are.

A watch on a module takes its inputs `x` in the forward and the gradient `g` of its outputs in the backward, from which
any product of the weight's gradient `G = gᵀx`, `[out, in]`, can be made without the memory for `G` itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..runtime.modes import evaluation_mode
from ..runtime.randomness import private_randomness
from ..runtime.sharding import compute_device
from ..step.prefetch import ending_at
from .loss_scale import GradientSums, LossScale
from .repeats import repeatable_loss
from .suppression import LossFunction, check_scalar

__all__ = ["run_passes", "watching", "without_gradients"]


def run_passes(
    model: nn.Module,
    watches: Sequence[AbstractContextManager[Any]],
    batches: Sequence[Mapping[str, Any]],
    *,
    blocks: Sequence[nn.Module],
    seed: int,
    loss_function: LossFunction,
    sums: GradientSums,
    beside: Sequence[AbstractContextManager[Any]] = (),
) -> None:
    """One forward and one backward a batch within the contexts `watches`; nothing of the model changes.

    A batch of a model that computes in float16 is computed again where the loss was multiplied by too much.

    The weights, flags, mode and hooks of the model are as before afterwards, also after an exception, and the global
    random state is not touched.

    Args:
        model: any model. Evaluation mode is on: no dropout.
        watches: contexts that watch modules, see `watching`.
        batches: what the model takes.
        blocks: the blocks to compute again in the backward, so that only one of them keeps its activations at a time;
            the backward ends at the first.
        seed: of what the model draws.
        loss_function: `(model, batch) -> loss`, a scalar in nats.
        sums: what the watches add to, by whose scale the loss is multiplied.
        beside: contexts that see one forward of each batch, such as `OutputNorms`.

    Raises:
        ValueError: a loss is no finite scalar, or a gradient overflows float16.
    """
    device = compute_device(model)
    with ExitStack() as stack:
        stack.enter_context(private_randomness(seed, device))
        stack.enter_context(evaluation_mode(model))
        stack.enter_context(without_gradients(model))
        stack.enter_context(recomputed(blocks))
        if blocks:
            stack.enter_context(ending_at(model, blocks[0]))
        for watch in watches:
            stack.enter_context(watch)
        stack.enter_context(torch.enable_grad())
        for number, given in enumerate(batches):
            compute = repeatable_loss(model, given, number, loss_function)
            with ExitStack() as forward:
                for context in beside:
                    forward.enter_context(context)
                loss = compute()
            if not math.isfinite(check_scalar(loss).item()):
                raise ValueError(
                    f"The loss of probe batch {number} is {loss.item()}, so no gradient can be measured. "
                    "Look at the batch (labels that are all ignored give NaN), or give other batches."
                )
            while loss.requires_grad and not sums.backward(loss, number):
                loss = compute()


@contextmanager
def watching(
    module: nn.Module,
    name: str,
    keep: Callable[[Tensor], Tensor],
    add: Callable[[Tensor, Tensor], None],
    scale: LossScale,
) -> Iterator[None]:
    """Within the context every backward through `module` hands its gradient to `add`.

    Args:
        module: it has to map the last dimension of its inputs, as linear modules do.
        name: of the module, for messages.
        keep: what to keep of inputs `[…, in]` until the backward.
        add: takes the gradient of the outputs, `[tokens, out]` in float32, and what was kept, `[tokens, …]` likewise.
        scale: of the loss, which the gradient is divided by.
    """

    def watch(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not torch.is_grad_enabled():
            return output
        inputs = args[0] if args else None
        if not (isinstance(inputs, Tensor) and inputs.is_floating_point() and isinstance(output, Tensor)):
            raise ValueError(
                f"{name} ({type(module).__name__}) does not map a tensor of floats to another, so its gradient "
                "cannot be measured: choose layers by criterion='activation' or spread='even', or leave it out of "
                "target_modules."
            )
        scale.see(output)
        with torch.no_grad():
            kept = keep(inputs.detach())
        anchor = torch.ones((), device=output.device, requires_grad=True)
        return PassThrough.apply(output, kept, anchor, add, scale)

    handle = module.register_forward_hook(watch)
    try:
        yield
    finally:
        handle.remove()


class PassThrough(torch.autograd.Function):
    """The identity of a module's output; in the backward, its gradient is handed to a watch."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        output: Tensor,
        kept: Tensor,
        anchor: Tensor,
        add: Callable[[Tensor, Tensor], None],
        scale: LossScale,
    ) -> Tensor:
        """Args: output `[…, out]`, what is kept of the inputs, a tensor that requires a gradient, watch and scale."""
        ctx.save_for_backward(kept)
        ctx.add, ctx.scale = add, scale
        return output.clone()  # Not a view, which models that change it in place (OLMo clamps) could not have.

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        """Hand on the gradient."""
        (kept,) = ctx.saved_tensors
        with torch.autocast(gradient.device.type, enabled=False):  # Sums over tokens in float32.
            own = gradient.flatten(0, -2).float()
            ctx.add(own / ctx.scale.value if ctx.scale.used else own, kept.flatten(0, -2).float())
        return gradient, None, None, None, None


@contextmanager
def without_gradients(model: nn.Module) -> Iterator[None]:
    """Within the context no parameter requires a gradient; afterwards each does as before."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad = False
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad = True


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context blocks keep their inputs alone and compute again in the backward."""
    before = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block in blocks:
            block.__dict__["forward"] = partial(checkpoint, block.forward, use_reentrant=False)
        yield
    finally:
        for block, own in before:
            if own is None:
                block.__dict__.pop("forward", None)
            else:
                block.__dict__["forward"] = own
