"""Blocks whose forwards other tools have replaced, and which read the adapters' weights: frozen layers stay frozen."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from peft import OFTConfig, get_peft_model
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaMLP

from ist import IST, SparseTuner, layer_scores
from ist.adapters.view import view_model
from ist.probing.suppression import UnsuppressedError, agreed, candidate_losses, model_loss
from ist.probing.trained import gate_scores
from ist.runtime.distributed import Ranks
from ist.step.fused import few
from ist.step.readers import adapter_readers
from tests.helpers.tiny import (
    checkpoint_activations,
    layer_of,
    tiny_batches,
    tiny_llama,
    tiny_lora,
    traces,
    trainable,
)
from tests.helpers.trainers import make_trainer

ACTIVE = (1, 2)


def read(x: Tensor, part: Any) -> Tensor:
    a, b = part.lora_A["default"].weight, part.lora_B["default"].weight
    return part.base_layer(x) + x @ a.T @ b.T * part.scaling["default"]


def reading_mlp(module: Any, x: Tensor) -> Tensor:
    """An MLP as Unsloth's and Axolotl's kernels compute it: no adapter is called."""
    return read(module.act_fn(module.gate_proj(x)) * read(x, module.up_proj), module.down_proj)


def asking_mlp(module: Any, x: Tensor) -> Tensor:
    """One that asks an attribute for a part, as Unsloth's attention asks `apply_qkv`."""
    return read(module.act_fn(module.gate_proj(x)) * module.apply_up(x), module.down_proj)


