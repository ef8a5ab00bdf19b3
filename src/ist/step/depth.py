"""The backward goes no deeper than the lowest active layer.

By itself autograd stops there: nothing below needs a gradient. But for gradient checkpointing the Trainer, TRL and PEFT
call `enable_input_require_grads`, whose hook on the input embeddings asks for a gradient that nobody reads, and the
backward, with all its recomputation, goes down to the embeddings. Only reentrant checkpointing needs that.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from ..adapters.view import ModelView
from ..runtime.hooks import WeakHook
from ..runtime.part import Part
from .activation import LayerActivation

__all__ = ["BackwardDepth"]


class BackwardDepth(Part):
    """Takes back what `enable_input_require_grads` asks for, while layers are being chosen.

    An output of the embeddings that is a leaf of the graph has no trainable weights behind it, so that its gradient
    is nobody's; where embeddings train, or something is added to them, it is none, and stays as it is.

    Args:
        view: the model in training.
        activation: knows whether a step with chosen layers is under way.
    """

    def __init__(self, view: ModelView, activation: LayerActivation) -> None:
        self._blocks = [layer.module for layer in view.layers]
        self._activation = activation
        self._handles: dict[nn.Module, Any] = {}
        self._embeddings = list(input_embeddings(view.model))
        self._remove = weakref.finalize(self, remove_hooks, self._handles)

    def begin(self, active: Collection[int], step: int) -> None:
        """Before a step: stand behind every other hook on the embeddings."""
        for module in self._embeddings:
            handle = self._handles.get(module)
            if handle is not None and next(reversed(module._forward_hooks), None) == handle.id:
                continue
            if handle is not None:
                handle.remove()
            self._handles[module] = module.register_forward_hook(WeakHook(self.cut))

    def cut(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        """The embeddings' output, without a gradient that nobody reads."""
        if self._activation.active is None or not isinstance(output, Tensor):
            return None
        if not (output.requires_grad and output.is_leaf) or any(map(recomputes_reentrantly, self._blocks)):
            return None
        return output.detach()

    def close(self) -> None:
        """Leave the model alone."""
        self._remove()


def input_embeddings(model: nn.Module) -> set[nn.Module]:
    """The modules on which `enable_input_require_grads` puts its hooks."""
    found = set()
    for module in model.modules():
        if hasattr(module, "get_input_embeddings"):
            get_input_embeddings: Any = module.get_input_embeddings
            try:
                embeddings = get_input_embeddings()
            except (NotImplementedError, AttributeError):
                continue
            if isinstance(embeddings, nn.Module):
                found.add(embeddings)
    return found


def recomputes_reentrantly(block: nn.Module) -> bool:
    """Whether a block of transformers recomputes by the checkpointing that needs a gradient of its input."""
    if not getattr(block, "gradient_checkpointing", False):
        return False
    function = getattr(block, "_gradient_checkpointing_func", None)
    return function is not None and bool(getattr(function, "keywords", {}).get("use_reentrant", True))


def remove_hooks(handles: dict[nn.Module, Any]) -> None:
    """Remove the hooks from the embeddings."""
    for handle in handles.values():
        handle.remove()
    handles.clear()
