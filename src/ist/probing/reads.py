"""Which adapters are read by another tool's forward, instead of called.

Whether an adapter was called does not tell: an expert that no token is routed to calls none and reads none. So the
weights of the adapters that may be read note it when something takes them from their modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..adapters.layers import Layer
from ..step.readers import adapter_readers

__all__ = ["Reads", "watched_reads"]

Reads = dict[nn.Module, tuple[Layer, nn.Module]]
"""Adapters that were read past their own forward, each with its layer and the module that reads it."""


class NotingDict(dict[str, Any]):
    """The parameters of a module, which call a function where they are looked up."""

    def __init__(self, own: dict[str, Any], note: Callable[[], None]) -> None:
        super().__init__(own)
        self._note = note

    def __getitem__(self, name: str) -> Any:
        self._note()
        return super().__getitem__(name)

    def items(self) -> Any:
        """As of any dict."""
        self._note()
        return super().items()

    def values(self) -> Any:
        """As of any dict."""
        self._note()
        return super().values()


@contextmanager
def watched_reads(adapters: Iterable[tuple[Layer, nn.Module]]) -> Iterator[Reads]:
    """Within the context, what reads the weights of adapters past their forward is noted; nothing is left afterwards.

    Only adapters in a module whose forward another tool has replaced are watched; reading one's base layer is no read.

    Args:
        adapters: each with its layer.

    Yields:
        What has been read so far.
    """
    found: Reads = {}
    computing: set[nn.Module] = set()
    handles: list[Any] = []
    replaced: list[tuple[nn.Module, dict[str, Any], NotingDict]] = []

    def watch(layer: Layer, reader: nn.Module, adapter: nn.Module) -> None:
        def note() -> None:
            if adapter not in computing:
                found.setdefault(adapter, (layer, reader))

        handles.append(adapter.register_forward_pre_hook(lambda *_: computing.add(adapter)))
        handles.append(adapter.register_forward_hook(lambda *_: computing.discard(adapter), always_call=True))
        base = getattr(adapter, "base_layer", None)
        below = set() if base is None else set(base.modules())
        for part in adapter.modules():
            if part not in below and part._parameters:
                own = part._parameters
                noting = NotingDict(own, note)
                part.__dict__["_parameters"] = noting
                replaced.append((part, own, noting))

    try:
        readers: dict[int, list[nn.Module]] = {}
        for layer, adapter in adapters:
            if layer.index not in readers:
                readers[layer.index] = adapter_readers(layer)
            holding = [one for one in readers[layer.index] if any(module is adapter for module in one.modules())]
            if holding:
                watch(layer, holding[-1], adapter)
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for part, own, noting in reversed(replaced):
            now = dict(noting)  # An engine may have put others in their places.
            own.clear()
            own.update(now)
            part.__dict__["_parameters"] = own
