"""What an adapter adds is scaled by beta, exactly and for every kind of adapter, and no trace remains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from peft import (
    AdaLoraConfig,
    C3AConfig,
    FourierFTConfig,
    GraloraConfig,
    HRAConfig,
    IA3Config,
    LilyConfig,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    RandLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)
from peft.helpers import DoraCaching
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ist.adapters.blending import blend
from ist.adapters.responses import has_exact_factor, scaled_response
from ist.bottleneck import BottleneckConfig
from tests.helpers.models import make_lora, make_model, randomise, wrap
from tests.helpers.tiny import traces

BETAS = [0.0, 0.25, 0.5, 1.0]
TOLERANCE = 1e-12  # relative to the largest response; float64


class Zoo(nn.Module):
    """One module of each kind that can be adapted."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 24)
        self.no_bias = nn.Linear(16, 24, bias=False)
        self.conv1d = Conv1D(24, 16)
        self.embedding = nn.Embedding(10, 16)
        self.conv2d = nn.Conv2d(3, 4, 3)
        self.norm = nn.LayerNorm(16)


def make_input(target: str) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    if target == "embedding":
        return torch.randint(10, (2, 5), generator=generator)
    shape = (2, 3, 6, 6) if target == "conv2d" else (2, 5, 16)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def trained(config: Any, *others: Any, active: list[str] | None = None) -> PeftModel:
    """The zoo with adapters `default`, `other0`, …, in float64, each with random values, `active` of them active."""
    torch.manual_seed(0)
    model: Any = wrap(Zoo(), config)
    for i, other in enumerate(others):
        model.add_adapter(f"other{i}", other)
    model.base_model.set_adapter(["default", *(f"other{i}" for i in range(len(others)))] if others else "default")
    model = model.double().eval()
    randomise(model)
    if active is not None:
        model.base_model.set_adapter(active)
    return model


def lora(target: str, **options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 2, "lora_alpha": 3, "target_modules": [target], **options})


def bottleneck(mode: str, **options: Any) -> Callable[[], PeftModel]:
    config = {"target_modules": ["linear"], "bottleneck_size": 4, "scaling": 1.5, **options}
    return lambda: trained(BottleneckConfig(mode=mode, **config))  # type: ignore[arg-type]


LINEAR: dict[str, Any] = {"target_modules": ["linear"]}

