"""Losses of candidate sets: equation 8 against naive twins, in evaluation mode, without a trace."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel
from torch import Tensor, nn
from torch.nn import functional

from ist import discover_layers
from ist.bottleneck import BottleneckConfig
from ist.probing.suppression import candidate_losses, model_loss, suppress
from tests.helpers.models import ARCHITECTURES, ToyModel, make_batch, make_lora, randomise, toy_batch, wrap
from tests.helpers.tiny import traces

BASE = "base_model.model"
CANDIDATES: list[tuple[int, ...]] = [(0, 1), (2, 3), (1, 3), (0,), (0, 1, 2, 3), ()]
TARGETS = ["up", "down"]

CONFIGS: dict[str, Callable[[], Any]] = {
    "LoRA": lambda: LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS),
    "DoRA": lambda: LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, use_dora=True),
    "IA3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down"]),
    "bottleneck": lambda: BottleneckConfig(target_modules=TARGETS, output_modules=["down"], bottleneck_size=3),
}


def toy(config: Any = None, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> PeftModel:
    """Four toy blocks in training mode, with random adapters."""
    model = wrap(ToyModel(num_blocks=4, dropout=dropout), config or CONFIGS["LoRA"]()).to(dtype)
    randomise(model)
    return model.train()


def losses_of(model: nn.Module, beta: float, candidates: Any = CANDIDATES, **options: Any) -> Tensor:
    batch = options.pop("batch", None) or toy_batch(next(model.parameters()).dtype)
    return candidate_losses(model, discover_layers(model), candidates, batch, beta, **options)


def plain_loss(model: nn.Module, batch: dict[str, Tensor] | None = None) -> Tensor:
    """The loss in evaluation mode, of a copy."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        outputs = model(**(batch or toy_batch(next(model.parameters()).dtype)))
        return outputs["loss"].double()


# ---- Naive twins


def adapted(block: nn.Module, part: str, x: Tensor, factor: float) -> Tensor:
    """`W x + b + factor · (α / r) B A x`, from the parameters alone."""
    values = dict(block.named_parameters())
    a, b = values[f"{part}.lora_A.default.weight"], values[f"{part}.lora_B.default.weight"]
    plain = x @ values[f"{part}.base_layer.weight"].T + values[f"{part}.base_layer.bias"]
    return plain + factor * 3 / 2 * (x @ a.T) @ b.T


def naive_loss(model: nn.Module, kept: tuple[int, ...], beta: float) -> Tensor:
    """Equation 8 written out for the toy model with LoRA."""
    x, y = toy_batch().values()
    for index in range(4):
        factor = 1.0 if index in kept else beta
        block = model.get_submodule(f"{BASE}.blocks.{index}")
        weight, bias = block.get_parameter("norm.weight"), block.get_parameter("norm.bias")
        normed = functional.layer_norm(x, (8,), weight, bias)
        x = x + adapted(block, "down", torch.tanh(adapted(block, "up", normed, factor)), factor)
    head = model.get_submodule(f"{BASE}.head")
    return ((x @ head.weight.T + head.bias).squeeze(-1) - y).square().mean()  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
def test_equals_equation_8_written_out(beta: float) -> None:
    model = toy()
    expected = torch.stack([naive_loss(model, kept, beta) for kept in CANDIDATES]).detach()
    torch.testing.assert_close(losses_of(model, beta), expected, rtol=1e-12, atol=0)
    assert beta == 1 or len(set(expected.tolist())) == len(CANDIDATES)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_equals_separately_scaled_models(beta: float) -> None:
    """To the bit: a model for each candidate, whose factors were multiplied for good."""
    model = toy()
    expected = []
    for kept in CANDIDATES:
        scaled: Any = copy.deepcopy(model)
        for index in set(range(4)) - set(kept):
            for part in TARGETS:
                scaled.get_submodule(f"{BASE}.blocks.{index}.{part}").scaling["default"] *= beta
        expected.append(plain_loss(scaled))
    assert torch.equal(losses_of(model, beta), torch.stack(expected))


