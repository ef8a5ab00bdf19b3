"""Inputs that the graph can make again are not kept, and gradients have the same bits."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ist import SparseTuner
from ist.step.fused import again, few, function
from ist.step.fused.again import recipe_of
from tests.helpers.tiny import tiny_batches, tiny_lora

SIZE = (2, 3, 5)


def leaves(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(SIZE, generator=generator).to(dtype).requires_grad_() for _ in range(2))
    return gate, up


class SwiGLU(torch.autograd.Function):
    """As Liger's function does it: gate and up are kept in two dimensions, and overwritten with their gradients."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gate_multiplier: float = 1.0) -> Tensor:
        ctx.gate_multiplier = gate_multiplier
        ctx.save_for_backward(gate.view(-1, gate.shape[-1]), up.view(-1, up.shape[-1]))
        return nn.functional.silu(gate * gate_multiplier) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        gate.detach().zero_()
        up.detach().zero_()
        return torch.ones(SIZE), torch.ones(SIZE), None


class RMSNorm(torch.autograd.Function):
    """As Liger's function does it: it keeps its input in two dimensions, its weight, and a factor of each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, casting_mode: int = 0, offset: float = 0.0) -> Tensor:
        rows = x.view(-1, x.shape[-1])
        factors = rows.float().square().mean(1).add(1e-6).rsqrt()
        ctx.casting_mode, ctx.offset = casting_mode, offset
        ctx.save_for_backward(rows, weight, factors)
        y = rows * factors[:, None]
        y = y.to(x.dtype) if casting_mode == 0 else y
        return (y * (weight.float() + offset)).to(x.dtype).view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        rows, weight, factors = ctx.saved_tensors
        dy, x = (grads[0].reshape(rows.shape) * (weight + ctx.offset)).float(), rows.float()
        part = (dy * x).mean(1, keepdim=True) * factors[:, None].square()
        return (factors[:, None] * (dy - part * x)).to(rows.dtype).view(grads[0].shape), None, None, None


@pytest.fixture
def known_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(again.RECIPES, "RMSNormBackward", again.normed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_is_multiplied_again(dtype: torch.dtype) -> None:
    gate, up = leaves(dtype)
    x = nn.functional.silu(gate) * up
    recipe = recipe_of(x)
    assert recipe is not None
    assert torch.equal(recipe(), x)


def test_ligers_function_is_called_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(again.RECIPES, "SwiGLUBackward", again.gated)
    gate, up = leaves()
    x: Tensor = SwiGLU.apply(gate.exp(), up.exp(), 0.5)  # type: ignore
    recipe = recipe_of(x)
    assert recipe is not None
    assert torch.equal(recipe().view(SIZE), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("casting", "offset"), [(0, 0.0), (1, 1.0)], ids=["as Llama", "as Gemma"])
def test_a_norm_is_made_again_once(known_norms: None, dtype: torch.dtype, casting: int, offset: float) -> None:
    """For all that read it, until its own backward; a graph that is retained makes it anew for the next one."""
    x, weight = leaves(dtype)
    y: Tensor = RMSNorm.apply(x, weight.detach()[0, 0], casting, offset)  # type: ignore
    first, second = recipe_of(y, norms=True), recipe_of(y, norms=True)
    assert first is not None
    assert second is not None
    assert torch.equal(first().view(SIZE), y)
    assert second() is first()
    before = first()
    y.sum().backward(retain_graph=True)
    assert first() is not before
    assert torch.equal(first(), before)


def test_a_norm_is_kept_unless_asked(known_norms: None) -> None:
    """Making it again takes a launch more."""
    x, weight = leaves()
    y: Tensor = RMSNorm.apply(x, weight[0, 0])  # type: ignore
    assert recipe_of(y) is None


@pytest.mark.parametrize("casting", [-1, 7])
def test_a_norm_that_rounds_otherwise_is_kept(known_norms: None, casting: int) -> None:
    x, weight = leaves()
    y: Tensor = RMSNorm.apply(x, weight[0, 0], casting)  # type: ignore
    assert recipe_of(y, norms=True) is None


def test_a_norm_whose_input_is_offloaded_is_kept(known_norms: None) -> None:
    x, weight = leaves()
    with torch.autograd.graph.save_on_cpu():
        y: Tensor = RMSNorm.apply(x, weight[0, 0])  # type: ignore
    assert recipe_of(y, norms=True) is None


def test_a_norm_goes_with_its_graph(known_norms: None) -> None:
    """Nothing holds the graph, or what was made again, once the output is gone."""
    x, weight = leaves()
    y: Tensor = RMSNorm.apply(x, weight[0, 0])  # type: ignore
    recipe = recipe_of(y, norms=True)
    assert recipe is not None
    made = weakref.ref(recipe())
    node = weakref.ref(y.grad_fn)
    del y, recipe
    assert made() is None
    assert node() is None


def scaled(gate: Tensor, up: Tensor) -> Tensor:
    return gate.sin() * up[0, 0].sin()


def one_trains(gate: Tensor, up: Tensor) -> Tensor:
    return gate.sin() * up.detach()


def in_two_dtypes(gate: Tensor, up: Tensor) -> Tensor:
    return gate.sin() * up.bfloat16()


def recomputed(gate: Tensor, up: Tensor) -> Tensor:
    return checkpoint(lambda a, b: a.sin() * b.sin(), gate, up, use_reentrant=False)  # type: ignore[return-value]


def written_to(gate: Tensor, up: Tensor) -> Tensor:
    x = gate.sin() * up.sin()
    with torch.no_grad():
        x.mul_(2)
    return x


def packed(gate: Tensor, up: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return gate.sin() * up.sin()


KEPT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a leaf": lambda gate, up: gate,
    "a sum": lambda gate, up: gate + up,
    "a number": lambda gate, up: gate * 0.5,
    "a broadcast product": scaled,
    "a product of which one factor needs no gradient": one_trains,
    "a product of two dtypes": in_two_dtypes,
    "a product that is recomputed": recomputed,
    "a product whose factors are offloaded": packed,
    "a product that was written to past autograd": written_to,
    "a view of a product": lambda gate, up: (gate * up).flatten(0, 1),
}


@pytest.mark.parametrize("name", KEPT)
def test_other_inputs_are_kept(name: str) -> None:
    assert recipe_of(KEPT[name](*leaves())) is None


def trained(model: Any, recompute: Any = "none") -> tuple[dict[str, Tensor], Counter[int]]:
    """The gradients of a step, and how many inputs of each width its LoRA modules keep."""
    kept: Counter[int] = Counter()

    def watched(find: Any) -> Any:
        def watch(x: Tensor, norms: bool) -> Any:
            recipe = find(x, norms)
            kept.update([x.shape[-1]] if recipe is None else [])
            return recipe

        return watch

    with pytest.MonkeyPatch.context() as patch, SparseTuner(model, selector="all", recompute=recompute) as tuner:
        for module in (function, few):
            patch.setattr(module, "recipe_of", watched(module.recipe_of))
        tuner.begin_step()
        model(**tiny_batches(1)[0], use_cache=False).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        tuner.end_step()
    return found, kept


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_same_bits(dtype: torch.dtype, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a focused Llama, whose gates are 48 wide and hidden states 32, in the function."""
    monkeypatch.setattr(few, "MOST_ROWS", 0)
    model = tiny_lora(4, layers_to_transform=[1, 3], lora_dropout=dropout).train().to(dtype)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        now, widths = trained(model)
    for parameter in model.parameters():
        parameter.grad = None
    monkeypatch.setattr(function, "recipe_of", lambda x, norms: None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        before, widths_before = trained(model)
    assert (set(widths_before), set(widths)) == ({32, 48}, {32})
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in now)


