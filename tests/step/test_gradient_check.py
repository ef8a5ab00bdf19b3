"""A gradient that ends on its way down is an error in the first step, and nothing that is meant is taken for one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ist import SparseTuner
from ist.method.registry import EverySelector
from ist.step.gradient_check import drops_layers
from tests.helpers.tiny import checkpoint_activations, count_hooks, tiny_batches, tiny_lora, trainable

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class NoBackward(nn.Module):
    """A linear whose kernel autograd does not see, as those of some quantised formats."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, None

    def forward(self, x: Tensor) -> Tensor:
        return (x.detach() @ self.weight.detach().t()).detach()


class OwnBackward(NoBackward):
    """A linear of another class that autograd sees."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.t()


def replace(model: Any, layer: int, name: str, kind: type[nn.Module]) -> None:
    block = model.base_model.model.model.layers[layer]
    for parent in block.modules():
        if isinstance(child := getattr(parent, name, None), nn.Module):
            setattr(parent, name, kind(child))  # type: ignore[call-arg]


def train(model: Any, active: Any = "all", num_steps: int = 2, micro: int = 1, **options: Any) -> SparseTuner:
    """Steps of `micro` batches each."""
    model.train()
    tuner = SparseTuner(model, selector=active, probe_batches=tiny_batches(2), **options)
    optimizer = torch.optim.SGD(trainable(model), lr=0.01)
    for number, batch in enumerate(tiny_batches(num_steps * micro), 1):
        with tuner.step(optimizer):
            model(**batch).loss.backward()
            if number % micro == 0:
                optimizer.step()
                optimizer.zero_grad()
    return tuner


@pytest.mark.parametrize("fused", [True, False])
def test_a_linear_without_a_backward_is_named(fused: bool) -> None:
    model = tiny_lora(target_modules=["q_proj", "v_proj"])
    replace(model, 2, "down_proj", NoBackward)
    with pytest.raises(ValueError, match=r"ends at base_model\.model\.model\.layers\.2\.mlp\.down_proj, a NoBackward"):
        train(model, fused=fused)


def test_one_under_an_adapter_is_named_too() -> None:
    model = tiny_lora(target_modules=LINEARS)
    module = model.base_model.model.model.layers[1].self_attn.q_proj
    module.base_layer = NoBackward(module.base_layer)
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.base_layer, a NoBackward"):
        train(model)


def test_one_below_all_active_layers_does_no_harm() -> None:
    model = tiny_lora(target_modules=["q_proj", "v_proj"])
    replace(model, 0, "down_proj", NoBackward)
    train(model, "fixed:2,3")


def test_a_linear_of_another_class_with_a_backward_trains() -> None:
    model = tiny_lora(target_modules=["q_proj", "v_proj"])
    for layer in range(4):
        replace(model, layer, "down_proj", OwnBackward)
    train(model)


def test_a_layer_without_a_gradient_below_one_with_it_is_an_error() -> None:
    model = tiny_lora()
    blocks = model.base_model.model.model.layers
    blocks[1].register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(ValueError, match=r"ends in or below .*layers\.2: .*layers\.1 was called and is to train"):
        train(model)


class Skipped(nn.Module):
    """Stands where a block is that is not called."""

    attention_type = "full_attention"

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


@pytest.mark.parametrize("case", ["a block skipped", "labels masked", "one layer", "only the lowest", "the default"])
def test_what_is_meant_is_no_error(case: str) -> None:
    model, batch = tiny_lora(), tiny_batches(1)[0]
    active = {"one layer": "fixed:3", "only the lowest": "fixed:0", "the default": "ist"}.get(case, "all")
    tuner = SparseTuner(model, selector=active, probe_batches=tiny_batches(2))
    optimizer = torch.optim.SGD(trainable(model), lr=0.01)
    if case == "a block skipped":  # as LayerDrop does
        model.base_model.model.model.layers[1] = Skipped()
    if case == "labels masked":
        batch["labels"] = torch.full_like(batch["labels"], -100)
    with tuner.step(optimizer):
        model(**batch).loss.backward()
        optimizer.step()
    tuner.close()


def compile_blocks(model: Any) -> None:
    for block in model.base_model.model.model.layers:
        block.compile(backend="eager")


def checkpoint(model: Any, reentrant: bool) -> None:
    checkpoint_activations(model.get_base_model(), use_reentrant=reentrant)
    model.enable_input_require_grads()


SETTINGS: dict[str, tuple[Callable[[Any], object], dict[str, Any]]] = {
    "plain": (lambda model: None, {}),
    "accumulation": (lambda model: None, {"micro": 3}),
    "compiled blocks": (compile_blocks, {}),
    "reentrant checkpointing": (lambda model: checkpoint(model, True), {}),
    "non-reentrant checkpointing": (lambda model: checkpoint(model, False), {}),
    "recompute": (lambda model: None, {"recompute": "all"}),
}


def detach_input(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].detach(), *args[1:])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("fault", ["none", "a linear", "between two blocks"])
@pytest.mark.filterwarnings("ignore")  # of the compiler's own calls, and of checkpoints whose input was detached
def test_it_holds_however_the_step_is_computed(fault: str, setting: str) -> None:
    model = tiny_lora(target_modules=["q_proj", "v_proj"])
    prepare, options = SETTINGS[setting]
    for layer in range(4):
        replace(model, layer, "down_proj", OwnBackward)
    if fault == "a linear":
        replace(model, 2, "up_proj", NoBackward)
    if fault == "between two blocks":
        model.base_model.model.model.layers[1].register_forward_pre_hook(detach_input)
    prepare(model)
    if fault == "none":
        assert train(model, **options).num_steps == 2
        return
    said = {"a linear": r"ends at base_model\S+layers\.2\.mlp\.up_proj, a NoBackward"}
    kind, text = ValueError, said.get(fault, r"ends in or below \S+layers\.1: \S+layers\.0 was called")
    if (fault, setting) == ("between two blocks", "reentrant checkpointing"):
        # Without a gradient at its input that kind returns none, so that the loss has none and PyTorch says so.
        kind, text = RuntimeError, "does not require grad"
    with pytest.raises(kind, match=text):
        train(model, **options)


class Turns(EverySelector):
    """Trains the upper layers first, and the lowest one later."""

    def choose(self, step: int) -> tuple[int, ...]:
        return ((2, 3), (0, 3))[step % 2]


@pytest.mark.parametrize("fault", ["none", "a linear", "between two blocks"])
def test_what_a_later_step_gets_down_to_is_watched_then(fault: str) -> None:
    model = tiny_lora(target_modules=["q_proj", "v_proj"])
    if fault == "a linear":
        replace(model, 0, "down_proj", NoBackward)
    if fault == "between two blocks":
        model.base_model.model.model.layers[1].register_forward_pre_hook(detach_input)
    assert train(model, Turns, 1).num_steps == 1
    if fault == "none":
        assert train(model, Turns, 4).num_steps == 4
        return
    with pytest.raises(ValueError, match=r"ends (at|in or below) \S+layers\.[03]"):
        train(model, Turns, 2)


def test_the_hooks_go_after_the_first_step() -> None:
    model = tiny_lora(target_modules=["q_proj", "v_proj"])
    for layer in range(4):
        replace(model, layer, "down_proj", OwnBackward)
    linears = [module for module in model.modules() if isinstance(module, OwnBackward)]
    tuner = SparseTuner(model, selector="all", probe_batches=tiny_batches(2))
    tuner.begin_step()
    assert [count_hooks(linear) for linear in linears] == [1] * 4
    tuner.end_step()
    assert [count_hooks(linear) for linear in linears] == [0] * 4
    tuner.begin_step()
    assert [count_hooks(linear) for linear in linears] == [0] * 4
    tuner.close()


@pytest.mark.parametrize(("option", "drops"), [("layerdrop", True), ("decoder_layerdrop", True), ("dropout", False)])
def test_models_that_leave_blocks_out_are_known(option: str, drops: bool) -> None:
    """As M2M100 does by default, whose encoder and decoder have a rate each."""
    model = nn.Sequential(nn.Linear(2, 2))
    part: Any = model[0]
    part.config = SimpleNamespace(**{option: 0.05, "hidden_size": 2})
    assert drops_layers(model) is drops
    setattr(part.config, option, 0.0)
    assert not drops_layers(model)