# The adapted module, whether one factor scales its response, and the model.
ADAPTERS: dict[str, tuple[str, bool, Callable[[], PeftModel]]] = {
    "LoRA": ("linear", True, lambda: trained(lora("linear"))),
    "LoRA, no bias in the module": ("no_bias", True, lambda: trained(lora("no_bias"))),
    "LoRA, rank-stabilised": ("linear", True, lambda: trained(lora("linear", use_rslora=True))),
    "LoRA, lora_bias": ("linear", True, lambda: trained(lora("linear", lora_bias=True))),
    "LoRA, with dropout": ("linear", True, lambda: trained(lora("linear", lora_dropout=0.5))),
    "LoRA, PiSSA": ("linear", True, lambda: trained(lora("linear", init_lora_weights="pissa"))),
    "LoRA on Conv1D": ("conv1d", True, lambda: trained(lora("conv1d", fan_in_fan_out=True))),
    "LoRA on Embedding": ("embedding", True, lambda: trained(lora("embedding"))),
    "LoRA on Conv2d": ("conv2d", True, lambda: trained(lora("conv2d"))),
    "two LoRAs, the first active": (
        "linear",
        True,
        lambda: trained(lora("linear"), lora("linear", r=4, lora_alpha=7), active=["default"]),
    ),
    "two LoRAs, the second active": (
        "linear",
        True,
        lambda: trained(lora("linear"), lora("linear", r=4, lora_alpha=7), active=["other0"]),
    ),
    "two LoRAs, both active": ("linear", True, lambda: trained(lora("linear"), lora("linear", r=4, lora_alpha=7))),
    "DoRA": ("linear", False, lambda: trained(lora("linear", use_dora=True))),
    "DoRA on Conv1D": ("conv1d", False, lambda: trained(lora("conv1d", use_dora=True, fan_in_fan_out=True))),
    "DoRA on Embedding": ("embedding", False, lambda: trained(lora("embedding", use_dora=True))),
    "LoRA and DoRA, LoRA active": (
        "linear",
        True,
        lambda: trained(lora("linear"), lora("linear", use_dora=True), active=["default"]),
    ),
    "LoRA and DoRA, both active": ("linear", False, lambda: trained(lora("linear"), lora("linear", use_dora=True))),
    "AdaLoRA": ("linear", True, lambda: trained(AdaLoraConfig(init_r=4, total_step=10, **LINEAR))),
    "IA3": ("linear", False, lambda: trained(IA3Config(feedforward_modules=[], **LINEAR))),
    "IA3, feed-forward": ("linear", False, lambda: trained(IA3Config(feedforward_modules=["linear"], **LINEAR))),
    "LoHa": ("linear", True, lambda: trained(LoHaConfig(r=2, **LINEAR))),
    "LoKr": ("linear", True, lambda: trained(LoKrConfig(r=2, **LINEAR))),
    "OFT": ("linear", False, lambda: trained(OFTConfig(oft_block_size=8, **LINEAR))),
    "VeRA": ("linear", False, lambda: trained(VeraConfig(r=4, **LINEAR))),
    "HRA": ("linear", False, lambda: trained(HRAConfig(r=4, **LINEAR))),
    "LN tuning": ("norm", False, lambda: trained(LNTuningConfig(target_modules=["norm"]))),
    "VB-LoRA": (
        "linear",
        False,
        lambda: trained(VBLoRAConfig(r=2, num_vectors=8, vector_length=8, **LINEAR)),
    ),
    "RandLoRA": ("linear", True, lambda: trained(RandLoraConfig(r=4, **LINEAR))),
    "FourierFT": ("linear", True, lambda: trained(FourierFTConfig(n_frequency=20, **LINEAR))),
    "MiSS": ("linear", False, lambda: trained(MissConfig(r=4, **LINEAR))),
    "C3A": ("linear", False, lambda: trained(C3AConfig(block_size=8, **LINEAR))),
    "GraLoRA": ("linear", True, lambda: trained(GraloraConfig(r=4, gralora_k=2, **LINEAR))),
    "Lily": ("linear", True, lambda: trained(LilyConfig(r=2, **LINEAR))),
    "bottleneck, series on the input": ("linear", True, bottleneck("series", output_modules=[])),
    "bottleneck, series on the output": ("linear", True, bottleneck("series", output_modules=["linear"])),
    "bottleneck, parallel": ("linear", True, bottleneck("parallel")),
    "bottlenecks, both active": (
        "linear",
        True,
        lambda: trained(
            BottleneckConfig(mode="parallel", bottleneck_size=4, **LINEAR),
            BottleneckConfig(mode="series", bottleneck_size=2, scaling=0.5, output_modules=["linear"], **LINEAR),
        ),
    ),
}
KINDS = ["LoRA", "DoRA", "IA3", "bottleneck, parallel"]

# peft has not met a norm under LN tuning, which is what it is for.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type '<class 'torch.nn.modules.norm:UserWarning")


def adapter_of(model: nn.Module, target: str) -> nn.Module:
    return model.get_submodule(f"base_model.model.{target}")