def normed_by_liger(model: Any) -> None:
    """Each norm of a block computes as Liger's does, and says that it is Liger's, as Liger has it."""
    for name, module in model.named_modules():
        if name.endswith("layernorm"):
            module.forward = lambda x, module=module: RMSNorm.apply(x, module.weight)
            module._get_name = lambda: "LigerRMSNorm"


@pytest.mark.parametrize("rows", [0, 2048], ids=["many rows", "few rows"])
@pytest.mark.parametrize("recompute", ["norms", "frozen"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_need_not_be_kept(
    known_norms: None, dtype: torch.dtype, dropout: float, recompute: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a focused Llama only the input of the lowest layer's attention is kept, since no gradient reaches its norm."""
    monkeypatch.setattr(few, "MOST_ROWS", rows)
    model = tiny_lora(4, layers_to_transform=[1, 3], lora_dropout=dropout).train().to(dtype)
    normed_by_liger(model)
    found = {}
    for mode in ("none", recompute):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found[mode] = trained(model, mode)
        for parameter in model.parameters():
            parameter.grad = None
    (before, kept_before), (now, kept) = found.values()
    assert (kept_before, kept) == ({32: 6}, {32: 2})
    assert now.keys() == before.keys()
    assert all(torch.equal(now[name], before[name]) for name in before)


def test_where_no_norm_is_ligers_it_is_said() -> None:
    with pytest.warns(UserWarning, match="recompute='norms' does nothing here: .* Use Liger's kernels"):
        SparseTuner(tiny_lora(2).train(), selector="all", recompute="norms").close()


def test_norms_without_fused_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="recompute='norms' needs fused=True"):
        SparseTuner(tiny_lora(2).train(), selector="all", recompute="norms", fused=False)
