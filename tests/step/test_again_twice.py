"""Several gradients of one forward, in any order: the same as of PEFT's own layer, whatever has been run before."""

from __future__ import annotations

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ist.step.fused import FusedLora, again, few

SHAPE = (2, 3)
WIDE = 5
WAYS = pytest.mark.parametrize("most_rows", [0, 2048], ids=["one function", "that of few rows"])


class Swiglu(torch.autograd.Function):
    """Writes the gradients of gate and up over them as Liger's kernel does: no counter tells of it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate.view(-1, gate.shape[-1]), up.view(-1, up.shape[-1]))
        return nn.functional.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [each.clone().requires_grad_() for each in (gate, up)]
            product = nn.functional.silu(leaves[0]) * leaves[1]
        found = torch.autograd.grad(product, leaves, grads[0].view_as(product))
        gate.data.copy_(found[0])
        up.data.copy_(found[1])
        return tuple(each.clone().view_as(grads[0]) for each in found)


def plain(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(gate) * up


def liger(gate: Tensor, up: Tensor) -> Tensor:
    """Writes over gate and up in its backward."""
    return Swiglu.apply(gate, up)  # type: ignore[return-value]


class Gated(nn.Module):
    """A gated MLP, with LoRA on its last projection."""

    def __init__(self, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, WIDE), nn.Linear(4, WIDE), nn.Linear(WIDE, 4)
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.product(self.gate(x), self.up(x)))


def make(product: Any, dropout: float) -> tuple[Any, Any]:
    """The same layer twice: as PEFT has it, and fused."""
    torch.manual_seed(0)
    model: Any = get_peft_model(Gated(product), LoraConfig(target_modules=["down"], lora_dropout=dropout, r=2))  # type: ignore[arg-type]
    nn.init.normal_(model.base_model.model.down.lora_B["default"].weight)
    model.base_model.model.gate.weight.requires_grad_()
    fused = copy.deepcopy(model)
    FusedLora(fused.base_model.model.down, None)
    return model, fused


def a_of(model: Any) -> list[Tensor]:
    return [model.base_model.model.down.lora_A["default"].weight]


def b_of(model: Any) -> list[Tensor]:
    return [model.base_model.model.down.lora_B["default"].weight]


def all_of(model: Any) -> list[Tensor]:
    return [*a_of(model), *b_of(model), model.base_model.model.gate.weight]


CALLS: dict[str, Any] = {
    "A of the first loss": (0, a_of),
    "A of the second loss": (1, a_of),
    "B of the second loss": (1, b_of),
    "everything of the first loss": (0, all_of),
    "everything of the second loss": (1, all_of),
}
ORDERS = [names for number in (1, 2, 3) for names in itertools.permutations(CALLS, number)]


def gradients(model: Any, names: tuple[str, ...], retain_last: bool) -> list[list[Tensor]]:
    """Those of A and B, of one call after another; where gate and up are overwritten, theirs mean nothing any more."""
    torch.manual_seed(1)
    y = model(torch.randn(*SHAPE, 4))
    losses = y.sin().sum(), y.square().sum()
    found = []
    for number, name in enumerate(names, 1):
        loss, of = CALLS[name]
        keep = number < len(names) or retain_last
        found.append(list(torch.autograd.grad(losses[loss], of(model), retain_graph=keep)[:2]))
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("product", [plain, liger])
@WAYS
def test_gradients_in_any_order(product: Any, dropout: float, most_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "MOST_ROWS", most_rows)
    monkeypatch.setitem(again.RECIPES, "SwigluBackward", again.gated)
    model, fused = make(product, dropout)
    for names, retain_last in itertools.product(ORDERS, (False, True)):
        expected, found = (gradients(each, names, retain_last) for each in (model, fused))
        for name, theirs, ours in zip(names, expected, found, strict=True):
            for one, other in zip(theirs, ours, strict=True):
                torch.testing.assert_close(other, one, msg=lambda said: f"{name} in {names}: {said}")  # noqa: B023


@pytest.mark.parametrize("product", [plain, liger])
@WAYS
def test_a_graph_that_was_freed_is_an_error_as_with_peft(
    product: Any, most_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few, "MOST_ROWS", most_rows)
    monkeypatch.setitem(again.RECIPES, "SwigluBackward", again.gated)
    for model in make(product, 0.0):
        loss = model(torch.randn(*SHAPE, 4)).sum()
        torch.autograd.grad(loss, all_of(model))
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, a_of(model))


@WAYS
def test_a_forward_without_a_backward_leaves_nothing(most_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even until the garbage collector comes."""
    monkeypatch.setattr(few, "MOST_ROWS", most_rows)
    monkeypatch.setitem(again.RECIPES, "SwigluBackward", again.gated)
    _, fused = make(liger, 0.0)
    kept: list[Any] = []

    def product(gate: Tensor, up: Tensor) -> Tensor:
        x = liger(gate, up)
        kept.append(weakref.ref(x.grad_fn))
        return x

    fused.base_model.model.product = product
    gc.disable()
    try:
        y = fused(torch.randn(*SHAPE, 4))
        assert kept[0]() is not None
        del y
        assert kept[0]() is None
    finally:
        gc.enable()
