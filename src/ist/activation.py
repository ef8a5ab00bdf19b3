"""Train the adapters of the active layers only.

An idle layer's adapters are frozen while they compute, and at no other time: around the forward of each adapter module
`requires_grad` goes off and comes back. The graph that autograd records then holds no idle parameter, so its gradient
stays `None`, nothing is saved for it, and an optimizer passes it by, weight decay and momentum included. Outside of
the adapters' own forward the model is as PEFT made it, whatever happens: after an exception, in a checkpoint that
another callback writes, for `disable_adapter()` or `set_adapter()` in the middle of a step. Activation checkpointing
works too, since its recomputation calls the same modules again.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn

from .layers import Layer

__all__ = ["LayerActivation"]


class LayerActivation:
    """Which layers of a model train. Until `activate` is called, all do.

    The hooks go when `close` is called, and at the latest with this object.

    Args:
        layers: the layers that `discover_layers` found.
        readers: modules around the layers that compute with the adapters' weights themselves, as AdaLoRA's model does
            for its orthogonality loss: idle layers are frozen during their whole forward.
    """

    def __init__(self, layers: Sequence[Layer], readers: Sequence[nn.Module] = ()) -> None:
        self._layers = layers
        self._active: tuple[int, ...] | None = None
        self._gates: list[list[AdapterGate]] = []
        for module in (*readers, *(adapter for layer in layers for adapter in layer.adapters.values())):
            remove_earlier_gates(module)
        for layer in layers:
            own = {id(parameter) for parameter in layer.parameters}
            self._gates.append([AdapterGate(module, own) for module in (*readers, *layer.adapters.values())])
        self._remove_hooks = weakref.finalize(self, remove_all, self._gates)

    @property
    def active(self) -> tuple[int, ...] | None:
        """Indices of the active layers in ascending order, or None while all train."""
        return self._active

    def activate(self, active: Collection[int]) -> None:
        """From now on train the layers `active` only.

        Gradients that idle layers hold from before are dropped, since an optimizer would move them once more.
        """
        self._active = tuple(sorted(active))
        for layer, gates in zip(self._layers, self._gates, strict=True):
            idle = layer.index not in active
            for gate in gates:
                gate.idle = idle
            if idle:
                for parameter in layer.parameters:
                    parameter.grad = None

    def activate_all(self) -> None:
        """From now on train every layer."""
        self._active = None
        for gates in self._gates:
            for gate in gates:
                gate.idle = False

    def drop_idle_gradients(self) -> None:
        """Drop what reached idle parameters past their adapters' forward, such as a loss on the weights themselves."""
        if self._active is not None:
            self.activate(self._active)

    def close(self) -> None:
        """Take every hook off the model again."""
        self.activate_all()
        self._remove_hooks()


class AdapterGate:
    """Keeps the parameters `own` of one module out of the graph while `idle`."""

    def __init__(self, adapter: nn.Module, own: set[int]) -> None:
        self.idle = False
        # Slots rather than parameters: sharding engines replace the parameter objects of a module.
        self._slots = [
            (module._parameters, name)
            for module in adapter.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) in own
        ]
        self._frozen: list[nn.Parameter] = []
        self._handles = (
            adapter.register_forward_pre_hook(self.freeze),
            adapter.register_forward_hook(self.thaw, always_call=True),
        )

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def freeze(self, *_: Any) -> None:
        """Before the forward: freeze what trains at this moment."""
        if self.idle:
            for parameters, name in self._slots:
                parameter = parameters[name]
                if parameter is not None and parameter.requires_grad:
                    parameter.requires_grad_(False)
                    self._frozen.append(parameter)

    def thaw(self, *_: Any) -> None:
        """After the forward, also after one that raised: undo `freeze`."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen.clear()


def remove_all(gates: Iterable[Iterable[AdapterGate]]) -> None:
    """Remove the gates of all layers."""
    for layer in gates:
        for gate in layer:
            gate.remove()


def remove_earlier_gates(adapter: nn.Module) -> None:
    """Remove the gate of a training that ended with an exception, which would freeze layers of this one."""
    for hook in list(adapter._forward_pre_hooks.values()):
        gate = getattr(hook, "__self__", None)
        if isinstance(gate, AdapterGate):
            gate.remove()
