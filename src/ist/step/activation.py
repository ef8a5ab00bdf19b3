"""Train the adapters of the active layers only, or all weights of the active layers.

A frozen layer's adapters are frozen while they compute, and at no other time: around the forward of each adapter module
`requires_grad` goes off and comes back. The graph that autograd records then holds no frozen parameter, so its gradient
stays `None`, nothing is saved for it, and an optimizer passes it by, weight decay and momentum included. Outside of
the adapters' own forward the model is as PEFT made it, whatever happens: after an exception, in a checkpoint that
another callback writes, for `disable_adapter()` or `set_adapter()` in the middle of a step. Activation checkpointing
works too, since its recomputation calls the same modules again.

Where a gradient reaches a frozen parameter all the same (zeros from DistributedDataParallel, a penalty on the weights),
it is dropped before an optimizer's step.

Where another tool has replaced the forward of a module that holds adapters, which may read their weights instead of
calling them (`ist.step.readers`), they are frozen around that forward as well.

Layers that train whole are frozen alike, around the forward of each part of their blocks.

Fused LoRA modules (`ist.step.fused`) take care of the same by themselves, and save more.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple

from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..adapters.view import ModelView
from ..adapters.whole_layers import computing_parts
from ..runtime.part import Part
from .fused import FusedLora, Switch, reason_against
from .gates import AdapterGate, make_gates, remove_earlier_gates, share_switch
from .readers import adapter_readers

__all__ = ["LayerActivation"]


class LayerActivation(Part):
    """Which layers of a model train. Until `begin` is called, all do.

    The hooks go when `close` is called, and at the latest with this object.

    Args:
        view: the model in training. AdaLoRA's model computes with the adapters' weights itself, for its orthogonality
            loss: frozen layers are frozen during its whole forward.
        fused: whether LoRA modules are fused where they can be.
        frozen_dropout: whether those of frozen layers keep the dropout of their adapters.
        norms: whether those of active layers make outputs of Liger's RMSNorm again instead of keeping them.
    """

    def __init__(
        self,
        view: ModelView,
        fused: bool = True,
        frozen_dropout: bool = False,
        norms: bool = False,
    ) -> None:
        layers = view.layers
        readers: Sequence[nn.Module] = () if view.adalora is None else (view.adalora,)
        self._never_fused: Counter[str] = Counter()
        """How many adapter modules were not fused, by reason."""
        self._active: tuple[int, ...] | None = None
        self._trained = {layer.index for layer in layers}
        """Indices of the layers that may hold gradients: those that trained last, or all."""
        self._idle: list[Sequence[nn.Parameter]] = []
        """The parameters of each frozen layer."""
        self._gates: list[AdapterGate | FusedLora] = []
        self._fused_switches: list[Switch] = []
        self._parts: list[LayerParts] = []
        for module in (*readers, *(layer.module for layer in layers)):
            remove_earlier_gates(module)
        for layer in layers:
            own = {id(parameter) for parameter in layer.parameters}
            gates: list[AdapterGate] = [gate for reader in readers for gate in make_gates(reader, own)]
            for reader in adapter_readers(layer):
                gates += make_gates(reader, own)
            for part, weights in computing_parts(layer.module) if not layer.adapters else ():
                gates += make_gates(part, own & weights)
            one, fused_modules = Switch(), []
            for adapter in layer.adapters.values():
                reason = reason_against(adapter, own) if fused else "switched off"
                if reason is None:
                    (gate,) = make_gates(adapter, own, hooked=False)
                    self._gates.append(gate)
                    names = trained_adapters(adapter, own)
                    fused_modules.append(FusedLora(adapter, gate, frozen_dropout, not view.sharded, one, names, norms))
                else:
                    gates += make_gates(adapter, own)
                    self._never_fused[reason] += 1
            if fused_modules:
                self._fused_switches.append(one)
            switches = [*([one] if fused_modules else []), *([share_switch(gates)] if gates else [])]
            self._parts.append(LayerParts(layer.index, switches, fused_modules, layer.parameters))
            self._gates += [*gates, *fused_modules]
        self._remove_hooks = weakref.finalize(self, remove_all, self._gates, drop_before_steps(self))

    @property
    def num_fused(self) -> int:
        """How many adapter modules are fused now: a hook that a user puts on their parts later counts too."""
        return sum(module.reason_against() is None for part in self._parts for module in part.fused)

    @property
    def not_fused(self) -> Counter[str]:
        """How many compute as PEFT has them, by reason."""
        later = (module.reason_against() for part in self._parts for module in part.fused)
        return self._never_fused + Counter(reason for reason in later if reason is not None)

    @property
    def active(self) -> tuple[int, ...] | None:
        """Indices of the active layers in ascending order, or None while all train."""
        return self._active

    def begin(self, active: Collection[int], step: int = 0) -> None:
        """From now on train the layers `active` only.

        Gradients that layers hold from when they trained last are dropped, since they would count once more, for a norm
        to clip by and for an optimizer. What was prepared of frozen matrices is forgotten, since nothing tells of each
        write to them: merging and resetting adapters, pruning and limits on norms go through `.data`.
        """
        chosen = set(active)
        self._idle = []
        self._forget_pairs()
        for number, switches, _, parameters in self._parts:
            frozen = number not in chosen
            for switch in switches:
                switch.frozen = frozen
            if not frozen:
                continue
            self._idle.append(parameters)
            if number in self._trained:
                for parameter in parameters:
                    parameter.grad = None
        self._active, self._trained = tuple(sorted(chosen)), chosen

    def end(self) -> None:
        """From now on train every layer."""
        self._active = None
        self._idle = []
        self._forget_pairs()
        for part in self._parts:
            for switch in part.switches:
                switch.frozen = False

    def give_up(self) -> None:
        """Train every layer, also what a forward that Ctrl-C ended left frozen."""
        self.end()
        for gate in self._gates:
            if isinstance(gate, AdapterGate):
                gate.thaw()

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Between steps, while nothing is learned from: LoRA modules compute as frozen ones do, which is faster."""
        try:
            self._forget_pairs()
            for switch in self._fused_switches:
                switch.frozen = True
            yield
        finally:
            self._forget_pairs()
            for switch in self._fused_switches:
                switch.frozen = False

    def _forget_pairs(self) -> None:
        for switch in self._fused_switches:
            switch.pairs.clear()

    def frozen_parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that the current step leaves alone."""
        return tuple(chain.from_iterable(self._idle))

    def frozen_ids(self) -> set[int]:
        """The ids of those parameters."""
        return set(map(id, self.frozen_parameters()))

    def before_update(self) -> None:
        """Drop gradients that reached frozen parameters past their forward; torch's optimizers call it first."""
        for parameter in chain.from_iterable(self._idle):
            parameter.grad = None

    def close(self) -> None:
        """Take every hook off the model again."""
        self.end()
        self._remove_hooks()


class LayerParts(NamedTuple):
    """What is switched in a layer. That is done at every step, so nothing of it is searched for."""

    number: int
    """The layer's index."""
    switches: list[Switch]
    fused: list[FusedLora]
    """Fused LoRA modules."""
    parameters: Sequence[nn.Parameter]


def trained_adapters(module: Any, own: Collection[int]) -> list[str]:
    """The names of the adapters of a LoRA module that have parameters among `own`."""
    return [name for name, part in module.lora_A.items() if any(id(weight) in own for weight in part.parameters())]


def drop_before_steps(activation: LayerActivation) -> Any:
    """Have every optimizer's step drop the gradients of frozen layers first, in whatever loop it is called.

    Returns:
        A handle whose `remove` ends that.
    """
    reference = weakref.ref(activation)

    def drop(*_: Any) -> None:
        if alive := reference():
            alive.before_update()

    return register_optimizer_step_pre_hook(drop)


def remove_all(gates: Iterable[AdapterGate | FusedLora], step_hook: Any) -> None:
    """Remove the gates of all layers and the hook on optimizers."""
    step_hook.remove()
    for gate in gates:
        gate.remove()
