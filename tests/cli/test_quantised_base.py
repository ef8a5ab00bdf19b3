"""A checkpoint that is saved quantised is loaded as transformers does, or ends with its error."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from ist.cli.train.arguments import parse_arguments
from ist.cli.train.model import load_base
from ist.cli.weights import check_finite
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
    with pytest.raises(ValueError, match=r"\(1 of 11 tensors: model\.norm\.weight\)"):
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