class Blend(nn.Module):
    """`base + β·(full − base)` from two modules."""

    def __init__(self, full: nn.Module, base: nn.Module, beta: float) -> None:
        super().__init__()
        self.full, self.base, self.beta = full, base, beta

    def forward(self, x: Tensor) -> Tensor:
        base = self.base(x)
        return base + self.beta * (self.full(x) - base)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("kind", CONFIGS)
def test_equals_models_with_blended_modules(kind: str, beta: float) -> None:
    """A model for each candidate, in which both the adapted and the plain module run, for every kind of adapter."""
    model = toy(CONFIGS[kind]())
    expected = []
    for kept in CANDIDATES:
        blended: Any = copy.deepcopy(model)
        for index in set(range(4)) - set(kept):
            block = blended.get_submodule(f"{BASE}.blocks.{index}")
            for part in TARGETS:
                full = getattr(block, part)
                setattr(block, part, Blend(full, full.base_layer, beta))
        expected.append(plain_loss(blended))
    torch.testing.assert_close(losses_of(model, beta), torch.stack(expected), rtol=1e-12, atol=0)


# ---- Two ends: nothing suppressed, everything suppressed to nothing


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_all_layers_at_beta_0_are_the_model_without_adapters(name: str) -> None:
    """To the bit, and everything unsuppressed is the model with them."""
    model, batch = make_lora(name).eval(), make_batch(name)
    randomise(model)
    layers = discover_layers(model)
    with torch.no_grad():
        with_adapters = model(**batch).loss
        with model.disable_adapter():
            without = model(**batch).loss
        with suppress(layers, (), 0.0):
            assert torch.equal(model(**batch).loss, without)
        with suppress(layers, range(len(layers)), 0.0):
            assert torch.equal(model(**batch).loss, with_adapters)
    assert not torch.equal(with_adapters, without)


