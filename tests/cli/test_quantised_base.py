"""A checkpoint that is saved quantised is loaded as transformers does, or ends with its error."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Qwen3MoeConfig

from ist.cli.finite import check_finite
from ist.cli.main import main
from ist.cli.quantised import check_settings
from ist.cli.train.arguments import parse_arguments
from ist.cli.train.model import load_base
from tests.helpers.tiny import tiny_llama


def load(folder: Path, *flags: str) -> Any:
    run = parse_arguments(["--model_name_or_path", str(folder), "--task=word-problems", "--use_cpu", *flags])
    return load_base(run, str(folder), "main", None)


def packed(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint in the layout of packed integers, which the installed packages cannot read."""
    tiny_llama().save_pretrained(folder)
    weights = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if name.endswith("_proj.weight"):
            base = name.removesuffix("weight")
            weights[base + "qweight"] = torch.zeros(weight.shape[1] // 8, weight.shape[0], dtype=torch.int32)
            weights[base + "scales"] = torch.ones(1, weight.shape[0], dtype=torch.float16)
        else:
            weights[name] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
        {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    ],
    ids=["gptq", "awq"],
)
def test_what_cannot_be_read_here_is_transformers_own_error(tmp_path: Path, config: dict[str, Any]) -> None:
    folder = packed(tmp_path, config)
    with pytest.raises((ImportError, ValueError, RuntimeError)) as plain:
        AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(type(plain.value)) as ours:
        load(folder)
    assert str(ours.value) == str(plain.value)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_weights_stay_what_they_are(tmp_path: Path, bits: int) -> None:
    tiny_llama().save_pretrained(tmp_path / "whole")
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=config)
    saved.save_pretrained(tmp_path / "quantised")
    loaded = load(tmp_path / "quantised")
    assert type(loaded.model.layers[0].mlp.down_proj).__name__ == f"Linear{bits}bit".replace("8bit", "8bitLt")
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        own, expected = (model.model.layers[2].get_submodule(name).weight for model in (loaded, saved))
        assert torch.equal(own, expected)


