"""Series and parallel bottleneck adapters: their equations, their places, and their life as a PEFT tuner."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, OPTConfig
from transformers.pytorch_utils import Conv1D

from ist.adapters.responses import scaled_response
from ist.bottleneck import BottleneckConfig, BottleneckLayer, BottleneckModel, register
from ist.bottleneck.layer import Position
from tests.helpers.bottlenecks import randomise
from tests.helpers.processes import run

SMALL: dict[str, Any] = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS = {
    "llama": LlamaConfig(
        **SMALL, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ),
    "gpt2": GPT2Config(**SMALL, n_embd=32, n_layer=2, n_head=4, n_positions=32),
    "opt": OPTConfig(
        **SMALL,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        word_embed_proj_dim=32,
    ),
}
IDS = torch.arange(3, 19).reshape(2, 8)
SERIES_TARGETS = ["up_proj", "down_proj"]


def make_base(name: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()


def make_model(name: str = "llama", **options) -> Any:
    base = make_base(name)
    torch.manual_seed(1)
    return get_peft_model(base, BottleneckConfig(**{"bottleneck_size": 4, **options})).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapters(model: nn.Module) -> dict[str, str]:
    """Position of the default adapter, by the name of its module in the first layer's own terms."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BottleneckLayer):
            tail = name.split(".0.", 1) if ".0." in name else name.split(".1.", 1)
            found.setdefault(tail[1], set()).add(module.bottleneck_position["default"])
    assert all(len(positions) == 1 for positions in found.values())
    return {name: positions.pop() for name, positions in found.items()}


def bare_layer(position: Position, base: nn.Module | None = None, **options) -> BottleneckLayer:
    """One adapted 6 -> 10 linear module in float64 with random weights everywhere."""
    torch.manual_seed(0)
    base = nn.Linear(6, 10) if base is None else base
    mode = "parallel" if position == "parallel" else "series"
    config = BottleneckConfig(mode=mode, bottleneck_size=3, **options)
    layer = BottleneckLayer(base, "default", config=config, position=position, in_features=6, out_features=10).double()
    return randomise(layer).eval()


# --- the equations ---


def conv1d() -> Conv1D:
    module = Conv1D(10, 6)
    nn.init.normal_(module.bias)
    return module