@pytest.mark.parametrize("kind", ["LoRA", "bottleneck"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_beta_1_is_the_plain_loss_to_the_bit(dtype: torch.dtype, kind: str) -> None:
    model = toy(CONFIGS[kind](), dtype, dropout=0.3)
    losses = losses_of(model, 1.0)
    assert torch.equal(losses, plain_loss(model).expand(len(CANDIDATES)))


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_candidate_of_all_layers_is_the_plain_loss_to_the_bit(kind: str) -> None:
    model = toy(CONFIGS[kind]())
    assert torch.equal(losses_of(model, 0.25, [(0, 1, 2, 3)])[0], plain_loss(model))


# ---- The form of the answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_losses_are_float64_on_the_cpu_in_the_candidates_order(dtype: torch.dtype) -> None:
    model = toy(dtype=dtype)
    losses = losses_of(model, 0.25)
    assert (losses.dtype, losses.shape, losses.device.type) == (torch.float64, (len(CANDIDATES),), "cpu")
    assert not losses.requires_grad
    assert torch.equal(losses_of(model, 0.25, CANDIDATES[::-1]), losses.flip(0))
    for loss, candidate in zip(losses, CANDIDATES, strict=True):
        assert torch.equal(losses_of(model, 0.25, [candidate])[0], loss)


@pytest.mark.parametrize("form", [tuple, list, set, frozenset], ids=lambda form: form.__name__)
def test_a_candidate_may_be_any_collection(form: Callable[[Any], Any]) -> None:
    model = toy()
    assert torch.equal(losses_of(model, 0.25, [form(c) for c in CANDIDATES]), losses_of(model, 0.25))


def test_adapters_outside_of_the_layers_are_not_suppressed() -> None:
    model = toy(LoraConfig(r=2, target_modules=["up", "head"]))
    layers = discover_layers(model)
    with torch.no_grad():
        with model.disable_adapter():
            nowhere = model_loss(model, toy_batch())
        for layer in layers:
            for adapter in layer.adapters.values():
                adapter.scaling["default"] = 0.0  # type: ignore[index,operator]
        head_only = model_loss(model, toy_batch())
    assert not torch.equal(head_only, nowhere)
    randomly_scaled = toy(LoraConfig(r=2, target_modules=["up", "head"]))
    assert torch.equal(losses_of(randomly_scaled, 0.0, [()])[0], head_only)


def test_logits_are_skipped_where_the_model_can() -> None:
    """As models with Liger's kernels do: their forward takes `skip_logits`, and needs labels for it."""

    class Labelled(ToyModel):
        def forward(self, x: Tensor, labels: Tensor) -> Any:  # type: ignore[override]
            return super().forward(x, labels)

    class FusedLoss(ToyModel):
        def forward(self, x: Tensor, labels: Tensor | None = None, skip_logits: bool = False) -> Any:  # type: ignore[override]
            asked.append(skip_logits)
            return super().forward(x, labels)

    asked: list[bool] = []
    plain, fused = (wrap(kind(num_blocks=4), CONFIGS["LoRA"]()).double().train() for kind in (Labelled, FusedLoss))
    randomise(plain)
    fused.load_state_dict(plain.state_dict())
    batch = {"x": toy_batch()["x"], "labels": toy_batch()["y"]}
    assert torch.equal(losses_of(fused, 0.25, batch=batch), losses_of(plain, 0.25, batch=batch))
    assert asked == [True] * len(CANDIDATES)
    model_loss(fused.get_base_model(), batch)
    assert asked[-1]


# ---- No trace


def test_no_gradient_is_computed() -> None:
    model, seen = toy(), []

    def loss_function(model: nn.Module, batch: Any) -> Tensor:
        loss = model_loss(model, batch)
        seen.append((torch.is_grad_enabled(), loss.requires_grad))
        return loss

    before = traces(model)
    losses_of(model, 0.25, loss_function=loss_function)
    assert seen == [(False, False)] * len(CANDIDATES)
    assert torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert traces(model) == before


def test_gradients_that_are_there_stay() -> None:
    model = toy()
    model_loss(model, toy_batch()).backward()
    before = {name: (p.grad, None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()}
    assert any(grad is not None for grad, _ in before.values())
    losses_of(model, 0.25)
    for name, parameter in model.named_parameters():
        grad, value = before[name]
        assert parameter.grad is grad
        assert grad is None or (value is not None and torch.equal(grad, value))


def test_parameters_and_buffers_stay() -> None:
    model = toy()
    before = copy.deepcopy(model.state_dict())
    losses_of(model, 0.25)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def mixed_modes(kind: str) -> PeftModel:
    """Training, but for one block and one part of another, which a user had set to evaluate."""
    model = toy(CONFIGS[kind](), dropout=0.3)
    model.get_submodule(f"{BASE}.blocks.2").eval()
    model.get_submodule(f"{BASE}.blocks.0.norm").eval()
    assert len({module.training for module in model.modules()}) == 2
    return model


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_module_evaluates_and_returns_to_its_own_mode(kind: str) -> None:
    model, modes = mixed_modes(kind), []

    def loss_function(model: nn.Module, batch: Any) -> Tensor:
        modes.append({module.training for module in model.modules()})
        return model_loss(model, batch)

    before = traces(model)
    losses_of(model, 0.25, loss_function=loss_function)
    assert modes == [{False}] * len(CANDIDATES)
    assert traces(model) == before


@pytest.mark.parametrize("failing_call", [0, 2])
@pytest.mark.parametrize("kind", CONFIGS)
def test_an_exception_leaves_no_trace_either(kind: str, failing_call: int) -> None:
    model, calls = mixed_modes(kind), []

    def loss_function(model: nn.Module, batch: Any) -> Tensor:
        calls.append(1)
        if len(calls) > failing_call:
            raise KeyboardInterrupt
        return model_loss(model, batch)

    before, loss = traces(model), plain_loss(model)
    with pytest.raises(KeyboardInterrupt):
        losses_of(model, 0.25, loss_function=loss_function)
    assert traces(model) == before
    assert torch.is_grad_enabled()
    assert torch.equal(plain_loss(model), loss)


def test_a_bad_layer_undoes_those_before_it() -> None:
    """An error on the way in must not leave the first layers suppressed."""
    model = toy()
    layers = discover_layers(model)
    before = traces(model)
    broken = [*layers[:2], dataclasses.replace(layers[2], adapters={"none": None})]  # type: ignore[dict-item]
    with pytest.raises(AttributeError), suppress(broken, (), 0.25):
        pytest.fail("the context was entered")
    assert traces(model) == before


def test_dropout_is_off_and_no_random_number_is_drawn() -> None:
    model = toy(LoraConfig(r=2, target_modules=TARGETS, lora_dropout=0.5), dropout=0.5)
    batch = toy_batch()
    assert not torch.equal(model_loss(model, batch), model_loss(model, batch))
    state = torch.get_rng_state()
    first = losses_of(model, 0.25)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(losses_of(model, 0.25), first)
    assert torch.equal(losses_of(model, 0.25, [(0, 1, 2, 3)])[0], plain_loss(model))


def test_a_loss_that_draws_draws_the_same_for_every_candidate() -> None:
    """As those of diffusion models do, and of those that mask their inputs."""
    model = toy()

    def noisy(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch["x"] + torch.randn_like(batch["x"]))["prediction"] - batch["y"]).square().mean()

    state = torch.get_rng_state()
    losses = losses_of(model, 1.0, loss_function=noisy)
    assert torch.equal(torch.get_rng_state(), state)
    assert losses.unique().numel() == 1
    assert torch.equal(losses_of(model, 0.25, loss_function=noisy)[4], losses[0])


# ---- Where the loss comes from


def test_a_loss_function_of_the_user() -> None:
    model = toy()

    def absolute_error(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch["x"])["prediction"] - batch["y"]).abs().mean()

    losses = losses_of(model, 0.25, loss_function=absolute_error)
    layers = discover_layers(model.eval())
    for candidate, loss in zip(CANDIDATES, losses, strict=True):
        with torch.no_grad(), suppress(layers, candidate, 0.25):
            assert torch.equal(absolute_error(model, toy_batch()), loss)
    assert not torch.equal(losses, losses_of(model, 0.25))


class Returns(nn.Module):
    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, **batch: Tensor) -> Any:
        return self.outputs


@pytest.mark.parametrize("outputs", [{"loss": torch.tensor(2.5)}, SimpleNamespace(loss=torch.tensor(2.5))], ids=repr)
def test_model_loss_reads_mappings_and_objects(outputs: Any) -> None:
    assert model_loss(Returns(outputs), {"x": torch.ones(1)}) == 2.5


@pytest.mark.parametrize(
    "outputs", [{"logits": torch.ones(1)}, {"loss": None}, SimpleNamespace(), SimpleNamespace(loss=None)], ids=repr
)
def test_a_model_without_a_loss_is_an_error_in_one_line(outputs: Any) -> None:
    with pytest.raises(ValueError, match=r"no loss .* input_ids, mask: .*labels.*loss_function=") as caught:
        model_loss(Returns(outputs), {"input_ids": torch.ones(1), "mask": torch.ones(1)})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_a_batch_without_labels_is_an_error_and_leaves_no_trace(name: str) -> None:
    model = make_lora(name).train()
    batch = make_batch(name)
    del batch["labels"]
    before = traces(model)
    with pytest.raises(ValueError, match="needs labels"):
        candidate_losses(model, discover_layers(model), [(0,), (1,)], batch, 0.25)
    assert traces(model) == before
