"""What happens to the optimizer's moments of a layer while it is frozen.

A frozen layer's adapters have no gradient, so the optimizer passes them by and their moments wait (`keep`). They can be
forgotten instead (`reset`: the layer starts afresh when its turn comes, with AdamW's bias correction), or wait in the
host's memory (`offload`): three quarters of the moments of AdamW leave the GPU. They travel on a stream of their own
beside the forward and backward, from and to pinned memory, and the optimizer's step waits for those that it needs, so
that training is the same to the bit.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.layers import Layer
from ..adapters.view import ModelView
from ..runtime.part import Part

__all__ = ["OptimizerState", "weak"]

SMALLEST = 1024
"""Elements from which on a tensor is worth a journey: step counts and the tables of 8-bit optimizers stay."""


class OptimizerState(Part):
    """Forgets or moves the moments of frozen layers.

    Which moments are where is read from the optimizer at each step, so that it may load a checkpoint at any time.

    Args:
        optimizer: of torch's kind, unwrapped; it is its owner's to free.
        view: the model in training.
        mode: `keep`, `reset` or `offload`; `offload` does nothing for weights on the CPU.

    Raises:
        ValueError: `offload` of weights that are sharded.
    """

    def __init__(self, optimizer: Any, view: ModelView, mode: str) -> None:
        if mode == "offload" and view.sharded:
            raise ValueError(
                "optimizer_state='offload' does not go with weights that FSDP shards, whose moments are shards: leave "
                "it 'keep', and let FSDP offload (cpu_offload, fsdp_offload_params) where memory is short."
            )
        self._layers = view.layers
        self._mode = mode
        self._pinned: dict[tuple[nn.Parameter, str], Tensor] = {}
        self._stream: Any = None
        self._optimizer = weak(optimizer)
        self._handles: list[Any] = []
        if mode == "offload":
            self._handles = [
                optimizer.register_step_pre_hook(lambda *_: self._before_step()),
                optimizer.register_state_dict_pre_hook(lambda *_: self._wait()),
            ]

    def begin(self, active: Collection[int], step: int = 0) -> None:
        """The next step trains the layers `active`: see to the moments of all others, and have theirs come back."""
        optimizer = self._optimizer()
        if self._mode == "keep" or optimizer is None:
            return
        frozen = parameters_of(layer for layer in self._layers if layer.index not in active)
        if self._mode == "reset":
            for parameter in frozen:
                optimizer.state.pop(parameter, None)
            return
        self._move(frozen, away=True)
        self._move(parameters_of(layer for layer in self._layers if layer.index in active), away=False)

    def close(self) -> None:
        """Have everything come back and let the optimizer alone."""
        for handle in self._handles:
            handle.remove()
        if self._handles:
            self._move(parameters_of(self._layers), away=False)
            self._wait()
        self._handles = []
        self._pinned.clear()

    def _before_step(self) -> None:
        """What has a gradient is about to be updated: its moments must be there."""
        self._move((p for p in parameters_of(self._layers) if p.grad is not None), away=False)
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)

    def _wait(self) -> None:
        """Until nothing is on its way; the host may read its memory then."""
        if self._stream is not None:
            self._stream.synchronize()

    def _move(self, parameters: Iterable[nn.Parameter], away: bool) -> None:
        """Begin to move moments to the host, or to where their parameters are."""
        if (optimizer := self._optimizer()) is None:
            return
        journeys = [
            (parameter, name, moment)
            for parameter in parameters
            if parameter.is_cuda
            for name, moment in optimizer.state.get(parameter, {}).items()
            if isinstance(moment, Tensor) and moment.is_cuda == away and moment.numel() >= SMALLEST
            if not getattr(moment, "is_paged", False)  # bitsandbytes' paged optimizers move theirs by themselves.
        ]
        if not journeys:
            return
        device = journeys[0][0].device
        current = torch.cuda.current_stream(device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        # Also what makes the stream's own memory safe to use again: the last optimizer step has been waited for.
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for parameter, name, moment in journeys:
                if away:
                    optimizer.state[parameter][name] = self._to_host(parameter, name, moment)
                    moment.record_stream(self._stream)
                else:
                    moved = moment.to(device, non_blocking=True)
                    moved.record_stream(current)
                    optimizer.state[parameter][name] = moved

    def _to_host(self, parameter: nn.Parameter, name: str, moment: Tensor) -> Tensor:
        """A copy in pinned memory, which is taken once for each moment."""
        pinned = self._pinned.get((parameter, name))
        if pinned is None or pinned.shape != moment.shape or pinned.dtype != moment.dtype:
            pinned = torch.empty_like(moment, device="cpu", pin_memory=True)
            self._pinned[parameter, name] = pinned
        return pinned.copy_(moment, non_blocking=True)


def parameters_of(layers: Iterable[Layer]) -> Iterator[nn.Parameter]:
    """The parameters of layers that train."""
    return (parameter for layer in layers for parameter in layer.parameters)


def weak(optimizer: Any) -> Callable[[], Any]:
    """Gives an optimizer back, or None where it is gone; one of a kind that has no weak references is held."""
    try:
        return weakref.ref(optimizer)
    except TypeError:
        return lambda: optimizer
