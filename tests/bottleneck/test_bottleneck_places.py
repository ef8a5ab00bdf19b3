"""Where bottleneck adapters go in each architecture, checked against the equations hooked onto a plain model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, RobertaConfig

from ist.bottleneck import BottleneckConfig, BottleneckLayer
from tests.helpers.bottlenecks import randomise
from tests.helpers.models import ARCHITECTURES, SIZES, TOKENS, make_batch, make_model

SERIES, PARALLEL = "paper, series", "paper, parallel"
OPTIONS: dict[str, dict[str, Any]] = {
    SERIES: {"mode": "series"},
    PARALLEL: {"mode": "parallel"},
    "houlsby": {"placement": "houlsby"},
    "pfeiffer": {"placement": "pfeiffer"},
    "he": {"placement": "he", "mode": "parallel"},
}

# By placement, the modules of a block that carry an adapter: on their input (`→ up`), on their output (`down →`) or
# around them (`∥ up`). `None` is refused: OPT's and BERT's MLP is no module, Mixtral's experts are parameters.
Row = dict[str, str | None]


def decoder(up: str, down: str, attention: str, mlp: str | None = "mlp", gate: str = "") -> Row:
    return {
        SERIES: f"→ {up}, {down} →",
        PARALLEL: f"∥ {gate}, ∥ {up}" if gate else f"∥ {up}",
        "houlsby": f"{attention} →, {down} →",
        "pfeiffer": f"{down} →",
        "he": f"∥ {mlp}" if mlp else None,
    }


LLAMA = decoder("mlp.up_proj", "mlp.down_proj", "self_attn.o_proj", gate="mlp.gate_proj")
VIT = decoder("mlp.fc1", "mlp.fc2", "attention.o_proj")
PLACES: dict[str, Row] = {
    "gpt2": decoder("mlp.c_fc", "mlp.c_proj", "attn.c_proj"),
    "opt": decoder("fc1", "fc2", "self_attn.out_proj", mlp=None),
    "gptj": decoder("mlp.fc_in", "mlp.fc_out", "attn.out_proj"),
    "bloom": decoder("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "self_attention.dense"),
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma": LLAMA,
    "phi": decoder("mlp.fc1", "mlp.fc2", "self_attn.dense"),
    "gpt-neox": decoder("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "attention.dense"),
    "falcon": decoder("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "self_attention.dense"),
    "mixtral": dict.fromkeys(OPTIONS),
    "bert": decoder("intermediate.dense", "output.dense", "attention.output.dense", mlp=None),
    "vit": VIT,
    "t5": {
        **decoder("DenseReluDense.wi", "DenseReluDense.wo", "", mlp="DenseReluDense"),
        "houlsby": "SelfAttention.o →, EncDecAttention.o →, DenseReluDense.wo →",
    },
    "swin": VIT,
}
# Not in the table: whether the paper's placement finds its projections there, or what it says.
OTHERS: dict[str, str | None] = {
    "whisper": None,
    "qwen2-moe": None,
    "qwen3-moe": "are fused into parameters",
    **dict.fromkeys(("wav2vec2", "mamba", "falcon-mamba", "mamba2", "switch"), "were not found"),
}
NUM_BLOCKS = dict.fromkeys(ARCHITECTURES, 3) | {"t5": 5, "swin": 7}
CASES = [(name, placement) for name, row in PLACES.items() for placement in OPTIONS if row[placement]]
REFUSED = [(name, placement) for name, row in PLACES.items() for placement in OPTIONS if not row[placement]]

POSITIONS = {r"→ (\S+)": "input", r"(\S+) →": "output", r"∥ (\S+)": "parallel"}


def expected_positions(cell: str) -> dict[str, str]:
    """The table's cell as positions by the name of the module in its block."""
    found = {}
    for part in cell.split(", "):
        for pattern, position in POSITIONS.items():
            if match := re.fullmatch(pattern, part):
                found[match[1]] = position
    return found