def base_and_full(model: PeftModel, adapter: nn.Module, *inputs: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        with model.disable_adapter():
            base = adapter(*inputs)
        return base, adapter(*inputs)


def error(actual: Tensor, base: Tensor, full: Tensor, beta: float) -> float:
    """The largest deviation from `base + β·(full − base)` relative to the largest response, which must not be 0."""
    response = full - base
    assert response.abs().max() > 1e-3
    return ((actual - (base + beta * response)).abs().max() / response.abs().max()).item()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize(("target", "exact", "build"), ADAPTERS.values(), ids=ADAPTERS)
def test_output_is_base_plus_beta_times_response(
    target: str, exact: bool, build: Callable[[], PeftModel], beta: float
) -> None:
    model, x = build(), make_input(target)
    adapter = adapter_of(model, target)
    base, full = base_and_full(model, adapter, x)
    with torch.no_grad(), scaled_response(adapter, beta):
        actual = adapter(x)
    assert actual.dtype == torch.float64
    assert error(actual, base, full, beta) < TOLERANCE


@pytest.mark.parametrize(("target", "exact", "build"), ADAPTERS.values(), ids=ADAPTERS)
def test_which_adapters_have_an_exact_factor(target: str, exact: bool, build: Callable[[], PeftModel]) -> None:
    assert has_exact_factor(adapter_of(build(), target)) is exact


def test_a_number_named_scaling_is_no_factor() -> None:
    """Attention modules have one: the authors' code overwrote it."""
    attention = make_model("llama").get_submodule("model.layers.0.self_attn")
    assert isinstance(attention.scaling, float)
    assert not has_exact_factor(attention)
    assert not has_exact_factor(nn.Linear(2, 2))


def test_a_factor_that_is_no_factor_of_the_response_is_not_used() -> None:
    """For DoRA multiplying `scaling` would be wrong by far more than rounding: the blend is needed."""
    model, x = ADAPTERS["DoRA"][2](), make_input("linear")
    adapter = adapter_of(model, "linear")
    base, full = base_and_full(model, adapter, x)
    adapter.scaling["default"] *= 0.25  # type: ignore[index,operator]
    with torch.no_grad():
        assert error(adapter(x), base, full, 0.25) > 0.1


@pytest.mark.filterwarnings("ignore:Careful, disabling adapter layers with bias:UserWarning")
@pytest.mark.parametrize("beta", BETAS)
def test_a_trained_bias_is_no_part_of_the_response(beta: float) -> None:
    """`bias="lora_only"` trains the module's own bias, which PEFT's switch leaves on too."""
    model, x = trained(lora("linear", bias="lora_only")), make_input("linear")
    adapter = adapter_of(model, "linear")
    base, full = base_and_full(model, adapter, x)
    with torch.no_grad(), scaled_response(adapter, beta):
        assert error(adapter(x), base, full, beta) < TOLERANCE


@pytest.mark.parametrize("beta", BETAS)
def test_with_cached_weight_norms(beta: float) -> None:
    """peft may keep DoRA's norms between two forwards."""
    model, x = ADAPTERS["DoRA"][2](), make_input("linear")
    adapter = adapter_of(model, "linear")
    with DoraCaching():
        base, full = base_and_full(model, adapter, x)
        with torch.no_grad(), scaled_response(adapter, beta):
            assert error(adapter(x), base, full, beta) < TOLERANCE
        assert torch.equal(adapter(x), full)


@pytest.mark.parametrize("kind", KINDS)
def test_one_context_inside_another_multiplies(kind: str) -> None:
    target, _, build = ADAPTERS[kind]
    model, x = build(), make_input(target)
    adapter = adapter_of(model, target)
    base, full = base_and_full(model, adapter, x)
    with torch.no_grad(), scaled_response(adapter, 0.5), scaled_response(adapter, 0.25):
        assert error(adapter(x), base, full, 0.125) < TOLERANCE


# ---- Experts, whose adapters wrap parameters


@pytest.mark.parametrize("beta", [0.25, 0.5])
@pytest.mark.parametrize(
    "parameters",
    [
        ["down_proj"],
        ["gate_up_proj"],
        ["gate_up_proj", "down_proj"],
    ],
    ids="+".join,
)
def test_experts(parameters: list[str], beta: float) -> None:
    targets = [f"mlp.experts.{parameter}" for parameter in parameters]
    model = make_lora("mixtral", target_parameters=targets).double().eval()
    randomise(model)
    experts = adapter_of(model, "model.layers.1.mlp.experts")
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(7, 32, generator=generator, dtype=torch.float64)
    chosen = torch.tensor([[i % 4, (i + 1) % 4] for i in range(7)])
    weights = torch.rand(7, 2, generator=generator, dtype=torch.float64)
    base, full = base_and_full(model, experts, hidden, chosen, weights)
    before = traces(model)
    with torch.no_grad(), scaled_response(experts, beta):
        actual = experts(hidden, chosen, weights)
    assert error(actual, base, full, beta) < TOLERANCE
    assert traces(model) == before


# ---- No trace


def everything(model: nn.Module) -> dict[str, Any]:
    """A model's state beside its parameters' values; the dicts of factors also by identity."""
    scaling = {name: id(m.scaling) for name, m in model.named_modules() if isinstance(getattr(m, "scaling", 0), dict)}
    return {**traces(model), "dicts": scaling}


def leave_normally(adapter: nn.Module, x: Tensor) -> None:
    with scaled_response(adapter, 0.25):
        adapter(x)


def leave_by_an_exception(adapter: nn.Module, x: Tensor) -> None:
    with scaled_response(adapter, 0.25):
        adapter(x)
        raise KeyboardInterrupt


def fail_in_the_adapter(adapter: nn.Module, x: Tensor) -> None:
    with scaled_response(adapter, 0.25):
        adapter(x + 99 if x.dtype == torch.int64 else x[..., :2])


WAYS_OUT = [
    (leave_normally, nullcontext()),
    (leave_by_an_exception, pytest.raises(KeyboardInterrupt)),
    (fail_in_the_adapter, pytest.raises((RuntimeError, IndexError))),
]


@pytest.mark.parametrize(("leave", "caught"), WAYS_OUT, ids=[leave.__name__ for leave, _ in WAYS_OUT])
@pytest.mark.parametrize(("target", "exact", "build"), ADAPTERS.values(), ids=ADAPTERS)
def test_leaving_restores_everything(
    target: str, exact: bool, build: Callable[[], PeftModel], leave: Callable[[nn.Module, Tensor], None], caught: Any
) -> None:
    model, x = build(), make_input(target)
    adapter = adapter_of(model, target)
    _, full = base_and_full(model, adapter, x)
    before = everything(model)
    with caught:
        leave(adapter, x)
    assert everything(model) == before
    with torch.no_grad():
        assert torch.equal(adapter(x), full)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_requires_grad_is_not_touched_inside_either(kind: str, trainable: bool) -> None:
    """PEFT's own switch for adapters turns gradients on again."""
    target, _, build = ADAPTERS[kind]
    model = build()
    for parameter in model.parameters():
        parameter.requires_grad = parameter.requires_grad and trainable
    before = traces(model)["requires_grad"]
    assert any(before.values()) is trainable
    with scaled_response(adapter_of(model, target), 0.25):
        adapter_of(model, target)(make_input(target))
        assert traces(model)["requires_grad"] == before
    assert traces(model)["requires_grad"] == before


def test_a_factor_set_by_the_user_counts_and_survives() -> None:
    model, x = trained(lora("linear")), make_input("linear")
    adapter: Any = adapter_of(model, "linear")
    plain_base, plain_full = base_and_full(model, adapter, x)
    adapter.set_scale("default", 0.7)
    value = adapter.scaling["default"]
    assert value == 0.7 * 3 / 2
    base, full = base_and_full(model, adapter, x)
    assert error(full, plain_base, plain_full, 0.7) < TOLERANCE
    with torch.no_grad(), scaled_response(adapter, 0.25):
        assert error(adapter(x), base, full, 0.25) < TOLERANCE
    assert adapter.scaling == {"default": value}


def test_a_hook_of_the_user_stays_and_sees_the_module_once() -> None:
    model, x = ADAPTERS["IA3"][2](), make_input("linear")
    adapter, calls = adapter_of(model, "linear"), []
    adapter.register_forward_hook(lambda *_: calls.append(1))
    with scaled_response(adapter, 0.25):
        adapter(x)
    adapter(x)
    assert calls == [1, 1]


# ---- Modules that return more than one tensor


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
@pytest.mark.parametrize("beta", BETAS)
def test_each_tensor_of_a_tuple_is_blended(beta: float) -> None:
    """A recurrent module returns its outputs and its last state; LN tuning trains a copy of it whole."""
    recurrent = nn.ModuleDict({"gru": nn.GRU(16, 4, batch_first=True)})
    model, x = wrap(recurrent, LNTuningConfig(target_modules=["gru"])).double(), make_input("linear")
    randomise(model)
    adapter = adapter_of(model, "gru")
    before = everything(model)
    with torch.no_grad(), model.disable_adapter():
        base = adapter(x)
    with torch.no_grad():
        full = adapter(x)
        with scaled_response(adapter, beta):
            actual = adapter(x)
    assert len(actual) == 2
    for i in range(2):
        assert error(actual[i], base[i], full[i], beta) < TOLERANCE
    assert everything(model) == before


class Pair(NamedTuple):
    hidden: Tensor
    indices: Tensor | None


@pytest.mark.parametrize(
    ("base", "full", "expected"),
    [
        (torch.tensor([0.0]), torch.tensor([4.0]), torch.tensor([1.0])),
        ((torch.tensor([0.0]), None), (torch.tensor([4.0]), None), (torch.tensor([1.0]), None)),
        ([torch.tensor([2.0])], [torch.tensor([4.0])], [torch.tensor([2.5])]),
        (((torch.tensor([0.0]),),), ((torch.tensor([4.0]),),), ((torch.tensor([1.0]),),)),
        (Pair(torch.tensor([0.0]), None), Pair(torch.tensor([4.0]), None), Pair(torch.tensor([1.0]), None)),
        (torch.tensor([1]), torch.tensor([5]), torch.tensor([5])),
        ({"cache": 1}, {"cache": 2}, {"cache": 2}),
    ],
    ids=["tensor", "tuple", "list", "nested", "named tuple", "whole numbers", "no tensor"],
)
def test_what_is_blended(base: Any, full: Any, expected: Any) -> None:
    actual = blend(base, full, 0.25)
    assert type(actual) is type(expected)
    assert actual == expected


def test_a_mapping_is_refused_in_one_line() -> None:
    outputs = {"hidden": torch.tensor([1.0])}
    with pytest.raises(ValueError, match="returned a dict, whose response cannot be scaled") as caught:
        blend(outputs, outputs, 0.25)
    assert "\n" not in str(caught.value)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)


