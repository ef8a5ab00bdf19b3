"""Gates: parameters that are kept out of the graph while a module computes, and at no other time.

Around the forward of a module `requires_grad` of its parameters goes off and comes back. Outside of that forward the
model is as PEFT made it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..runtime.sharding import inner_units
from .fused import Switch, remove_fused

__all__ = ["AdapterGate", "make_gates", "remove_earlier_gates", "share_switch"]

Slot = tuple[nn.Module, str]
"""A module and the name that it knows one of its parameters by: sharding engines replace the parameter objects."""


class AdapterGate:
    """Keeps the parameters in `slots` out of the graph during the forward of `module`, while its `switch` says frozen.

    Also a context manager, which does so whether frozen or not.
    """

    def __init__(self, module: nn.Module, slots: Sequence[Slot], hooked: bool = True) -> None:
        self.switch = Switch()
        self._slots = slots
        self._frozen: list[Tensor] = []
        self._hidden: list[tuple[dict[str, Any], str, Tensor]] = []
        self._handles = ()
        if hooked:
            self._handles = (
                module.register_forward_pre_hook(self.freeze_if_frozen),
                module.register_forward_hook(self.thaw, always_call=True),
            )

    def remove(self) -> None:
        """Stop watching, and thaw what a forward that Ctrl-C ended left frozen: torch runs no hook after it."""
        for handle in self._handles:
            handle.remove()
        self.thaw()

    def freeze_if_frozen(self, *_: Any) -> None:
        """Before the forward: freeze what trains at this moment."""
        if self.switch.frozen:
            self.__enter__()

    def __enter__(self) -> None:
        for module, name in self._slots:
            holder = module.__dict__ if name in module.__dict__ else module._parameters
            weight = holder.get(name)
            if weight is None or not weight.requires_grad:
                continue
            if weight.is_leaf:
                weight.requires_grad_(False)
                self._frozen.append(weight)
            else:  # FSDP1 computes with views into its flat parameter.
                holder[name] = weight.detach()  # type: ignore[assignment]
                self._hidden.append((holder, name, weight))

    def thaw(self, *_: Any) -> None:
        """After the forward, also after one that raised: undo it."""
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        for holder, name, weight in self._hidden:
            holder[name] = weight
        self._frozen.clear()
        self._hidden.clear()

    def __exit__(self, *exception: object) -> None:
        self.thaw()


def make_gates(adapter: nn.Module, own: set[int], hooked: bool = True) -> Iterator[AdapterGate]:
    """The gates that keep the parameters `own` of an adapter out of the graph.

    One, unless FSDP gathers a part of the adapter by itself: the weights that compute are there only during the
    forward of that part, which then has a gate too.
    """
    slots: dict[nn.Module, list[Slot]] = {adapter: []}
    find_slots(adapter, adapter, inner_units(adapter), own, slots)
    return (AdapterGate(module, module_slots, hooked) for module, module_slots in slots.items())


def find_slots(
    module: nn.Module, gate: nn.Module, units: Collection[nn.Module], own: set[int], slots: dict[nn.Module, list[Slot]]
) -> None:
    """Put the parameters `own` of a module under its gate: the unit that gathers them, or the one of the module above.

    A function of its own: one inside of `make_gates` that called itself would keep the modules alive until the next
    collection of garbage.
    """
    gate = module if module in units else gate
    for name, parameter in module.named_parameters(recurse=False):
        if id(parameter) in own:
            slots.setdefault(gate, []).append((module, name))
    for child in module.children():
        find_slots(child, gate, units, own, slots)


def share_switch(gates: Sequence[AdapterGate]) -> Switch:
    """One switch for gates that are frozen together."""
    switch = Switch()
    for gate in gates:
        gate.switch = switch
    return switch


def remove_earlier_gates(adapter: nn.Module) -> None:
    """Remove the gates of a training that ended with an exception, which would freeze layers of this one."""
    for module in adapter.modules():
        remove_fused(module)
        for hook in list(module._forward_pre_hooks.values()):
            gate = getattr(hook, "__self__", None)
            if isinstance(gate, AdapterGate):
                gate.remove()