def by_method(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in model.get_base_model().model.layers:
        block.mlp.forward = MethodType(reading_mlp, block.mlp)


def by_partial(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in model.get_base_model().model.layers:
        block.mlp.forward = partial(reading_mlp, block.mlp)


def by_class(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", reading_mlp)


def by_attribute(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in model.get_base_model().model.layers:
        block.mlp.apply_up = partial(read, part=block.mlp.up_proj)
        block.mlp.forward = MethodType(asking_mlp, block.mlp)


WAYS = [by_method, by_partial, by_class, by_attribute]


def gradients_of(model: Any, checkpointed: bool, fused: bool) -> dict[str, Tensor]:
    """The gradients of a step in which two layers train, as a norm to clip by counts them, and what stays behind."""
    if checkpointed:
        checkpoint_activations(model.get_base_model(), use_reentrant=False)
    model.train()
    before = traces(model)
    with SparseTuner(model, selector=f"fixed:{','.join(map(str, ACTIVE))}", fused=fused) as tuner:
        tuner.begin_step()
        model(**tiny_batches(1)[0]).loss.backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        optimizer = torch.optim.AdamW(trainable(model))
        optimizer.step()
        tuner.end_step(optimizer)
    assert traces(model) == before
    return found


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("change", WAYS)
def test_a_frozen_layer_has_no_gradient(
    change: Callable[..., None], checkpointed: bool, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = gradients_of(tiny_lora(), checkpointed, fused)
    model = tiny_lora()
    change(model, monkeypatch)
    found = gradients_of(model, checkpointed, fused)
    assert {layer_of(name) for name in found} == set(ACTIVE)
    assert found.keys() == plain.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, plain[name])


@pytest.mark.parametrize("change", [*WAYS, None])
def test_only_replaced_forwards_are_watched(
    change: Callable[..., None] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_lora()
    checkpoint_activations(model.get_base_model(), use_reentrant=False)
    if change:
        change(model, monkeypatch)
    layers = view_model(model, None, "adapters").layers
    assert [bool(adapter_readers(layer)) for layer in layers] == [change is not None] * len(layers)


def test_a_forward_that_holds_no_adapter_or_is_the_classes_own_costs_nothing() -> None:
    model = tiny_lora()
    for block in model.get_base_model().model.layers:
        block.mlp.forward = MethodType(LlamaMLP.forward, block.mlp)
        block.input_layernorm.forward = MethodType(type(block.input_layernorm).forward, block.input_layernorm)
        block.post_attention_layernorm.forward = partial(reading_mlp, block)
    assert not any(adapter_readers(layer) for layer in view_model(model, None, "adapters").layers)


def adapted(method: str) -> Any:
    """A tiny Llama with adapters, of which only LoRA's have a factor that their response is proportional to."""
    if method in ("lora", "dora"):
        return tiny_lora(use_dora=method == "dora")
    config = OFTConfig(oft_block_size=4, target_modules=["up_proj", "down_proj"], init_weights=False)
    return get_peft_model(tiny_llama(), config)


def reading_any(module: Any, x: Tensor) -> Tensor:
    """An MLP that computes with what the adapters hold, in some way, and calls none of them."""

    def one(part: Any, value: Tensor) -> Tensor:
        own = sum(weight.float().mean() for weight in part.parameters() if weight.requires_grad)
        return part.base_layer(value) * (1 + own)

    return one(module.down_proj, module.act_fn(module.gate_proj(x)) * one(module.up_proj, x))


def calling_mlp(module: Any, x: Tensor) -> Tensor:
    """An MLP of a user's own, which calls its adapters."""
    return module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))


def replace_mlps(model: Any, forward: Callable[..., Tensor]) -> Any:
    for block in model.get_base_model().model.layers:
        block.mlp.forward = MethodType(forward, block.mlp)
    return model


CANDIDATES = [(0, 1), (1, 3), (0, 1, 2, 3)]
REFUSED = r"The forward of a LlamaMLP in \S+layers\.\d was replaced by one that reads the weights of its adapters"


def measured(model: Any, suppression: Any = "response") -> Tensor:
    layers = view_model(model, None, "adapters").layers
    return candidate_losses(model, layers, CANDIDATES, tiny_batches(1)[0], 0.25, suppression=suppression)


def test_the_factor_of_lora_is_read_and_so_suppresses() -> None:
    torch.testing.assert_close(measured(replace_mlps(adapted("lora"), reading_mlp)), measured(adapted("lora")))


@pytest.mark.parametrize("method", ["dora", "oft"])
def test_what_has_no_factor_and_is_not_called_is_not_measured(method: str) -> None:
    model = replace_mlps(adapted(method), reading_any)
    before = traces(model)
    with pytest.raises(UnsuppressedError, match=REFUSED) as caught:
        measured(model)
    assert "\n" not in str(caught.value)
    assert traces(model) == before


@pytest.mark.parametrize("method", ["lora", "dora", "oft"])
def test_a_replaced_forward_that_calls_its_adapters_is_measured(method: str) -> None:
    assert torch.equal(measured(replace_mlps(adapted(method), calling_mlp)), measured(adapted(method)))


def test_a_factor_that_is_scaled_as_the_authors_do_needs_no_call() -> None:
    losses = measured(replace_mlps(adapted("dora"), reading_mlp), "scaling")
    assert len({round(loss, 6) for loss in losses.tolist()}) == len(CANDIDATES)


@pytest.mark.parametrize("method", ["dora", "oft"])
def test_a_loop_is_told_at_its_first_measurement_and_trains_without_one(method: str) -> None:
    for selector, options in {"random": {}, "ist": {"update_interval": 1}}.items():
        model = replace_mlps(adapted(method), reading_any)
        optimizer = torch.optim.SGD(trainable(model))
        tuner = SparseTuner(model, selector=selector, num_active_layers=2, probe_batches=tiny_batches(1), **options)
        tuner.begin_step()
        model(**tiny_batches(1)[0]).loss.backward()
        optimizer.step()
        with pytest.raises(UnsuppressedError, match=REFUSED) if selector == "ist" else nullcontext():
            tuner.end_step(optimizer)
        tuner.close()


def test_a_trainer_is_told_before_its_first_step(tmp_path: Path) -> None:
    model = replace_mlps(adapted("dora"), reading_any)
    before = traces(model)
    trainer = make_trainer(tmp_path, IST(update_interval=2), model=model)
    with pytest.raises(ValueError, match=f"^{REFUSED}"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert traces(model) == before


def constant_mlp(module: Any, x: Tensor) -> Tensor:
    """As a kernel does that takes the factor for a number."""

    def one(part: Any, value: Tensor) -> Tensor:
        a, b = part.lora_A["default"].weight, part.lora_B["default"].weight
        return part.base_layer(value) + value @ a.T @ b.T * torch.as_tensor(part.scaling["default"]).item()

    return one(module.down_proj, module.act_fn(module.gate_proj(x)) * one(module.up_proj, x))


MLPS = ["up_proj", "down_proj"]


def gates_of(model: Any) -> list[float]:
    return gate_scores(model, view_model(model, None, "adapters").layers, tiny_batches(2), model_loss)


@pytest.mark.parametrize(("forward", "refused"), [(constant_mlp, True), (reading_mlp, False), (calling_mlp, False)])
@pytest.mark.parametrize("targets", [MLPS, ["q_proj", "v_proj", *MLPS]], ids=["the MLP", "attention too"])
def test_a_gate_without_a_gradient_is_no_score(
    targets: list[str], forward: Callable[..., Tensor], refused: bool
) -> None:
    """Also where other adapters of the layer are called and have theirs."""
    model = replace_mlps(tiny_lora(target_modules=targets), forward)
    before, dicts = traces(model), [id(module._parameters) for module in model.modules()]
    if refused:
        with pytest.raises(UnsuppressedError, match=REFUSED) as caught:
            gates_of(model)
        assert "criterion='removal'" in str(caught.value)
        assert not any(advice in str(caught.value) for advice in ("plain LoRA", "selector="))
    else:
        assert gates_of(model) == pytest.approx(gates_of(tiny_lora(target_modules=targets)), rel=1e-4)
    assert traces(model) == before
    assert [id(module._parameters) for module in model.modules()] == dicts


def test_removal_that_is_not_measured_names_another_criterion() -> None:
    model = replace_mlps(adapted("dora"), reading_any)
    with pytest.raises(UnsuppressedError, match=REFUSED) as caught:
        layer_scores(model, None, tiny_batches(1), criterion="removal")
    assert "criterion='gradient'" in str(caught.value)
    assert not any(advice in str(caught.value) for advice in ("plain LoRA", "selector="))


@pytest.mark.parametrize("few_rows", [True, False])
def test_gates_are_measured_while_a_tuner_has_fused_the_model(few_rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few, "MOST_ROWS", few.MOST_ROWS if few_rows else 0)
    model = tiny_lora()
    plain = gates_of(model)
    with SparseTuner(model, selector="all", fused=True) as tuner:
        assert tuner.num_fused
        assert gates_of(model) == plain


# ---- Adapters that a batch does not reach


def routed_mlp(module: Any, x: Tensor) -> Tensor:
    """An expert of a user's own, to which no token of these batches is routed."""
    rows = x[..., 0] > 1e9
    return calling_mlp(module, x) if rows.any() else torch.zeros_like(x, dtype=module.up_proj.weight.dtype)


def skipped_mlp(module: Any, x: Tensor) -> Tensor:
    """The same of plain adapters, of which none is there to be read."""
    return torch.zeros_like(x)


@pytest.mark.parametrize("method", ["lora", "dora", "oft"])
def test_an_adapter_that_is_neither_called_nor_read_changes_nothing(method: str) -> None:
    found, expected = (replace_mlps(adapted(method), forward) for forward in (routed_mlp, skipped_mlp))
    assert torch.equal(measured(found), measured(expected))
    if method == "lora":
        assert gates_of(found) == gates_of(expected)


class Rank(Ranks):
    """One of two ranks, whose exchange tells whether the other one has refused."""

    def __init__(self, other: bool) -> None:
        self.rank, self.size, self.other, self.num_asked = 0, 2, other, 0

    def any(self, flag: bool) -> bool:
        """Whether one of them has."""
        self.num_asked += 1
        return flag or self.other


@pytest.mark.parametrize("other", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_ranks_refuse_together(own: bool, other: bool) -> None:
    """A batch may reach a layer on one rank alone: none waits for another that has stopped."""
    model, ranks = replace_mlps(adapted("dora"), reading_any if own else calling_mlp), Rank(other)
    with (
        pytest.raises(UnsuppressedError, match=REFUSED if own else "^Another process")
        if own or other
        else (nullcontext())
    ):
        assert len(agreed(lambda: measured(model), ranks)) == len(CANDIDATES)
    assert ranks.num_asked == 1


def test_all_candidates_are_computed_before_one_is_refused() -> None:
    """Ranks that hold parts of the weights need each other in every forward."""
    model, calls = replace_mlps(adapted("dora"), reading_any), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(UnsuppressedError, match=REFUSED):
        measured(model)
    assert len(calls) == len(CANDIDATES)
