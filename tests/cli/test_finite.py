"""Weights that are or become NaN or infinite: one line and status 2, no results; checkpoints stay."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ist.cli import finite
from ist.cli.analyse.command import load_adapter
from ist.cli.finite import check_finite, file_of, list_non_finite
from ist.cli.loading import load_causal_model
from ist.cli.main import main
from ist.runs.checkpoints import checkpoints
from tests.helpers.task_rows import write_collection


@pytest.mark.parametrize("method", ["random", "peft", "even"])
def test_a_training_that_diverges(
    method: str, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rate is 0 in the first two steps of its warm-up and the last good checkpoint that of the first."""
    folder = tmp_path / "run"
    status = main([
        "train", "--model_name_or_path", str(tiny_model_folder), "--task=word-problems", "--num_train_problems=40",
        "--num_test_problems=0", "--output_dir", str(folder), "--method", method, "--max_steps=12",
        "--per_device_train_batch_size=4", "--gradient_checkpointing=false", "--use_cpu", "--lora_r=4",
        "--save_strategy=steps", "--save_steps=1", "--learning_rate=1e38", "--warmup_steps=11", "--optim=sgd",
        "--max_grad_norm=0", "--logging_steps=100",
    ])  # fmt: skip
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ist train: ")]
    assert status == 2
    (line,) = said
    assert line.startswith("ist train: error: The trained weights are NaN or infinite after step ")
    assert "lower learning rate" in line
    last = max(checkpoints(folder), key=lambda path: int(path.name.rpartition("-")[2]))
    assert line.endswith(f"They were not saved: the last good checkpoint is {last}.")
    assert not (folder / "adapter_model.safetensors").exists()


# ---- Files that hold NaN or infinite numbers


NAN, INF = float("nan"), float("inf")
ROWS = '{"instruction": "a", "output": "b"}\n' * 8


def broken(file: Path, name: str, value: float) -> str:
    """Puts a number into the first tensor of a file with this in its name; returns the whole name."""
    weights = load_file(file)
    full = next(key for key in sorted(weights) if name in key)
    weights[full].view(-1)[1] = value
    save_file(weights, file, metadata={"format": "pt"})
    return full


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text(ROWS)
    return file


