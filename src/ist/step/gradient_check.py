"""Make sure, the first time that it can be seen, that the gradient gets down to every layer that trains.

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
from ..runtime.distributed import current_ranks
from ..runtime.hooks import WeakHook
from ..runtime.part import Part

__all__ = ["GradientCheck"]

FIX = (
    "load the model in a format that can be trained through (bfloat16, or bitsandbytes by load_in_4bit or "
    "load_in_8bit), or update the library that the format comes from."
)


class GradientCheck(Part):
    """Watches the steps in which a gradient gets deeper than before, and takes its hooks off after each.

    A linear of another class than PyTorch's own must return an output with a gradient wherever its input has one. At
    the optimizer's step, of the active layers of a stack whose blocks were called, none may lack a gradient below one
    that has it. Blocks that were skipped and stacks without a loss do not count.

    Args:
        view: the model in training. Compiled blocks are not hooked, which would compile them anew: their linears are
            called once with a row of zeros, and all of them count as called.
    """

    def __init__(self, view: ModelView) -> None:
        self._view = view
        self._lowest = len(view.layers)
        """The lowest layer that a watched step trained."""
        self._next_lowest = self._lowest
        self._watching = False
        self._active: list[Layer] = []
        self._called: set[int] = set()
        self._trains = True
        """Whether the model's forward that runs is one of a training step."""
        self._handles: list[Any] = []
        self._remove = weakref.finalize(self, remove_all, self._handles)

    def begin(self, active: Collection[int], step: int) -> None:
        """Watch a step that trains a lower layer than those before it."""
        if self._watching or not active or min(active) >= self._lowest:
            return
        self._watching, self._next_lowest = True, min(active)
        self._active = [layer for layer in self._view.layers if layer.index in active]
        self._called.clear()
        self._watch_linears()
        if len(self._active) < 2:
            return
        check = weakref.WeakMethod(self._check_layers)
        self._handles += [
            self._view.model.register_forward_pre_hook(WeakHook(self._note_forward)),
            register_optimizer_step_pre_hook(lambda optimizer, *_: (alive := check()) and alive(optimizer)),
        ]
        if self._view.compiled and not drops_layers(self._view.model):
            self._called.update(id(layer.module) for layer in self._active)
        elif not self._view.compiled:
            hook = WeakHook(self._note_call)
            self._handles += [layer.module.register_forward_pre_hook(hook) for layer in self._active]

    def end(self) -> None:
        """The step is over."""
        if self._watching:
            self._lowest = self._next_lowest
        self.give_up()

    def give_up(self) -> None:
        """The step is over without an update; the next one is watched."""
        self._watching = False
        remove_all(self._handles)

    def close(self) -> None:
        """Stop watching."""
        self._remove()

    def _watch_linears(self) -> None:
        """Of the layers that no gradient has come to yet."""
        for layer in self._view.layers[self._next_lowest : self._lowest]:
            for linear in other_linears(layer.module):
                if not self._view.compiled:
                    self._handles.append(linear.register_forward_hook(WeakHook(self._check_linear)))
                elif not self._view.sharded and cuts_gradient(linear, self._view.device):
                    raise self._error_at(linear)

    def _note_forward(self, model: nn.Module, args: Any) -> None:
        self._trains = torch.is_grad_enabled() and model.training

    def _note_call(self, block: nn.Module, args: Any) -> None:
        # Reentrant checkpointing calls blocks without a gradient first, and again only where one gets to them.
        if self._trains and block.training:
            self._called.add(id(block))

    def _check_linear(self, linear: nn.Module, args: Any, output: Any) -> None:
        given = any(isinstance(value, Tensor) and value.requires_grad for value in args)
        if not (torch.is_grad_enabled() and given and isinstance(output, Tensor) and output.is_floating_point()):
            return
        if not output.requires_grad:
            raise self._error_at(linear)

    def _check_layers(self, optimizer: Optimizer) -> None:
        """Before the optimizer's step, while the gradients are there."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        trained = [layer for layer in self._active if all(id(parameter) in held for parameter in layer.parameters)]
        if not trained:
            return
        called = [layer for layer in trained if id(layer.module) in self._called]
        # A rank may hold no part of a layer that FSDP shards.
        called = [layer for layer in called if any(parameter.numel() for parameter in layer.parameters)]
        said = next(filter(None, map(gap_in, by_stack(called))), None)
        if self._view.sharded and current_ranks().any(said is not None):
            said = said or "The gradient ends on its way down to the layers, on another process: see its message."
        if said is not None:
            raise ValueError(said)

    def _error_at(self, linear: nn.Module) -> ValueError:
        name = next((name for name, other in self._view.model.named_modules() if other is linear), "a linear")
        return ValueError(
            f"The gradient ends at {name}, a {type(linear).__name__} without a backward, so the layers below it would "
            f"train on a wrong gradient or none: {FIX}"
        )


def other_linears(block: nn.Module) -> Iterator[nn.Module]:
    """The linears of a block that compute by something else than PyTorch's own forward, adapters not among them."""
    for module in block.modules():
        is_linear = isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features")
        # A PEFT layer has the sizes of the layer inside it.
        if is_linear and not hasattr(module, "base_layer") and type(module).forward is not nn.Linear.forward:
            yield module


def cuts_gradient(linear: Any, device: torch.device) -> bool:
    """Whether a linear returns an output without a gradient for a row of zeros with one; False where it takes none."""
    with torch.enable_grad():
        row = torch.zeros(1, linear.in_features, device=device, requires_grad=True)
        try:
            return not linear(row).requires_grad
        except Exception:  # It wants other numbers or shapes.
            return False


def drops_layers(model: Any) -> bool:
    """Whether a model, or a part of it, leaves blocks out at random (`layerdrop`, `decoder_layerdrop`, …)."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    options = [option for config in configs.values() for option in getattr(config, "__dict__", {}).items()]
    return any(value for name, value in options if name.endswith("layerdrop"))


def by_stack(layers: list[Layer]) -> list[list[Layer]]:
    """Layers apart by the list of blocks that they stand in, each in the order of the depth."""
    stacks: dict[str, list[Layer]] = {}
    for layer in layers:
        stacks.setdefault(layer.name.rpartition(".")[0], []).append(layer)
    return list(stacks.values())


def gap_in(layers: list[Layer]) -> str | None:
    """In words, where a gradient has come to a layer and to none below it; None where it has come to the lowest."""
    lowest = next((number for number, layer in enumerate(layers) if has_gradient(layer)), 0)
    if not lowest:
        return None
    return (
        f"The gradient ends in or below {layers[lowest].name}: {layers[lowest - 1].name} was called and is to train, "
        f"and no gradient comes to it. A module between them has no backward, or its output was detached: {FIX}"
    )


def has_gradient(layer: Layer) -> bool:
    """Whether a gradient has come to one parameter of the layer at least."""
    return any(parameter.grad is not None for parameter in layer.parameters)


def remove_all(handles: list[Any]) -> None:
    """Take hooks off."""
    while handles:
        handles.pop().remove()
