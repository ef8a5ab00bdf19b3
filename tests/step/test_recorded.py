"""Few rows without dropout: operations that autograd records, no more of them than PEFT's, and nothing more kept."""

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
from ist.step.fused import FusedLora, recorded
from tests.helpers.tiny import tiny_batches, tiny_lora

WIDTH, OUT, ROWS = 16, 24, 6
FUNCTION = "LoraLinearBackward"


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


@pytest.mark.parametrize(("rows", "is_recorded"), [(ROWS, True), (ROWS + 1, False)])
def test_up_to_how_many_rows(rows: int, is_recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "RECORDED_ROWS", ROWS)
    module = fused(lora())
    for x in (inputs(rows), torch.randn(1, rows, WIDTH, requires_grad=True)):
        assert (FUNCTION not in functions(module(x))) == is_recorded


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

    FREE = ("t", "view", "_unsafe_view", "detach", "transpose", "alias")

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
    with Count() as backward:
        y.backward(torch.ones_like(y))
    return forward.names, backward.names


@pytest.mark.parametrize("bias", [False, True])
def test_launches_fewer_operations_than_peft(bias: bool) -> None:
    forward, backward = count(fused(lora(bias=bias)))
    peft_forward, peft_backward = count(lora(bias=bias))
    assert len(forward) == 3 == len(peft_forward) - 2
    assert len(forward) + len(backward) < len(peft_forward) + len(peft_backward)


def test_a_frozen_module_is_not_recorded_with_its_adapter() -> None:
    module = fused(lora(), frozen=True)
    module(inputs()).sum().backward()
    assert all(parameter.grad is None for parameter in module.parameters())


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
    """How many tensors of the input's size the products of matrices keep."""
    held = [getattr(node, "_raw_saved_self") for node in nodes(output) if type(node).__name__ == "MmBackward0"]  # noqa: B009
    return sum(isinstance(saved.data, Tensor) and saved.data.shape == (ROWS, WIDTH) for saved in held)


def test_an_input_that_the_graph_can_make_again_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the gradients have the same bits."""
    model = Gated()
    fused(model.down)
    torch.manual_seed(1)
    assert kept_inputs(model(inputs(), inputs())) == 0
    y, found = results(model)
    monkeypatch.setattr(recorded, "recipe_of", lambda x: None)
    assert kept_inputs(model(inputs(), inputs())) == 1
    expected_y, expected = results(model)
    assert torch.equal(y, expected_y)
    assert all(map(torch.equal, found, expected))


def test_a_matrix_that_was_written_to_before_the_backward_is_an_error() -> None:
    """As autograd has it for what it keeps itself."""
    model = Gated()
    fused(model.down)
    y = model(inputs(), inputs())
    with torch.no_grad():
        model.down.lora_A["default"].weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place between a forward and its backward"):
        y.sum().backward()


def test_double_backward_is_that_of_peft() -> None:
    found = []
    for module in (lora(dtype=torch.float64), fused(lora(dtype=torch.float64))):
        torch.manual_seed(1)
        x = inputs(dtype=torch.float64)
        (gradient,) = torch.autograd.grad(module(x).sin().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), module.lora_A["default"].weight)[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("recompute", ["none", "frozen", "all"])
@pytest.mark.parametrize("selector", ["all", "fixed:0,2"])
def test_a_step_is_that_of_the_function(recompute: str, selector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, and which layers have them, also where blocks are recomputed."""
    gradients = []
    first = tiny_lora(4).double().train()
    for rows in (0, recorded.RECORDED_ROWS):
        monkeypatch.setattr(recorded, "RECORDED_ROWS", rows)
        model = copy.deepcopy(first)
        with SparseTuner(model, selector=selector, recompute=recompute) as tuner:
            tuner.begin_step()
            loss = model(**tiny_batches(1)[0], use_cache=False).loss
            if recompute == "none":
                assert (FUNCTION in functions(loss)) == (rows == 0)
            loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    function, found = gradients
    assert found.keys() == function.keys() != set()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, function[name], rtol=1e-9, atol=1e-12)
