"""Make sure, in the first step, that the gradient gets down to every layer that trains.

Some linear layers of quantised models have no backward: what they return has no gradient, and the layers below train on
a wrong one, or on none, while the loss still falls. Nothing else says so.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ..adapters.layers import Layer
from ..adapters.view import ModelView
from ..runtime.hooks import WeakHook
from ..runtime.part import Part

__all__ = ["GradientCheck"]

FIX = (
    "load the model in a format that can be trained through (bfloat16, or bitsandbytes by load_in_4bit or "
    "load_in_8bit), or update the library that the format comes from."
)


class GradientCheck(Part):
    """Watches the first step, and then takes its hooks off.

    A linear of another class than PyTorch's own must return an output with a gradient wherever its input has one. At
    the optimizer's step, of the active layers of a stack whose blocks were called, none may lack a gradient below one
    that has it. Blocks that were skipped, stacks without a loss, and shards, which may be empty, do not count.

    Args:
        view: the model in training. Compiled blocks are not watched, since hooks would compile them anew.
    """

    def __init__(self, view: ModelView) -> None:
        self._view = view
        self._active: list[Layer] = []
        self._called: set[int] = set()
        self._handles: list[Any] = []
        self._began = False
        self._remove = weakref.finalize(self, remove_all, self._handles)

    def begin(self, active: Collection[int], step: int) -> None:
        """Watch the first step."""
        if self._began:
            return
        self._began = True
        if self._view.compiled:
            return
        self._active = [layer for layer in self._view.layers if layer.index in active]
        for layer in self._view.layers:
            for linear in other_linears(layer.module):
                self._handles.append(linear.register_forward_hook(WeakHook(self._check_linear)))
        if self._view.sharded or len(self._active) < 2:
            return
        for layer in self._active:
            self._handles.append(layer.module.register_forward_pre_hook(WeakHook(self._note_call)))
        check = weakref.WeakMethod(self._check_layers)
        self._handles.append(
            register_optimizer_step_pre_hook(lambda optimizer, *_: (alive := check()) and alive(optimizer))
        )

    def end(self) -> None:
        """The first step is over."""
        remove_all(self._handles)

    def give_up(self) -> None:
        """Watch the next step instead."""
        self.end()
        self._began = False

    def close(self) -> None:
        """Stop watching."""
        self._remove()

    def _note_call(self, block: nn.Module, args: Any) -> None:
        if torch.is_grad_enabled() and block.training:
            self._called.add(id(block))

    def _check_linear(self, linear: nn.Module, args: Any, output: Any) -> None:
        given = any(isinstance(value, Tensor) and value.requires_grad for value in args)
        if not (torch.is_grad_enabled() and given and isinstance(output, Tensor) and output.is_floating_point()):
            return
        if not output.requires_grad:
            raise ValueError(
                f"The gradient ends at {self._name_of(linear)}, a {type(linear).__name__} without a backward, so the "
                f"layers below it would train on a wrong gradient or none: {FIX}"
            )

    def _check_layers(self, optimizer: Optimizer) -> None:
        """Before the optimizer's step, while the gradients are there."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        called = [
            layer
            for layer in self._active
            if id(layer.module) in self._called and all(id(parameter) in held for parameter in layer.parameters)
        ]
        for stack in {stack_of(layer): None for layer in called}:
            own = [layer for layer in called if stack_of(layer) == stack]
            lowest = next((number for number, layer in enumerate(own) if has_gradient(layer)), 0)
            if lowest:
                raise ValueError(
                    f"The gradient ends in or below {own[lowest].name}: {own[lowest - 1].name} was called and is to "
                    f"train, and no gradient comes to it. A module between them has no backward, or its output was "
                    f"detached: {FIX}"
                )

    def _name_of(self, module: nn.Module) -> str:
        return next((name for name, other in self._view.model.named_modules() if other is module), "a linear")


def other_linears(block: nn.Module) -> Iterator[nn.Module]:
    """The linears of a block that compute by something else than PyTorch's own forward, adapters not among them."""
    for module in block.modules():
        is_linear = isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features")
        # A PEFT layer has the sizes of the layer inside it.
        if is_linear and not hasattr(module, "base_layer") and type(module).forward is not nn.Linear.forward:
            yield module


def stack_of(layer: Layer) -> str:
    """The list of blocks that a layer stands in, by name."""
    return layer.name.rpartition(".")[0]


def has_gradient(layer: Layer) -> bool:
    """Whether a gradient has come to one parameter of the layer at least."""
    return any(parameter.grad is not None for parameter in layer.parameters)


def remove_all(handles: list[Any]) -> None:
    """Take hooks off."""
    while handles:
        handles.pop().remove()
