"""Equation 8 is written once, `blend`, and every way of suppressing a response gives what it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, OFTConfig
from torch import Tensor, nn

from ist import SparseTuner
from ist.adapters.blending import blend
from ist.adapters.layers import discover_layers
from ist.adapters.responses import has_exact_factor, scaled_response
from ist.bottleneck import BottleneckConfig
from ist.probing.batched import factors_by_row
from ist.probing.suppression import factors_of
from tests.helpers.models import randomise, wrap
from tests.helpers.tiny import tiny_llama

TOLERANCE = 1e-12  # relative to the response; float64
TARGETS = ["q_proj", "up_proj"]
LORA: dict[str, Any] = {"r": 2, "lora_alpha": 3, "target_modules": TARGETS}

# The configuration, and whether a factor scales the response (else the module runs once more without its adapters).
KINDS: dict[str, tuple[Callable[[], Any], bool]] = {
    "LoRA": (lambda: LoraConfig(**LORA), True),
    "LoRA with dropout": (lambda: LoraConfig(**LORA, lora_dropout=0.5), True),
    "LoRA, rank-stabilised": (lambda: LoraConfig(**LORA, use_rslora=True), True),
    "LoHa": (lambda: LoHaConfig(r=2, alpha=3, target_modules=TARGETS), True),
    "AdaLoRA": (lambda: AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=TARGETS), True),
    "series bottleneck": (lambda: BottleneckConfig(mode="series", bottleneck_size=4), True),
    "parallel bottleneck": (lambda: BottleneckConfig(mode="parallel", bottleneck_size=4), True),
    "DoRA": (lambda: LoraConfig(**LORA, use_dora=True), False),
    "IA3": (lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["up_proj"]), False),
    "OFT": (lambda: OFTConfig(r=4, oft_block_size=0, target_modules=TARGETS), False),
}


def adapted(config: Any) -> Any:
    """A model in float64 whose adapters have random values."""
    torch.manual_seed(0)
    model: Any = wrap(tiny_llama(), config).double().eval()
    randomise(model)
    return model


def inputs_of(adapter: nn.Module, rows: int = 2) -> Tensor:
    """Random rows for a linear module."""
    size = next(p.shape[1] for name, p in adapter.named_parameters() if name.endswith("base_layer.weight"))
    return torch.randn(rows, 5, size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def without_adapters(model: Any, adapter: nn.Module, x: Tensor) -> Tensor:
    """What a module computes with PEFT's own switch off."""
    with model.disable_adapter():
        return adapter(x)


@torch.no_grad()
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_adapter_returns_the_blend(kind: str, beta: float) -> None:
    make_config, by_factor = KINDS[kind]
    model = adapted(make_config())
    for layer in discover_layers(model):
        for adapter in layer.adapters.values():
            assert has_exact_factor(adapter) is by_factor
            x = inputs_of(adapter)
            base, full = without_adapters(model, adapter, x), adapter(x)
            response = (full - base).abs().max()
            assert response > 1e-4
            with scaled_response(adapter, beta):
                found = adapter(x)
            assert (found - blend(base, full, beta)).abs().max() < TOLERANCE * max(response, full.abs().max())


@torch.no_grad()
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}], ids=str)
def test_the_fused_lora_returns_the_blend_of_each_candidate_row_by_row(options: dict[str, Any], beta: float) -> None:
    """All candidates at once, as batched probes compute them."""
    model = adapted(LoraConfig(**LORA, **options))
    candidates, rows = [(0, 1), (1, 3), (2, 3)], 2
    expected = {}
    for layer in discover_layers(model):
        for name, adapter in layer.adapters.items():
            x = inputs_of(adapter, rows * len(candidates))
            parts = zip(without_adapters(model, adapter, x).split(rows), adapter(x).split(rows), strict=True)
            factors = [1.0 if layer.index in candidate else beta for candidate in candidates]
            blends = [blend(base, full, factor) for (base, full), factor in zip(parts, factors, strict=True)]
            expected[name] = torch.cat(blends)
    ids = torch.zeros(rows * len(candidates), 5, dtype=torch.long)
    with SparseTuner(model, probe_batches=[]) as tuner, tuner._parts.activation.measuring():
        assert tuner.num_fused == len(expected)
        with factors_by_row(tuner.layers, candidates, beta, ids):
            for layer in tuner.layers:
                for name, adapter in layer.adapters.items():
                    found = adapter(inputs_of(adapter, rows * len(candidates)))
                    torch.testing.assert_close(found, expected[name], rtol=0, atol=1e-12)


class HubLinear(nn.Linear):
    """A linear module that follows AdapterHub's protocol, with one adapter in parallel."""

    adapter_modules_name = "adapters"

    def __init__(self) -> None:
        super().__init__(6, 6)
        self.adapters = nn.ModuleDict({"one": nn.Linear(6, 6)})

    def get_active_setup(self) -> Any:
        """The adapters that compute."""
        return ["one"]

    def forward(self, input: Tensor) -> Any:
        """The output and a cache, as attention modules return them."""
        out = super().forward(input)
        return (out + self.adapters["one"](input) if self.get_active_setup() else out), "cache"


@torch.no_grad()
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_adapterhubs_modules_return_the_blend(beta: float) -> None:
    torch.manual_seed(0)
    adapter = HubLinear().double()
    x = torch.randn(3, 6, dtype=torch.float64)
    base = nn.functional.linear(x, adapter.weight, adapter.bias)
    full, _ = adapter(x)
    with scaled_response(adapter, beta):
        found, cache = adapter(x)
    torch.testing.assert_close(found, blend(base, full, beta), rtol=0, atol=1e-12)
    assert cache == "cache"


@pytest.mark.parametrize(
    ("unsuppressed", "expected"), [((0, 2), [1, 0.25, 1, 0.25]), ((), [0.25] * 4), (range(4), [1] * 4)]
)
def test_layers_outside_of_a_candidate_set_have_the_factor_beta(unsuppressed: Any, expected: list[float]) -> None:
    layers = discover_layers(adapted(LoraConfig(**LORA)))
    assert factors_of(layers, unsuppressed, 0.25) == expected