def test_the_flag_still_quantises(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_llama().save_pretrained(tmp_path)
    assert type(load(tmp_path, "--load_in_4bit").model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    assert type(load(tmp_path).model.layers[0].mlp.down_proj) is torch.nn.Linear


@pytest.mark.parametrize("storage", ["uint8", "float16", "bfloat16", "float32"])
def test_codes_that_are_stored_as_other_numbers_are_loaded_and_saved(tmp_path: Path, storage: str) -> None:
    """Read as numbers of that type, some are NaN; FSDP needs such a type."""
    pytest.importorskip("bitsandbytes")
    tiny_llama().save_pretrained(tmp_path / "whole")
    made = load(tmp_path / "whole", "--load_in_4bit", "--bnb_4bit_quant_storage", storage)
    assert made.model.layers[0].mlp.down_proj.weight.dtype == getattr(torch, storage)
    made.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved").model.layers[0].mlp.down_proj.weight
    assert torch.equal(again.view(torch.uint8), made.model.layers[0].mlp.down_proj.weight.view(torch.uint8))
    with torch.no_grad():
        made.model.norm.weight[1] = float("nan")
    with pytest.raises(ValueError, match=r"\(1 of 39 tensors: model\.norm\.weight\)"):
        check_finite("folder", made)


def test_fp8_is_loaded_as_transformers_does(tmp_path: Path) -> None:
    """Without a GPU transformers takes the weights times their scales, which train like any others."""
    tiny_llama().save_pretrained(tmp_path)
    weights, expected = {}, {}
    for name, weight in load_file(tmp_path / "model.safetensors").items():
        weights[name] = weight
        if name.endswith("_proj.weight"):
            weights[name] = (weight / 2).to(torch.float8_e4m3fn)
            weights[f"{name}_scale_inv"] = torch.full([size // 16 for size in weight.shape], 2.0)
            expected[name] = weights[name].to(torch.bfloat16) * 2
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "config.json"
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    file.write_text(json.dumps({**json.loads(file.read_text()), "quantization_config": config}))
    plain, ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"), load(tmp_path)
    for name, weight in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    for name, weight in expected.items():
        assert torch.equal(ours.state_dict()[name].to(torch.bfloat16), weight), name


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("bits", "nested", "tensor"),
    [
        (4, False, "weight.absmax"),
        (4, True, "weight.nested_absmax"),
        (8, False, "SCB"),
        (4, True, "norm"),
        (8, False, "lm_head"),
    ],
)
def test_numbers_beside_the_codes_that_are_not_finite(
    bits: int, nested: bool, tensor: str, value: float, tmp_path: Path, capsys: Any, tiny_model_folder: Path
) -> None:
    """One line, also where the codes themselves can be any numbers."""
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_use_double_quant=nested)
    folder = tmp_path / "quantised"
    AutoModelForCausalLM.from_pretrained(tiny_model_folder, quantization_config=config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(weights) if tensor in name)
    weights[name].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n' * 8)
    data = ("--data_files", str(rows), "--output_dir", str(tmp_path / "out"), "--model_name_or_path", str(folder))
    for command in (("eval", "--protocol=loss"), ("train", "--use_cpu", "--bf16=false", "--max_steps=1")):
        capsys.readouterr()
        assert main([*command, *data]) == 2
        (line,) = (line for line in capsys.readouterr().err.splitlines() if ": error: " in line)
        assert f"The weights in {folder} hold NaN or infinite numbers (1 of " in line
        assert f" tensors: {name} in model.safetensors): load the model's files anew" in line


class Parts(torch.Tensor):
    """A tensor of a quantiser's own class, made of codes and their scale."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Parts:
        made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.bfloat16)  # type: ignore[attr-defined]
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(str(function))


class Put(torch.nn.Module):
    """What a quantiser puts in the place of a linear module."""

    def __init__(self) -> None:
        super().__init__()
        self.qweight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int32), requires_grad=False)
        self.weight = torch.nn.Parameter(torch.full((4, 4), float("nan"), dtype=torch.float16))  # packed codes
        self.weight_scale_inv = torch.nn.Parameter(torch.ones(2, 2))
        self.register_buffer("scales", torch.ones(4, 2, dtype=torch.float16))
        self.register_buffer("mask", torch.full((2, 2), float("-inf")))
        self.meta = {"scale": torch.ones(4, 1), "zero": torch.ones(4, 1), "shape": (4, 4), "group_size": 64}
        self.own = torch.nn.Parameter(Parts(torch.zeros(4, 4, dtype=torch.int8), torch.ones(4)), requires_grad=False)


PLACES = {
    "weight_scale_inv": lambda put: put.weight_scale_inv,
    "scales": lambda put: put.scales,
    "scale": lambda put: put.meta["scale"],
    "zero": lambda put: put.meta["zero"],
    "own.scale": lambda put: put.own.scale,
}


@pytest.mark.parametrize("name", PLACES)
def test_scales_of_any_quantiser_are_looked_at_and_codes_are_not(name: str) -> None:
    model: Any = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(2), "proj": Put()})
    model.hf_quantizer = object()
    check_finite("folder", model)
    with torch.no_grad():
        PLACES[name](model["proj"]).view(-1)[1] = float("inf")
    with pytest.raises(ValueError, match=rf"hold NaN or infinite numbers \(1 of \d+ tensors: proj\.{name}\): load the"):
        check_finite("folder", model)


def test_settings_that_name_every_expert_are_read(tmp_path: Path) -> None:
    """Transformers holds the experts of a layer in one parameter; settings of single ones are as many as there were
    modules. Many more are refused.
    """
    experts, layers = 128, 8
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "moe_intermediate_size": 8,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    made = Qwen3MoeConfig(num_hidden_layers=layers, num_experts=experts, vocab_size=32, **sizes)
    made.save_pretrained(tmp_path)
    file = tmp_path / "config.json"

    def write(num: int) -> None:
        named = {
            f"model.layers.{layer}.mlp.experts.{expert}.{part}": {"bits": 8}
            for layer in range(layers) for expert in range(num) for part in ("gate_proj", "up_proj", "down_proj")
        }  # fmt: skip
        settings = {"quant_method": "auto-round", "bits": 4, "extra_config": named}
        file.write_text(json.dumps({**made.to_dict(), "quantization_config": settings}))

    write(experts)
    check_settings(str(tmp_path), {})
    write(4 * experts)
    with pytest.raises(ValueError, match=r"texts, and for this model \d+ at most: it is damaged"):
        check_settings(str(tmp_path), {})