@pytest.mark.parametrize("make_linear", [lambda: nn.Linear(6, 10), conv1d], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize(
    ("non_linearity", "f"),
    [
        ("relu", lambda z: z * (z > 0)),
        ("silu", lambda z: z / (1 + torch.exp(-z))),
        ("tanh", lambda z: 1 - 2 / (torch.exp(2 * z) + 1)),
        ("gelu", lambda z: z * (1 + torch.erf(z / 2**0.5)) / 2),
        ("leaky_relu", lambda z: torch.where(z > 0, z, 0.01 * z)),
    ],
)
@pytest.mark.parametrize("position", ["input", "output", "parallel"])
def test_forward_equals_the_equation(position, non_linearity, f, make_linear):
    linear = make_linear()
    layer = bare_layer(position, linear, non_linearity=non_linearity, scaling=0.7)
    weight = linear.weight.T if isinstance(linear, nn.Linear) else linear.weight  # (in, out)
    down: Any = layer.bottleneck_down["default"]
    up: Any = layer.bottleneck_up["default"]
    w_down, w_up = down.weight.T, up.weight.T
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    if position == "input":
        expected = (x + 0.7 * f(x @ w_down) @ w_up) @ weight + linear.bias
    elif position == "output":
        y = x @ weight + linear.bias
        expected = y + 0.7 * f(y @ w_down) @ w_up
    else:
        expected = x @ weight + linear.bias + 0.7 * f(x @ w_down) @ w_up
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_several_active_adapters_are_summed_from_the_plain_input_and_output():
    layer = bare_layer("parallel")
    places: dict[str, Position] = {"in": "input", "out": "output"}
    for name, position in places.items():
        layer.update_layer(name, config=BottleneckConfig(bottleneck_size=3), position=position)
    layer.set_adapter(["out", "default", "in"])
    randomise(layer)
    x = torch.randn(4, 6, dtype=torch.float64)
    y = layer.base_layer(x + layer.response("in", x))
    expected = y + layer.response("default", x) + layer.response("out", y)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("position", ["input", "output", "parallel"])
@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_scaling_multiplies_the_response_exactly(position, beta):
    layer = bare_layer(position, scaling=2.0)
    x = torch.randn(4, 6, dtype=torch.float64)
    plain = layer.base_layer(x)
    response = layer.response("default", plain if position == "output" else x)
    expected = layer.base_layer(x + beta * response) if position == "input" else plain + beta * response
    with scaled_response(layer, beta):
        assert layer.scaling == {"default": 2.0 * beta}
        assert torch.equal(layer(x), expected)
    assert layer.scaling == {"default": 2.0}


def test_dropout_acts_on_the_adapters_input_and_only_in_training():
    layer = bare_layer("parallel", dropout=0.5)
    x = torch.ones(64, 6, dtype=torch.float64)
    assert torch.equal(layer(x)[0], layer(x)[1])
    layer.train()
    seen = []
    layer.bottleneck_down["default"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer(x)
    assert set(seen[0].unique().tolist()) == {0.0, 2.0}


def test_start_of_training_is_that_of_a_linear_module():
    model: Any = get_peft_model(nn.Sequential(nn.Linear(100, 8)), BottleneckConfig(target_modules=["0"]))
    layer = model.base_model.model[0]
    down, up = layer.bottleneck_down["default"].weight, layer.bottleneck_up["default"].weight
    assert down.shape == (256, 100)
    assert up.shape == (100, 256)
    assert 0.099 < down.abs().max() <= 0.1  # kaiming_uniform with a = sqrt(5): bound 1 / sqrt(width)
    assert not up.any()


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
@pytest.mark.parametrize("mode", ["series", "parallel"])
def test_adapter_computes_in_its_own_dtype_and_output_keeps_the_bases(mode, autocast_adapter_dtype):
    base = make_base().to(torch.bfloat16)
    config = BottleneckConfig(mode=mode, bottleneck_size=4)
    model = get_peft_model(base, config, autocast_adapter_dtype=autocast_adapter_dtype)
    own = torch.float32 if autocast_adapter_dtype else torch.bfloat16
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {own}
    assert logits(randomise(model)).dtype == torch.bfloat16


class QuantisedLinear(nn.Module):
    """Shaped like a quantised linear module of bitsandbytes: whole-number weights that only it can read."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = in_features, out_features, torch.bfloat16
        packed = torch.arange(in_features * out_features, dtype=torch.uint8).reshape(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.reshape(self.in_features, self.out_features).to(x.dtype)


@pytest.mark.parametrize("mode", ["series", "parallel"])
def test_quantised_base(mode):
    base: Any = nn.Sequential(QuantisedLinear(4, 6))
    packed = base[0].weight.clone()
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    expected = base(x)
    config = BottleneckConfig(mode=mode, bottleneck_size=2, target_modules=["0"])
    model: Any = get_peft_model(base, config)
    assert torch.equal(model(x), expected)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    randomise(model)(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert torch.equal(model.base_model.model[0].base_layer.weight, packed)


def test_works_under_autocast():
    model = randomise(make_model())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


# --- the places (those of each architecture: test_bottleneck_places.py) ---

SERIES, PARALLEL, HOULSBY = {"mode": "series"}, {"mode": "parallel"}, {"placement": "houlsby"}
PFEIFFER, HE = {"placement": "pfeiffer"}, {"mode": "parallel", "placement": "he"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["q_proj", "o_proj"]}, {"self_attn.q_proj": "input", "self_attn.o_proj": "output"}),
        (
            {"target_modules": SERIES_TARGETS, "output_modules": ["up_proj"]},
            {"mlp.up_proj": "output", "mlp.down_proj": "input"},
        ),
        ({"target_modules": r".*\.0\.mlp\.\w+_proj", "exclude_modules": ["gate_proj"]}, None),
        ({"layers_to_transform": [0]}, None),
        ({"mode": "parallel", "target_modules": ["down_proj"]}, {"mlp.down_proj": "parallel"}),
        ({"mode": "parallel", "target_modules": ["mlp"]}, {"mlp": "parallel"}),
    ],
)
def test_named_targets(options, expected):
    model = make_model(**options)
    if expected is None:  # the first layer alone
        expected = {"mlp.up_proj": "input", "mlp.down_proj": "output"}
        assert all(".0." in name for name in model.targeted_module_names)
    assert adapters(model) == expected


def test_all_linear_modules():
    positions = adapters(make_model(target_modules="all-linear"))
    outputs = {"self_attn.o_proj", "mlp.down_proj"}
    assert len(positions) == 7
    assert {name for name, position in positions.items() if position == "output"} == outputs


def test_he_adds_a_hidden_to_hidden_adapter_to_the_mlp():
    options: dict[str, Any] = HE
    config = BottleneckConfig(bottleneck_size=4, **options)
    model = randomise(get_peft_model(make_base().double(), config))
    assert all(value.dtype == torch.float64 for value in model.parameters())  # the MLP's own, though it has no weight
    layer = model.base_model.model.model.layers[0].mlp
    assert layer.bottleneck_down["default"].weight.shape == (4, 32)
    assert layer.bottleneck_up["default"].weight.shape == (32, 4)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    w_down, w_up = layer.bottleneck_down["default"].weight.T, layer.bottleneck_up["default"].weight.T
    expected = layer.base_layer(x) + (x @ w_down).clamp(min=0) @ w_up
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


# --- training ---


@pytest.mark.parametrize("options", [SERIES, PARALLEL, HOULSBY, HE])
def test_only_adapters_are_trained_and_both_projections_learn(options):
    model = make_model(**options).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert trainable
    assert all(".bottleneck_down." in name or ".bottleneck_up." in name for name in trainable)
    assert len(trainable) == sum("bottleneck_" in name for name in before)
    optimizer = torch.optim.SGD(trainable.values(), lr=1.0)
    for step in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        # W_up starts at zero, so nothing reaches W_down in the first step.
        assert all(value.grad.any() for name, value in trainable.items() if step == 1 or "bottleneck_up" in name)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(trainable)


def test_modules_to_save_are_trained_and_saved(tmp_path):
    model = randomise(make_model(modules_to_save=["lm_head"]))
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    assert head.requires_grad
    head.data.normal_()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model))


# --- life as a PEFT tuner ---


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(
    "options",
    [SERIES, PARALLEL, HOULSBY, {"mode": "parallel", "target_modules": ["fc1", "mlp"]}],
    ids=["series", "parallel", "houlsby", "named"],
)
@pytest.mark.parametrize("is_trainable", [True, False])
def test_save_and_load_round_trip(name, options, is_trainable, tmp_path):
    options = {**options, "scaling": 0.5, "non_linearity": "gelu", "dropout": 0.1, "inference_mode": False}
    model = randomise(make_model(name, **options))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(name), tmp_path, is_trainable=is_trainable).eval()
    assert torch.equal(logits(loaded), logits(model))
    saved_otherwise = {"inference_mode", "auto_mapping"}  # PEFT writes these two as it sees fit
    for key, value in model.peft_config["default"].to_dict().items():
        assert key in saved_otherwise or getattr(loaded.peft_config["default"], key) == value, key
    ours = {key: value for key, value in model.state_dict().items() if "bottleneck_" in key}
    theirs = {key: value for key, value in loaded.state_dict().items() if "bottleneck_" in key}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert any(p.requires_grad for p in loaded.parameters()) == is_trainable


def test_loading_strictly_refuses_other_widths(tmp_path):
    make_model(bottleneck_size=4).save_pretrained(tmp_path)
    model = make_model(bottleneck_size=8)
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(make_base(), tmp_path)


def test_low_memory_loading(tmp_path):
    model = randomise(make_model())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_base(), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_saved_config_names_what_the_placement_stood_for(tmp_path):
    make_model(**HOULSBY).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert type(config) is BottleneckConfig
    assert config.target_modules == ["down_proj", "o_proj"]
    assert config.placement is None


def test_two_named_adapters(tmp_path):
    model = make_model()
    base = logits(make_base())
    model.add_adapter("other", BottleneckConfig(mode="parallel", bottleneck_size=6, scaling=0.5))
    randomise(model)
    default = logits(model)
    model.set_adapter("other")
    other = logits(model)
    assert not torch.equal(default, other)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"other"}
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    alone = PeftModel.from_pretrained(make_base(), tmp_path / "other").eval()
    assert torch.equal(logits(alone), other)
    model.set_adapter("default")
    assert torch.equal(logits(model), default)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert torch.equal(logits(model), other)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert list(layer.scaling) == list(layer.bottleneck_down) == list(layer.bottleneck_position) == ["other"]
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("options", [SERIES, HE])
def test_second_adapter_in_the_same_places(options):
    model = make_model(**options)
    model.add_adapter("other", BottleneckConfig(bottleneck_size=2, **options))
    assert all(
        set(module.scaling) == {"default", "other"} for module in model.modules() if isinstance(module, BottleneckLayer)
    )
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(make_base()))


@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter", "unmerge_adapter"])
def test_merging_is_refused_and_leaves_the_model_as_it_was(call):
    model = randomise(make_model())
    before = logits(model)
    with pytest.raises(ValueError, match="cannot be merged: a non-linearity") as error:
        getattr(model.base_model, call)()
    assert "\n" not in str(error.value)
    assert torch.equal(logits(model), before)
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    with pytest.raises(ValueError, match="cannot be merged"):
        layer.merge()


@pytest.mark.parametrize("options", [SERIES, HE])
def test_unload_gives_the_base_model_back(options):
    model = randomise(make_model(**options)).unload()
    assert not any(isinstance(module, BottleneckLayer) for module in model.modules())
    assert model.state_dict().keys() == make_base().state_dict().keys()
    assert torch.equal(logits(model), logits(make_base()))


# --- registration ---


def test_registration_is_idempotent():
    register()
    register()
    member = PeftType("BOTTLENECK")
    assert list(PeftType).count(member) == 1
    assert member is PeftType["BOTTLENECK"] is PeftType.BOTTLENECK  # pyright: ignore[reportAttributeAccessIssue]
    assert (member.name, member.value, member == "BOTTLENECK") == ("BOTTLENECK", "BOTTLENECK", True)
    assert "BOTTLENECK" in PeftType.__members__
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert PEFT_TYPE_TO_CONFIG_MAPPING["BOTTLENECK"] is BottleneckConfig  # pyright: ignore[reportArgumentType]
    assert PEFT_TYPE_TO_TUNER_MAPPING[member] is BottleneckModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[member] == "bottleneck_"


def test_registration_refuses_a_foreign_method_of_that_name(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType("BOTTLENECK"), LoraConfig)
    with pytest.raises(RuntimeError, match="a method BOTTLENECK of its own"):
        register()


LOADING = """
import sys
import ist
from peft import PeftConfig
try:
    PeftConfig.from_pretrained(sys.argv[1])
except KeyError as error:
    print("refused", error)
import ist.bottleneck
print(type(PeftConfig.from_pretrained(sys.argv[1])).__name__)
"""


def test_a_fresh_process_loads_an_adapter_after_one_import(tmp_path):
    make_model().save_pretrained(tmp_path)
    done = run(LOADING, tmp_path)
    assert done.stdout.splitlines() == ["refused 'BOTTLENECK'", "BottleneckConfig"], done.stderr


def test_model_card_says_once_how_to_load(tmp_path):
    model = make_model()
    model.add_adapter("other", BottleneckConfig(bottleneck_size=4))
    for _ in range(2):
        model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n")  # PEFT's own card goes on before it
    assert card.count("import ist.bottleneck  # before PEFT loads the adapter") == 1
    assert not (tmp_path / "other" / "README.md").exists()


# --- errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "serial"}, "mode='serial' is unknown: choose one of 'series', 'parallel'"),
        ({"bottleneck_size": 0}, "bottleneck_size=0 is not a whole number of at least 1"),
        ({"bottleneck_size": 2.5}, "bottleneck_size=2.5 is not a whole number"),
        ({"bottleneck_size": True}, "bottleneck_size=True is not a whole number"),
        ({"non_linearity": "cube"}, "non_linearity='cube' is unknown: choose one of 'relu', 'gelu'"),
        ({"dropout": 1.0}, "dropout=1.0 is not a probability in [0, 1)"),
        ({"dropout": -0.1}, "dropout=-0.1 is not a probability in [0, 1)"),
        ({"dropout": float("nan")}, "dropout=nan is not a probability"),
        ({"scaling": float("inf")}, "scaling=inf is not a finite number"),
        ({"scaling": "1"}, "scaling='1' is not a finite number"),
        ({"placement": "everywhere"}, "placement='everywhere' is unknown: choose one of 'paper', 'houlsby'"),
        ({"placement": "he"}, "placement='he' does not go with mode='series': use mode='parallel'"),
        (
            {"mode": "parallel", "placement": "houlsby"},
            "placement='houlsby' does not go with mode='parallel': use mode='series'",
        ),
        ({"placement": "paper", "target_modules": ["fc1"]}, "placement='paper' and target_modules both say where"),
        ({"target_modules": ["fc1"], "output_modules": "fc2"}, "output_modules='fc2' is not a list of names"),
        ({"mode": "parallel", "output_modules": ["fc2"]}, "has no effect in mode='parallel'"),
        ({"output_modules": ["fc2"]}, "output_modules=['fc2'] needs target_modules"),
        ({"target_modules": ".*fc1", "layers_to_transform": [0]}, "layers_to_transform has no effect"),
        ({"sparsity": 1.0}, "sparsity=1.0 is not a fraction in [0, 1): 0.8 prunes 80% of the weights, 0 none."),
        ({"sparsity": -0.1}, "sparsity=-0.1 is not a fraction"),
        ({"sparsity": float("nan")}, "sparsity=nan is not a fraction"),
        ({"sparsity": True}, "sparsity=True is not a fraction"),
        ({"sparsity": "0.8"}, "sparsity='0.8' is not a fraction"),
        ({"pruning": "grasp"}, "pruning='grasp' is unknown: choose one of 'random', 'magnitude', 'snip'"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        BottleneckConfig(**options)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


class WithAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.convolution = nn.Conv1d(4, 4, 3)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 4)), {}, "were not found in Sequential: pass target_modules"),
        (lambda: make_base("opt"), HE, "placement='he', mode='parallel' were not found in OPTForCausalLM"),
        (WithAttention, {"target_modules": ["convolution"]}, "'convolution' is a Conv1d, not a linear module:"),
        (WithAttention, {"target_modules": ["out_proj"]}, "is a NonDynamicallyQuantizableLinear, not a linear module"),
        (make_base, {"target_modules": ["mlp"]}, "'model.layers.0.mlp' is a LlamaMLP, not a linear module:"),
        (
            make_base,
            {"mode": "parallel", "target_modules": ["up_proj", "self_attn"]},
            "'model.layers.0.self_attn' is a LlamaAttention, not a linear module or an MLP",
        ),
    ],
)
def test_bad_targets_leave_the_model_as_it_was(make, options, message):
    model = make()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the message is compared below)
        get_peft_model(model, BottleneckConfig(**options))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert [(name, type(module)) for name, module in model.named_modules()] == before


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (SERIES, HE, "'model.layers.0.mlp' holds modules with adapters already"),
        (HE, HOULSBY, "'model.layers.0.mlp.down_proj' lies inside a module with an adapter"),
    ],
)
def test_adapters_are_not_nested(first, second, message):
    model = make_model(**first)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("other", BottleneckConfig(**second))
    assert list(model.peft_config) == ["default"]


def test_wrapped_module_that_returns_no_tensor():
    class Pair(nn.Module):
        def forward(self, x):
            return x, x

    layer = bare_layer("parallel", Pair())
    with pytest.raises(ValueError, match="Pair returns a tuple, not a tensor"):
        layer(torch.ones(1, 6, dtype=torch.float64))
