"""Gradients of a model in float16, whose loss is multiplied: those of float32, where they would be 0 or infinite."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from ist import layer_scores
from ist.bottleneck import BottleneckConfig, prune_adapter
from ist.bottleneck.sparse import SparseLinear
from ist.focusing import gradient_init
from ist.probing import loss_scale
from ist.probing.suppression import model_loss
from ist.runtime.distributed import Ranks
from tests.helpers.tiny import tiny_batches, tiny_llama, tiny_lora

CRITERIA = ("gradient", "relative_gradient", "first_step", "gate")
TINY, LARGE = 1e-4, 3e3
"""Factors on a loss: with the one its gradients are 0 in float16, with the other 2¹⁶ times them are infinite."""


def times(factor: float, calls: list[Any] | None = None) -> Callable[[nn.Module, Mapping[str, Any]], Tensor]:
    def loss_function(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        if calls is not None:
            calls.append(batch)
        return model_loss(model, batch).float() * factor

    return loss_function


def halved(model: Any) -> Any:
    return copy.deepcopy(model).half()


def own_autocast(model: Any) -> Any:
    """As Accelerate prepares a model: nothing outside of its forward tells."""
    model = copy.deepcopy(model)
    model.forward = torch.autocast("cpu", torch.float16)(functools.partial(type(model).forward, model))
    return model


def scores(model: Any, criterion: Any, loss_function: Any) -> tuple[float, ...]:
    config = None if criterion == "gate" else LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    return layer_scores(model, config, tiny_batches(3), criterion=criterion, loss_function=loss_function)


def plain(criterion: str) -> Any:
    return tiny_lora() if criterion == "gate" else tiny_llama()


@pytest.mark.parametrize("kind", [halved, own_autocast])
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("factor", [TINY, 1.0, LARGE])
def test_scores_are_those_of_float32(criterion: str, kind: Any, factor: float) -> None:
    """Batches that were computed again count once, in the gradients and in the norms."""
    calls: list[Any] = []
    expected = scores(plain(criterion), criterion, times(factor))
    found = scores(kind(plain(criterion)), criterion, times(factor, calls))
    assert found == pytest.approx(expected, rel=0.03, abs=0)
    assert len(calls) == 3 if factor < LARGE else len(calls) > 3


def test_scores_under_autocast_are_those_of_float32() -> None:
    expected = scores(tiny_llama(), "gradient", times(TINY))
    with torch.autocast("cpu", torch.float16):
        assert scores(tiny_llama(), "gradient", times(TINY)) == pytest.approx(expected, rel=0.03, abs=0)


@pytest.mark.parametrize("factor", [TINY, LARGE])
def test_the_start_from_the_gradient_is_that_of_float32(factor: float) -> None:
    models = [tiny_lora(init_lora_weights=True), halved(tiny_lora(init_lora_weights=True))]
    for model in models:
        assert gradient_init(model, tiny_batches(2), loss_function=times(factor)) == 16
    first, second = (dict(model.named_parameters()) for model in models)
    for name, weight in first.items():
        if "lora_A" in name:
            one, other = (nn.functional.normalize(each.detach().float()) for each in (weight, second[name]))
            held = (one @ other.T).square().sum().item()  # The dimensions that the two spans of 4 rows share.
            assert held > 3.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_no_other_loss_is_multiplied(criterion: str, dtype: torch.dtype) -> None:
    gradients: list[float] = []

    def loss_function(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        loss = model_loss(model, batch)
        loss.register_hook(lambda gradient: gradients.append(gradient.item()))
        return loss

    scores(plain(criterion).to(dtype), criterion, loss_function)
    assert gradients == [1.0] * 3


@pytest.mark.parametrize("criterion", ["gradient", "gate"])
def test_gradients_that_are_never_finite_are_one_line(criterion: str) -> None:
    calls: list[Any] = []
    with pytest.raises(ValueError, match=r"gradient of probe batch 0 is infinite or NaN in float16.*bfloat16") as error:
        scores(halved(plain(criterion)), criterion, times(1e30, calls))
    assert "\n" not in str(error.value)
    assert len(calls) == 1 + torch.tensor(loss_scale.FIRST).log2()


@pytest.mark.parametrize("criterion", ["gradient", "gate"])
def test_a_loss_of_nan_says_so(criterion: str) -> None:
    message = "loss of probe batch 0 is nan" if criterion == "gradient" else "importance of .* is nan"
    with pytest.raises(ValueError, match=message):
        scores(halved(plain(criterion)), criterion, times(float("nan")))


@pytest.mark.parametrize("factor", [TINY, LARGE])
@pytest.mark.parametrize("kind", [halved, own_autocast])
def test_snip_prunes_what_it_prunes_in_float32(kind: Any, factor: float) -> None:
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(2), BottleneckConfig(bottleneck_size=8))
    models = [model, kind(model)]
    for each in models:
        torch.manual_seed(2)  # of the temporary W_up
        prune_adapter(each, tiny_batches(2), 0.5, loss_function=times(factor))
    first, second = (
        torch.cat([part.mask.flatten() for part in each.modules() if isinstance(part, SparseLinear)]) for each in models
    )
    assert (first == second).float().mean() > 0.98


def test_ranks_of_a_sharded_model_compute_a_batch_again_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank's gradients were infinite, and a forward alone would wait for it."""
    asked: list[bool] = []

    class TwoRanks(Ranks):
        def all(self, flag: bool) -> bool:
            asked.append(flag)
            return len(asked) > 2

    monkeypatch.setattr(loss_scale, "current_ranks", TwoRanks)
    monkeypatch.setattr(loss_scale, "is_sharded", lambda model: True)
    calls: list[Any] = []
    assert scores(halved(tiny_llama()), "gradient", times(1.0, calls)) == pytest.approx(
        scores(tiny_llama(), "gradient", times(1.0)), rel=0.03, abs=0
    )
    assert (len(calls), asked) == (5, [True] * 5)