@pytest.fixture
def model(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    base: Any = AutoModelForCausalLM.from_pretrained(model)
    folder = tmp_path / "adapter"
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(str(folder))
    return folder


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The one line of a command that ends with status 2."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_an_adapter_that_is_not_finite_is_neither_evaluated_nor_trained(
    value: float, adapter: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = broken(adapter / "adapter_model.safetensors", "layers.1.self_attn.q_proj.lora_B", value)
    said = f"The adapter in {adapter} holds NaN or infinite numbers (1 of "
    data = ("--data_files", rows, "--output_dir", tmp_path / "out")
    for command in (
        ("eval", "--adapter", adapter, "--protocol=loss"),
        ("eval", "--model_name_or_path", adapter, "--protocol=generate"),
        ("train", "--model_name_or_path", adapter, "--use_cpu", "--bf16=false", "--max_steps=1"),
    ):
        line = refused(capsys, *command, *data)
        assert said in line
        assert f" tensors: {name} in adapter_model.safetensors): take a checkpoint from before" in line
    assert not (tmp_path / "out" / "ist_eval.json").exists()


def test_an_adapter_that_is_not_finite_is_not_analysed(model: Path, adapter: Path) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(model)
    adapted: Any = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    load_adapter(adapted, adapter)
    name = broken(adapter / "adapter_model.safetensors", "lora_A", NAN)
    with pytest.raises(ValueError, match=rf"The adapter in {re.escape(str(adapter))} holds NaN .*{re.escape(name)} in"):
        load_adapter(adapted, adapter)


def test_a_model_that_is_not_finite_is_neither_evaluated_nor_trained(
    model: Path, adapter: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base, a merged model, and the base of an adapter are loaded alike."""
    name = broken(model / "model.safetensors", "layers.0.mlp.up_proj", NAN)
    data = ("--data_files", rows, "--output_dir", tmp_path / "out")
    for command in (
        ("eval", "--model_name_or_path", model, "--protocol=loss"),
        ("eval", "--adapter", adapter, "--protocol=loss"),
        *(("train", "--model_name_or_path", model, "--use_cpu", "--bf16=false", f"--method={method}")
          for method in ("peft", "full", "focused")),
    ):  # fmt: skip
        line = refused(capsys, *command, *data)
        assert f"The weights in {model} hold NaN or infinite numbers (1 of " in line
        assert f" tensors: {name} in model.safetensors): load the model's files anew" in line


def test_the_file_of_several_is_named(model: Path) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    base.save_pretrained(model, max_shard_size="20KB")
    index = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.layers.1.mlp.down_proj.weight"
    broken(model / index[name], name, INF)
    with pytest.raises(ValueError, match=re.escape(f"tensors: {name} in {index[name]}): load the model's files anew")):
        load_causal_model(str(model))
    index_file = model / "model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": {**index, "other": index[name]}}))
    assert file_of(str(model), "none") == ""


def test_a_weight_that_float16_cannot_hold(model: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = broken(model / "model.safetensors", "norm", 1e6)
    line = refused(
        capsys, "eval", "--model_name_or_path", model, "--protocol=loss", "--dtype=float16", "--data_files", rows
    )
    assert f"{name} in model.safetensors): give --dtype float32 or bfloat16, since float16 ends at 65504" in line
    load_causal_model(str(model))


@pytest.mark.parametrize(("rank", "refused"), [("0", True), ("1", False)])
def test_a_process_that_fsdp_sends_the_weights_to_looks_at_none(
    rank: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.modeling_utils.is_fsdp_enabled", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", rank)
    model = torch.nn.Linear(2, 2)
    torch.nn.init.constant_(model.weight, NAN)
    with pytest.raises(ValueError, match=r"hold NaN .*: weight\)") if refused else nullcontext():
        check_finite("folder", model)
    check_finite("folder", torch.nn.Linear(2, 2, device="meta"))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_tensors_of_every_type_are_looked_at(dtype: torch.dtype) -> None:
    named = {
        "whole": torch.tensor([1, 2], dtype=torch.uint8),
        "empty": torch.zeros(0),
        "fine": torch.ones(2).to(dtype),
        "odd": torch.tensor([1.0, NAN]).to(dtype),
    }
    assert list_non_finite(named) == ["odd"]
    del named["odd"]
    assert list_non_finite(named) == list_non_finite({}) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mark", ["quant_state", "bnb_quantized", "hf_quantizer"])
def test_codes_of_a_quantised_matrix_are_no_numbers(dtype: torch.dtype, mark: str) -> None:
    codes = torch.randint(0, 256, (1 << 16, 1), dtype=torch.uint8, generator=torch.manual_seed(0)).view(-1).view(dtype)
    assert not codes.isfinite().all()
    model: Any = torch.nn.ModuleDict({"norm": torch.nn.LayerNorm(2), "proj": Packed()})
    model["proj"].weight = torch.nn.Parameter(codes[:, None])
    with pytest.raises(ValueError, match=r"hold NaN .*: proj\.weight\)"):
        check_finite("folder", model)
    setattr(model if mark == "hf_quantizer" else model["proj"].weight, mark, object())
    check_finite("folder", model)
    for name in ("proj.bias", "norm.weight"):
        weight = model.get_parameter(name)
        torch.nn.init.constant_(weight, NAN)
        with pytest.raises(ValueError, match=rf"hold NaN .*: {re.escape(name)}\)"):
            check_finite("folder", model)
        torch.nn.init.zeros_(weight)


class Packed(torch.nn.Module):
    """What a quantiser puts in the place of a linear module."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(2))


def test_an_infinite_mask_of_a_module_without_codes_is_none_of_a_quantisers_numbers() -> None:
    """A model's own code may take its attention from a package, as remote code does."""
    model: Any = torch.nn.ModuleDict({"attention": Packed(), "proj": Packed()})
    model.hf_quantizer = object()
    model["attention"].register_buffer("causal_bias", torch.full((2, 2), -INF).triu(1))
    check_finite("folder", model)
    model["proj"].register_buffer("qweight", torch.zeros(2, 2, dtype=torch.int32))
    model["proj"].register_buffer("scales", torch.ones(2, 2))
    check_finite("folder", model)
    model["proj"].scales[1] = INF
    with pytest.raises(ValueError, match=r"hold NaN .*: proj\.scales\)"):
        check_finite("folder", model)


def test_tensors_of_8_bits_are_converted_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    named = {str(number): torch.ones(8).to(torch.float8_e4m3fn) for number in range(4)}
    own, alive = finite.is_finite, []

    def is_finite(tensor: torch.Tensor) -> bool:
        assert not any(other() is not None for other in alive)
        alive.append(weakref.ref(tensor))
        return own(tensor)

    monkeypatch.setattr(finite, "is_finite", is_finite)
    monkeypatch.setattr(finite, "all_finite", lambda tensors: all(map(is_finite, tensors)))
    assert list_non_finite(named) == []
    assert len(alive) == 4


class Opaque(torch.Tensor):
    """A tensor whose class computes nothing."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.Tensor.detach, torch.Tensor.isfinite, torch.Tensor.float, torch.Tensor.bfloat16):
            raise NotImplementedError(f"{cls.__name__} dispatch: no {function}")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_tensors_that_nothing_can_be_told_of_are_passed_over() -> None:
    named = {
        "four bits": torch.zeros(4, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        "opaque": torch.ones(4).as_subclass(Opaque),
        "scale": torch.ones(4).to(torch.float8_e8m0fnu),
        "large": torch.tensor([3.4e38]),
        "odd": torch.tensor([NAN]),
    }
    assert list_non_finite(named) == ["odd"]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"lora_alpha": NAN}, "sets lora_alpha to nan"),
        ({"alpha_pattern": {"q_proj": INF}}, "sets alpha_pattern to inf"),
    ],
)
def test_a_number_of_an_adapter_that_is_not_finite(
    setting: dict[str, Any], said: str, adapter: Path, model: Path, rows: Path, tmp_path: Path, capsys: Any
) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **setting}))
    data = ("--data_files", rows, "--output_dir", tmp_path / "out")
    train = ("train", "--use_cpu", "--bf16=false", "--max_steps=1", "--model_name_or_path")
    for command in (
        ("eval", "--adapter", adapter, "--protocol=loss"),
        (*train, adapter),
        (*train, model, "--adapter", adapter),
    ):
        assert f"{adapter} {said}, which no layer can compute with: give" in refused(capsys, *command, *data)


@pytest.mark.parametrize("protocol", ["loss", "likelihood"])
def test_a_finite_model_that_computes_nan_has_no_result(
    protocol: str, model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The likeliest of options that are all NaN would be the first, and NaN would be kept for the next evaluation."""
    config = model / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": -1e9}))
    out = tmp_path / "out"
    data = ("--data_files", rows)
    if protocol == "likelihood":
        row = {"instruction": "Is it?\n\nAnswer format: true/false", "answer": "true"}
        data = ("--tasks", "boolq", "--data_folder", write_collection(tmp_path / "data", {"boolq": [row]}))
    line = refused(
        capsys, "eval", "--model_name_or_path", model, f"--protocol={protocol}", *data, "--output_dir", out
    )  # fmt: skip
    assert "The model computes NaN from these texts in float32, so that they have no loss" in line
    assert not any(file.read_text() for file in (out / "answers").glob("*.jsonl"))


def test_a_model_that_computes_nan_is_not_trained(
    model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights and settings are finite, and a lower learning rate would not help."""
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rms_norm_eps": -1e9}))
    data = ("--data_files", rows, "--validation_size", "1", "--output_dir", tmp_path / "out")
    flags = ("--use_cpu", "--bf16=false", "--max_steps=1")
    capsys.readouterr()
    assert main(["train", "--model_name_or_path", str(model), *flags, *map(str, data)]) == 2
    error = capsys.readouterr().err
    assert "The validation loss is NaN before the first step, so there is nothing to train: give --dtype" in error
    assert "learning rate" not in error
