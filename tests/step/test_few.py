"""Few rows without dropout: fewer operations than PEFT's, to the bits of the function, and nothing more kept."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ist import SparseTuner
from ist.step.fused import FusedLora, few, function
from ist.step.fused import frozen as frozen_module
from tests.helpers.tiny import tiny_batches, tiny_lora

WIDTH, OUT, ROWS = 16, 24, 6
FUNCTION, FEW = "LoraLinearBackward", "FewRowsLinearBackward"


def lora(dropout: float = 0.0, dtype: torch.dtype = torch.float32, bias: bool = False) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["proj"], r=4, lora_alpha=7, lora_dropout=dropout)
    holder = nn.ModuleDict({"proj": nn.Linear(WIDTH, OUT, bias=bias)})
    module: Any = peft.inject_adapter_in_model(config, holder)["proj"]  # type: ignore[index]
    nn.init.normal_(module.lora_B["default"].weight)
    return module.to(dtype).train()


def fused(module: Any, frozen: bool = False) -> Any:
    FusedLora(module, nullcontext()).switch.frozen = frozen
    return module


def inputs(rows: int = ROWS, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, WIDTH, dtype=dtype, requires_grad=True)


def nodes(output: Tensor) -> Iterator[Any]:
    """The functions of a graph."""
    waiting, seen = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting += [below for below, _ in node.next_functions]


def functions(output: Tensor) -> set[str]:
    return {type(node).__name__ for node in nodes(output)}


@pytest.mark.parametrize(("rows", "few_rows"), [(ROWS, True), (ROWS + 1, False)])
def test_up_to_how_many_rows(rows: int, few_rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "MOST_ROWS", ROWS)
    module = fused(lora())
    for x in (inputs(rows), torch.randn(1, rows, WIDTH, requires_grad=True)):
        assert (FUNCTION not in functions(module(x))) == few_rows


def test_what_the_function_keeps_to_itself() -> None:
    """Dropout, whose mask it draws again, and products in another dtype than that of the input."""
    half = torch.bfloat16
    assert FUNCTION in functions(fused(lora(dropout=0.1))(inputs()))
    with torch.autocast("cpu", half):
        assert FUNCTION in functions(fused(lora())(inputs()))
    module = lora(dtype=half)
    for part in (module.lora_A, module.lora_B):
        part.float()
    assert FUNCTION in functions(fused(module)(inputs(dtype=half)))
    assert FUNCTION not in functions(fused(lora(dropout=0.1).eval())(inputs()))


class Count(TorchDispatchMode):
    """Counts operations that compute something."""

    FREE = ("t", "view", "_unsafe_view", "detach", "transpose", "alias", "new_empty")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.__name__.partition(".")[0]) not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def count(module: Any) -> tuple[list[str], list[str]]:
    """The operations of a forward and of its backward."""
    x = torch.randn(1, ROWS, WIDTH, requires_grad=True)
    with Count() as forward:
        y = module(x)
    dy = torch.ones_like(y)
    with Count() as backward:
        y.backward(dy)
    return forward.names, backward.names


@pytest.mark.parametrize("bias", [False, True])
def test_launches_fewer_operations_than_peft(bias: bool) -> None:
    forward, backward = count(fused(lora(bias=bias)))
    peft_forward, peft_backward = count(lora(bias=bias))
    assert (len(forward), len(backward)) == (3, 5)
    assert (len(peft_forward), len(peft_backward)) == (5, 7)


@pytest.mark.parametrize("prepared", [True, False])
def test_a_frozen_module_learns_nothing(prepared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its matrices cannot be prepared for products, few rows serve it too."""
    if not prepared:
        monkeypatch.setattr(frozen_module, "frozen_pair", lambda *_: None)
    module, x = fused(lora(), frozen=True), inputs()
    y = module(x)
    assert (FEW in functions(y)) != prepared
    y.sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("needs", ["a", "b"])
def test_keeps_only_what_the_gradients_asked_for_need(needs: str) -> None:
    """The input where A trains, and its product with A where B does."""
    module = fused(lora())
    module.lora_A["default"].weight.requires_grad_(needs == "a")
    module.lora_B["default"].weight.requires_grad_(needs == "b")
    x = torch.randn(ROWS, WIDTH)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = module(x)
    assert FEW in functions(y)
    weights = {tuple(parameter.shape) for parameter in module.parameters()}
    others = [tuple(tensor.shape) for tensor in kept if tuple(tensor.shape) not in weights]
    assert others == [(ROWS, WIDTH) if needs == "a" else (ROWS, 4)]