def taking(model: nn.Module, batch: Any) -> Tensor:
    """As transformers' loss with smoothed labels takes those out of the batch."""
    return model_loss(model, batch).float() * batch.pop("weight", torch.tensor(1.0))


def weighted() -> list[dict[str, Tensor]]:
    return [{**batch, "weight": torch.tensor(LARGE * 10**number)} for number, batch in enumerate(tiny_batches(2))]


@pytest.mark.parametrize("criterion", [*CRITERIA, "removal"])
def test_a_loss_may_take_fields_out_of_its_batch(criterion: Any) -> None:
    """They are there again when the batch is computed again, and afterwards."""
    model, config = tiny_lora() if criterion in ("gate", "removal") else tiny_llama(), None
    if criterion not in ("gate", "removal"):
        config = LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    batches = weighted()
    found = [
        layer_scores(each, config, batches, criterion=criterion, loss_function=taking)
        for each in (model, halved(model))
    ]
    expected = layer_scores(model, config, batches, criterion=criterion, loss_function=lambda m, b: taking(m, dict(b)))
    assert found[0] == expected
    assert found[1] == pytest.approx(expected, rel=0.05, abs=0)
    assert all("weight" in batch for batch in batches)


@pytest.mark.parametrize("criterion", ["gradient", "gate"])
def test_a_batch_that_is_computed_again_draws_the_same(criterion: Any) -> None:
    draws: list[float] = []

    def noisy(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        draws.append(torch.rand(()).item())
        return model_loss(model, batch).float() * LARGE * draws[-1]

    expected, once = scores(plain(criterion), criterion, noisy), list(draws)
    draws.clear()
    assert scores(halved(plain(criterion)), criterion, noisy) == pytest.approx(expected, rel=0.03, abs=0)
    assert len(draws) > len(once) == len(set(once)) == 3
    assert list(dict.fromkeys(draws)) == once


def test_a_loss_of_nan_on_one_rank_keeps_the_ranks_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that share a model ask each other once a forward, also the one whose loss is NaN."""
    asked: list[bool] = []

    class Asking(Ranks):
        def all(self, flag: bool) -> bool:
            asked.append(flag)
            return flag

    monkeypatch.setattr(loss_scale, "current_ranks", Asking)
    monkeypatch.setattr(loss_scale, "is_sharded", lambda model: True)
    calls: list[Any] = []
    with pytest.raises(ValueError, match=r"importance of .* is nan"):
        scores(halved(tiny_lora()), "gate", times(float("nan"), calls))
    assert len(calls) == len(asked) == 3


class Casting(nn.Linear):
    """As a quantised module whose `compute_dtype` is another than its inputs' dtype."""

    compute_dtype = torch.float16

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input.half(), self.weight.half()).to(input.dtype)


def test_a_quantised_module_says_that_it_computes_in_float16() -> None:
    model = tiny_llama()
    expected = scores(model, "gradient", times(TINY))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.__class__ = Casting
    assert scores(model, "gradient", times(TINY)) == pytest.approx(expected, rel=0.03, abs=0)


class Attention(nn.Module):
    """A model whose adapters give float32, computed in float16: PEFT casts attention's output back."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 16)
        self.layers = nn.ModuleList(nn.ModuleDict({"attn": nn.MultiheadAttention(16, 2)}) for _ in range(3))
        self.head = nn.Linear(16, 10)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer.get_submodule("attn")(hidden, hidden, hidden, need_weights=False)[0]
        return nn.functional.cross_entropy(self.head(hidden).float().flatten(0, 1), input_ids.flatten())


def test_what_an_adapter_casts_back_from_float16_is_seen() -> None:
    model = get_peft_model(Attention(), LoraConfig(r=4, target_modules=["attn"], init_lora_weights=False))
    other = copy.deepcopy(model)
    other.forward = torch.autocast("cpu", torch.float16)(functools.partial(type(other).forward, other))
    first, second = (
        layer_scores(each, None, tiny_ids(), criterion="gate", loss_function=lambda m, b: m(**b) * TINY)
        for each in (model, other)
    )
    assert second == pytest.approx(first, rel=0.03, abs=0)


def tiny_ids() -> list[dict[str, Tensor]]:
    return [{"input_ids": batch["input_ids"] % 10} for batch in tiny_batches(2)]
