"""DistributedDataParallel with layers that sit a step out.

DDP waits in each backward until every parameter has reported a gradient, and then averages them all over the ranks. A
frozen layer's parameters take no part in the graph, so with `find_unused_parameters=False` or `static_graph=True` DDP
would wait forever or fail. Here the outputs of the model's forward are tied to the frozen parameters by a function that
is the identity in the forward and has no gradient for them in the backward: they report at once, without one. Only the
gradients of the active layers then travel between the ranks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten  # DDP reads outputs by it too

from .hooks import WeakHook
from .part import Part

__all__ = ["ReducedGradients", "TiedOutputs"]

JOIN = (
    "DistributedDataParallel.join() lets a rank with less data end early, and IST needs every rank at every step: "
    "leave join() off, and give each rank the same number of batches (DistributedSampler with drop_last=True)."
)


class ReducedGradients:
    """Averages gradients over the ranks for DDP, those of the active layers only: a communication hook.

    Args:
        frozen: gives the ids of the parameters that the current step leaves alone.
    """

    def __init__(self, frozen: Callable[[], frozenset[int]]) -> None:
        self.frozen = frozen
        self.group: dist.ProcessGroup | None = None
        """DDP's processes."""
        self.num_bytes = 0
        """Sent by this rank into reductions so far, as DDP counts: each gradient once, however it travels."""
        self.num_bytes_all = 0
        """What would have been sent with every layer active."""

    def reduce(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Average the gradients of one bucket over the ranks."""
        frozen = self.frozen()
        buffer = bucket.buffer()
        pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
        active = [gradient for parameter, gradient in pairs if id(parameter) not in frozen]
        self.num_bytes_all += buffer.nbytes
        self.num_bytes += sum(gradient.nbytes for gradient in active)
        if not active:
            nothing: torch.futures.Future[Tensor] = torch.futures.Future()
            nothing.set_result(buffer)
            return nothing
        packed = buffer
        if sum(gradient.numel() for gradient in active) < buffer.numel():
            packed = torch.cat([gradient.flatten() for gradient in active])
        packed.div_(dist.get_world_size(self.group))
        work: Any = dist.all_reduce(packed, group=self.group, async_op=True)

        def unpack(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            reduced = future.value()[0]
            if packed is buffer:
                return reduced
            start = 0
            for gradient in active:
                gradient.copy_(reduced[start : start + gradient.numel()].view_as(gradient))
                start += gradient.numel()
            return buffer

        return work.get_future().then(unpack)


def reduce_bucket(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings.
    """What DDP calls for each bucket of gradients that is ready."""
    return state.reduce(bucket)


class TiedOutputs(Part):
    """Watches a model's forward, and where DDP called it has the frozen parameters report to DDP.

    Args:
        model: inside of DDP, now or later; without DDP nothing happens.
        frozen: gives the frozen parameters of the current step.
    """

    def __init__(self, model: nn.Module, frozen: Callable[[], Sequence[nn.Parameter]]) -> None:
        self._idle = frozen
        handle = model.register_forward_hook(WeakHook(self._tie))
        self._stop = weakref.finalize(self, handle.remove)
        self._wrapper: weakref.ref[DistributedDataParallel] | None = None
        self.reduced = ReducedGradients(lambda: frozenset(map(id, frozen())))

    def close(self) -> None:
        """Stop watching; DDP then averages all gradients."""
        self._stop()
        self.reduced.frozen = frozenset

    def _tie(self, model: nn.Module, args: Any, outputs: Any) -> Any:
        wrapper = DistributedDataParallel._get_active_ddp_module()
        if wrapper is None or not torch.is_grad_enabled():
            return None
        if wrapper._join_config.enable:
            raise ValueError(JOIN)
        if self._wrapper is None or self._wrapper() is not wrapper:
            self._wrapper = weakref.ref(wrapper)
            self._take_over_reduction(wrapper)
        if wrapper.find_unused_parameters and not wrapper.static_graph:
            return None  # DDP itself finds the frozen ones.
        frozen = self._idle()
        return tie(outputs, frozen, zeros=wrapper.static_graph) if frozen else None

    def _take_over_reduction(self, wrapper: DistributedDataParallel) -> None:
        """Average active gradients only, unless the user has a communication hook, which then averages all."""
        for _, state in wrapper._comm_hooks:
            if isinstance(state, ReducedGradients):  # of an earlier training with this wrapper
                state.frozen = self.reduced.frozen
                self.reduced = state
        self.reduced.group = wrapper.process_group
        if not wrapper._comm_hooks:
            wrapper.register_comm_hook(self.reduced, reduce_bucket)


def tie(outputs: Any, parameters: Sequence[nn.Parameter], zeros: bool = False) -> Any:
    """The same outputs, whose backward also reaches `parameters`.

    Args:
        outputs: tensors in nested tuples, lists, mappings or transformers' `ModelOutput`.
        parameters: get no gradient, but autograd runs the hooks on their accumulation.
        zeros: give them a gradient of zeros, by which a static graph learns that they exist. Those with hooks of their
            own always get one, since such hooks (as OSF's) compute with it.
    """
    leaves, structure = tree_flatten(outputs)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
    tied = Tie.apply(len(places), zeros, *(leaves[place] for place in places), *parameters)
    for place, tensor in zip(places, tied or (), strict=True):
        leaves[place] = tensor
    return tree_unflatten(leaves, structure)


class Tie(torch.autograd.Function):
    """The identity for the first `num_outputs` tensors, and nothing for the parameters after them."""

    @staticmethod
    def forward(ctx: Any, num_outputs: int, zeros: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        hooked = (bool(p._backward_hooks) for p in tensors[num_outputs:])
        ctx.shapes = [
            (p.shape, p.dtype, p.device) if zeros or own else None
            for p, own in zip(tensors[num_outputs:], hooked, strict=True)
        ]
        # Detached tensors share storage and version: no copy, and changes in place are allowed and noticed.
        return tuple(tensor.detach() for tensor in tensors[:num_outputs])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        nothing = [
            None if given is None else torch.zeros((), dtype=given[1], device=given[2]).expand(given[0])
            for given in ctx.shapes
        ]
        return (None, None, *gradients, *nothing)