def test_a_compiled_graph_is_that_of_any_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be traced for few rows, and stay so."""
    module, x = fused(lora()), inputs()
    assert FEW in functions(module(x))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert (
        few.has_few_rows(x, module.base_layer.weight, *module.lora_A.parameters(), *module.lora_B.parameters()) is False
    )
    assert FUNCTION in functions(module(x))


class Gated(nn.Module):
    """The last projection of a gated MLP, with LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.down = lora()

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.down(nn.functional.silu(gate) * up)


def results(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(1)
    given = inputs(), inputs()
    y = model(*given)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return y, list(torch.autograd.grad(y.sin().sum(), [*given, *trained]))


def kept_inputs(output: Tensor) -> int:
    """How many tensors of the input's size the function keeps."""
    kept = next(node for node in nodes(output) if type(node).__name__ == "FewRowsLinearBackward").saved_tensors
    return sum(tensor is not None and tensor.shape == (ROWS, WIDTH) for tensor in kept)


def test_an_input_that_the_graph_can_make_again_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the gradients have the same bits."""
    model = Gated()
    fused(model.down)
    torch.manual_seed(1)
    assert kept_inputs(model(inputs(), inputs())) == 0
    y, found = results(model)
    monkeypatch.setattr(few, "recipe_of", lambda x, norms: None)
    assert kept_inputs(model(inputs(), inputs())) == 1
    expected_y, expected = results(model)
    assert torch.equal(y, expected_y)
    assert all(map(torch.equal, found, expected))


def test_a_matrix_that_was_written_to_before_the_backward_is_an_error() -> None:
    model = Gated()
    fused(model.down)
    y = model(inputs(), inputs())
    with torch.no_grad():
        model.down.lora_A["default"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_backward_under_autocast_is_that_of_a_forward_without() -> None:
    module = fused(lora())
    gradients = []
    for enabled in (False, True):
        x = torch.ones(ROWS, WIDTH, requires_grad=True)
        y = module(x).sin().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(y, [x, *module.lora_A.parameters(), *module.lora_B.parameters()]))
    assert all(map(torch.equal, *gradients))


NEEDS = [
    ("x",), ("a",), ("b",), ("c",), ("x", "a"), ("x", "b"), ("x", "c"), ("a", "b", "c"), ("x", "a", "b", "c"),
]  # fmt: skip


@pytest.mark.parametrize("needs", NEEDS, ids=" ".join)
@pytest.mark.parametrize("shape", [(6,), (2, 3)], ids=["rows", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients_have_the_bits_of_the_function(
    needs: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Whichever of them are asked for."""
    torch.manual_seed(0)
    x, a, b, c = torch.randn(*shape, WIDTH), torch.randn(4, WIDTH), torch.randn(OUT, 4), torch.randn(OUT)
    given = {name: value.to(dtype) for name, value in {"x": x, "a": a, "b": b, "c": c}.items()}
    weight, bias, dy = (torch.randn(*size).to(dtype) for size in ((OUT, WIDTH), (OUT,), (*shape, OUT)))
    found = []
    linear: Any = function.lora_linear
    for compute in (lambda *args: linear(*args, 0.0), few.few_rows_linear):
        leaves = {name: value.clone().requires_grad_(name in needs) for name, value in given.items()}
        y = compute(leaves["x"], weight, bias, leaves["a"], leaves["b"], leaves["c"], 1.75)
        if y.requires_grad:
            y.backward(dy)
        found.append([y.detach(), *(leaf.grad for leaf in leaves.values())])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("recompute", ["none", "frozen", "all"])
@pytest.mark.parametrize("selector", ["all", "fixed:0,2"])
def test_a_step_is_that_of_the_function(recompute: str, selector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, and which layers have gradients, also where blocks are recomputed."""
    gradients = []
    first = tiny_lora(4).double().train()
    for rows in (0, few.MOST_ROWS):
        monkeypatch.setattr(few, "MOST_ROWS", rows)
        model = copy.deepcopy(first)
        with SparseTuner(model, selector=selector, recompute=recompute) as tuner:
            tuner.begin_step()
            loss = model(**tiny_batches(1)[0], use_cache=False).loss
            if recompute == "none":
                assert (FUNCTION in functions(loss)) == (rows == 0)
            loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected, found = gradients
    assert found.keys() == expected.keys() != set()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())
