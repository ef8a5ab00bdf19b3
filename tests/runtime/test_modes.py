"""Evaluation mode, and modules that come back from it as they were."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ist.runtime.modes import evaluation_mode, same_modes_after
from tests.helpers.tiny import tiny_lora


class Merging(nn.Linear):
    """Merges at its evaluation, as some libraries' adapters do."""

    merges = 0

    def train(self, mode: bool = True) -> Merging:
        self.merges += (not mode) - mode
        return super().train(mode)


class Linear4bit(nn.Linear):
    """Of the name that bitsandbytes' has."""


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def mixed() -> Any:
    """Modules of every kind, some of which evaluate already."""
    model: Any = nn.Sequential(
        nn.Dropout(), Merging(2, 2), nn.Sequential(nn.Dropout(), Merging(2, 2)), Linear4bit(2, 2)
    )
    model[2][0].training = False
    return model


def test_every_module_evaluates_and_comes_back() -> None:
    for model in (mixed(), mixed().eval(), tiny_lora(2).train(), tiny_lora(2).eval(), nn.Dropout()):
        before = modes(model)
        with evaluation_mode(model):
            assert {type(module) for module in model.modules() if module.training} <= {Linear4bit}
        assert modes(model) == before
        with pytest.raises(KeyError), evaluation_mode(model):
            raise KeyError
        assert modes(model) == before


def test_modules_with_an_evaluation_of_their_own_come_back_from_it() -> None:
    model = mixed()
    with evaluation_mode(model):
        assert [model[1].merges, model[2][1].merges] == [1, 1]
    assert [model[1].merges, model[2][1].merges] == [0, 0]


def test_one_that_had_evaluated_already_stays_merged() -> None:
    model: Any = nn.Sequential(nn.Dropout(), Merging(2, 2))
    model[1].eval()
    with evaluation_mode(model):
        assert model[1].merges == 1
    assert (model[1].merges, model[1].training, model.training) == (1, False, True)


@pytest.mark.parametrize("evaluating", [False, True])
def test_4_bit_modules_are_in_training_meanwhile(evaluating: bool) -> None:
    """On some CPUs they repack their weight at an evaluation, and no gradient comes through it from then on."""
    model = mixed().train(not evaluating)
    with evaluation_mode(model):
        assert model[3].training
    assert model[3].training != evaluating


def test_nothing_is_cached_for_generation_meanwhile() -> None:
    configs = [SimpleNamespace(use_cache=value) for value in (True, False, None)]
    model: Any = nn.Sequential(*(nn.Identity() for _ in configs))
    for module, config in zip(model, configs, strict=True):
        module.config = config
    with evaluation_mode(model):
        assert [config.use_cache for config in configs] == [False, False, None]
    assert [config.use_cache for config in configs] == [True, False, None]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_compiled_scripts_keep_their_flag_elsewhere() -> None:
    traced: Any = torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2))
    model = nn.Sequential(traced, nn.Dropout()).train()
    with evaluation_mode(model):
        assert not any(modes(model))
    assert all(modes(model))


def test_models_of_transformers_evaluate_by_a_flag_unless_they_have_kernels_of_a_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To walk through every module by `train` and `eval` takes longer than a small model's forward."""
    model = tiny_lora(2).train()
    calls: list[str] = []
    walk = nn.Module.train
    monkeypatch.setattr(nn.Module, "train", lambda self, mode=True: calls.append("walk") or walk(self, mode))
    with evaluation_mode(model):
        assert not any(modes(model))
    assert all(modes(model))
    assert not calls
    inner: Any = model.get_base_model()
    monkeypatch.setattr(type(inner), "use_kernels", True)
    monkeypatch.setattr(type(inner), "set_use_kernels", lambda self, on: calls.append("kernels"))
    with evaluation_mode(model):
        assert not any(modes(model))
    assert all(modes(model))
    assert calls.count("kernels") == 2


def test_whatever_happens_within_each_module_is_in_its_mode_afterwards() -> None:
    model = mixed()
    before = modes(model)
    with same_modes_after(model):
        model.train()
        with evaluation_mode(model):
            model.train()
        assert all(modes(model))
        model.eval()
    assert modes(model) == before
    assert model[1].merges == model[2][1].merges