def in_block(name: str) -> str:
    """A module's name after the last number in it: the part within its block."""
    return re.sub(r"^.*\.\d+\.", "", name)


def positions(model: nn.Module) -> dict[str, str]:
    found = {n: m.bottleneck_position["default"] for n, m in model.named_modules() if isinstance(m, BottleneckLayer)}
    assert all(".0." in name or re.search(r"\.\d+\.", name) for name in found)
    return {in_block(name): position for name, position in found.items()}


def adapted(base: nn.Module, **options: Any) -> Any:
    torch.manual_seed(1)
    model = get_peft_model(base, BottleneckConfig(**{"bottleneck_size": 4, **options}))
    assert isinstance(model, PeftModel)
    return model.eval()


def output(model: nn.Module, name: str) -> Tensor:
    dtype = next(model.parameters()).dtype
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in make_batch(name).items()}
    with torch.no_grad():
        return model(**batch).logits


def hook_equation(base: nn.Module, name: str, position: str, w_down: Tensor, w_up: Tensor) -> None:
    """Put an adapter on a plain model's module by hooks: the equations with nothing of the library's."""
    module = base.get_submodule(name)

    def response(x: Tensor) -> Tensor:
        z = x @ w_down
        return (z * (z > 0)) @ w_up

    if position == "input":
        module.register_forward_pre_hook(lambda _, args: (args[0] + response(args[0]), *args[1:]))
    elif position == "output":
        module.register_forward_hook(lambda _, args, y: y + response(y))  # pyright: ignore[reportOperatorIssue, reportArgumentType]
    else:
        module.register_forward_hook(lambda _, args, y: y + response(args[0]))  # pyright: ignore[reportOperatorIssue]


def test_every_architecture_is_decided_on():
    assert PLACES.keys() | OTHERS.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("mode", ["series", "parallel"])
@pytest.mark.parametrize(("name", "message"), OTHERS.items())
@pytest.mark.filterwarnings("ignore:.*experts:UserWarning")
def test_the_papers_placement_on_the_others(name, message, mode):
    model = make_model(name)
    if message is None:
        assert positions(adapted(model, mode=mode))
        return
    with pytest.raises(ValueError, match=rf"{message}.*target_modules") as caught:
        adapted(model, mode=mode)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "placement"), CASES)
def test_placement_equals_the_equations_on_a_plain_model(name, placement):
    base = make_model(name).double().eval()
    before = output(base, name)
    model = adapted(base, **OPTIONS[placement])
    expected = expected_positions(PLACES[name][placement] or "")
    assert positions(model) == expected
    if name != "t5":  # its encoder has no cross-attention
        assert len(model.targeted_module_names) == NUM_BLOCKS[name] * len(expected)
    assert torch.equal(output(model, name), before)
    randomise(model)
    plain = make_model(name).double().eval()
    for key, layer in model.base_model.model.named_modules():
        if isinstance(layer, BottleneckLayer):
            parts: Any = (layer.bottleneck_down, layer.bottleneck_up)
            w_down, w_up = (part["default"].weight.detach().T for part in parts)
            hook_equation(plain, key, layer.bottleneck_position["default"], w_down, w_up)
    assert (output(plain, name) - before).abs().max() > 1e-5
    torch.testing.assert_close(output(model, name), output(plain, name), rtol=0, atol=1e-10)
    with model.disable_adapter():
        assert torch.equal(output(model, name), before)


@pytest.mark.parametrize(("name", "placement"), REFUSED)
def test_refusals_say_what_to_do_and_leave_the_model_as_it_was(name, placement):
    base = make_model(name)
    before = [(key, type(module)) for key, module in base.named_modules()]
    with pytest.raises(ValueError, match="pass target_modules with") as error:
        adapted(base, **OPTIONS[placement])
    assert "\n" not in str(error.value)
    if name == "mixtral":
        assert "fused into parameters (down_proj, gate_up_proj)" in str(error.value)
    assert [(key, type(module)) for key, module in base.named_modules()] == before