@pytest.mark.parametrize("beta", BETAS)
def test_attention_of_torch(beta: float) -> None:
    """LoRA stands before its softmax and, as a second adapter, in its output projection: no factor is exact."""
    model = wrap(Attention(), LoraConfig(r=2, target_modules=["attention"])).double().eval()
    randomise(model)
    attention, x = adapter_of(model, "attention"), torch.randn(2, 5, 8, dtype=torch.float64)
    assert not has_exact_factor(attention)
    with torch.no_grad():
        with model.disable_adapter():
            base, _ = attention(x, x, x)
        full, _ = attention(x, x, x)
        with scaled_response(attention, beta):
            actual, weights = attention(x, x, x)
    assert error(actual, base, full, beta) < TOLERANCE
    assert weights.shape == (2, 5, 5)


# ---- What the authors' code multiplies


@pytest.mark.parametrize(
    ("kind", "exact"),
    [("LoRA", True), ("AdaLoRA", True), ("DoRA", False), ("IA3", True), ("bottleneck, parallel", True)],
)
def test_suppressing_the_factor(kind: str, exact: bool) -> None:
    """It differs for DoRA, whose factor enters the weight's norm; where there is none, the response is suppressed."""
    target, _, build = ADAPTERS[kind]
    model, x = build(), make_input(target)
    adapter = adapter_of(model, target)
    base, full = base_and_full(model, adapter, x)
    before = everything(model)
    with torch.no_grad(), scaled_response(adapter, 0.25, "scaling"):
        actual = adapter(x)
    assert (error(actual, base, full, 0.25) < TOLERANCE) is exact
    assert everything(model) == before


def test_suppressing_the_factor_of_dora_is_multiplying_it() -> None:
    model, x = ADAPTERS["DoRA"][2](), make_input("linear")
    adapter: Any = adapter_of(model, "linear")
    with torch.no_grad(), scaled_response(adapter, 0.25, "scaling"):
        actual = adapter(x)
    adapter.scaling["default"] *= 0.25
    with torch.no_grad():
        assert torch.equal(actual, adapter(x))