@pytest.mark.parametrize(
    "config",
    [
        BottleneckConfig(target_modules=["o_proj"], bottleneck_size=4),
        LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"], r=2),
    ],
    ids=["attention", "lora on experts"],
)
@pytest.mark.filterwarnings("ignore:It is recommended to:UserWarning")
def test_the_alternatives_for_fused_experts_work(config):
    base = make_model("mixtral").eval()
    before = output(base, "mixtral")
    model = get_peft_model(base, config)
    assert torch.equal(output(model, "mixtral"), before)
    model(**make_batch("mixtral")).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


class SharedExpert(nn.Module):
    """A mixture with fused experts beside one expert of linear modules."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(4, 6), nn.Linear(6, 4)
        self.experts = nn.Module()
        self.experts.register_parameter("gate_up_proj", nn.Parameter(torch.zeros(2, 12, 4)))


def test_linear_experts_beside_fused_ones_are_adapted_with_a_warning():
    with pytest.warns(UserWarning, match=r"\(gate_up_proj\) and get no adapters: only .* down_proj, up_proj do"):
        model = adapted(nn.Sequential(SharedExpert()))
    assert set(model.targeted_module_names) == {"0.up_proj", "0.down_proj"}


# --- BERT, whose names are ambiguous ---


def roberta() -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(
        RobertaConfig(**TOKENS, **SIZES, is_decoder=True, add_cross_attention=True)
    )


@pytest.mark.parametrize("placement", OPTIONS)
def test_head_of_a_classifier_and_cross_attention_are_not_taken_for_the_mlp(placement):
    if placement == "he":
        with pytest.raises(ValueError, match="its MLP is no module of its own"):
            adapted(roberta(), **OPTIONS[placement])
        return
    names = set(adapted(roberta(), **OPTIONS[placement]).targeted_module_names)
    parts = {
        SERIES: {"intermediate.dense", "output.dense"},
        PARALLEL: {"intermediate.dense"},
        "houlsby": {"attention.output.dense", "crossattention.output.dense", "output.dense"},
        "pfeiffer": {"output.dense"},
    }[placement]
    assert names == {f"roberta.encoder.layer.{block}.{part}" for block in range(3) for part in parts}


@pytest.mark.parametrize("excluded", [None, ["layer.0.output.dense"], r".*layer\.0\.output\.dense"])
def test_names_that_are_left_out_add_to_the_users_and_are_saved(excluded, tmp_path):
    model = randomise(adapted(make_model("bert"), exclude_modules=excluded))
    in_first = {name for name in model.targeted_module_names if ".layer.0." in name}
    assert len(model.targeted_module_names) == 6 - bool(excluded)
    assert len(in_first) == 2 - bool(excluded)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_model("bert"), tmp_path).eval()
    assert loaded.targeted_module_names == model.targeted_module_names
    assert torch.equal(output(loaded, "bert"), output(model, "bert"))


# --- the page ---


def family(row: Row) -> list[str]:
    return [name for name, other in PLACES.items() if other == row]


def table_rows() -> list[str]:
    """The table of docs/bottleneck.md: a line for each family of architectures with the same names."""
    rows = []
    for row in PLACES.values():
        line = [", ".join(family(row)), *(f"`{cell}`" if cell else "refused" for cell in row.values())]
        text = f"| {' | '.join(line)} |"
        if text not in rows:
            rows.append(text)
    return rows


def test_the_page_has_the_table():
    page = (Path(__file__).parents[2] / "docs" / "bottleneck.md").read_text()
    begin, end = (
        "<!-- places: made from the table of tests/bottleneck/test_bottleneck_places.py -->",
        "<!-- end of places -->",
    )
    table = page.split(begin)[1].split(end)[0].strip().splitlines()
    assert table[0] == f"| model | {' | '.join(OPTIONS)} |"
    assert table[2:] == table_rows()
