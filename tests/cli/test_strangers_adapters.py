"""Adapters and models of strangers: no expression in their configuration hangs, and none imports a module."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from ist.cli import expressions, model_config, quantised
from ist.cli.expressions import check_expressions, names_of
from ist.cli.main import main
from ist.cli.quantised import check_settings
from tests.helpers.tiny import tiny_llama

ENDLESS = "(.+)+x"
RECORDED = "(.+)+$"
"""Seen in the wild: ends where it stands alone, and not where PEFT puts a number behind it."""
SETTINGS = [
    {"target_modules": ENDLESS},
    {"target_modules": [ENDLESS]},
    {"target_modules": ["q_proj"], "exclude_modules": ENDLESS},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", ENDLESS]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": [ENDLESS]},
    {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": RECORDED},
    {"target_modules": RECORDED},
    {"target_modules": ["q_proj"], "exclude_modules": [RECORDED]},
    {"target_modules": ["q_proj"], "modules_to_save": [RECORDED]},
    {"target_modules": ["q_proj"], "rank_pattern": {RECORDED: 4}},
    {"target_modules": ["q_proj"], "rank_pattern": {"(.*)*!": 4}},
    {"target_modules": ["q_proj"], "alpha_pattern": {"q_proj": 1, "((\\w|\\.)+)+!": 4}},
    {"peft_type": "IA3", "target_modules": ["q_proj"], "feedforward_modules": ENDLESS},
]
UNSLOTH = (
    r"(?:.*?(?:vision|language|text).*?(?:self_attn|attention|mlp).*?(?:k_proj|v_proj|q_proj|fc1|fc2).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|mlp)\.(?:(?:k_proj|v_proj|q_proj)))"
)
"""As a saved adapter may have it."""


@pytest.fixture(autouse=True)
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "SECONDS", 1.0)


@pytest.fixture
def adapter(tiny_model_folder: Path, tmp_path: Path) -> Path:
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    folder = tmp_path / "adapter"
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(str(folder))
    return folder


def change(adapter: Path, **settings: Any) -> Path:
    file = adapter / "adapter_config.json"
    saved = json.loads(file.read_text())
    if "peft_type" in settings:
        saved = {name: saved[name] for name in ("base_model_name_or_path", "task_type")}
    file.write_text(json.dumps({**saved, **settings}))
    return adapter


def refused(capsys: Any, *arguments: Any) -> str:
    """The only line of an error, which comes soon."""
    begin = time.perf_counter()
    assert main([*map(str, arguments)]) == 2
    assert time.perf_counter() - begin < 20
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    return line


def rows(folder: Path) -> Path:
    file = folder / "rows.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n' * 8)
    return file


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: str(list(settings.items())[-1]))
def test_an_endless_expression_is_refused(settings: dict[str, Any], adapter: Path, tmp_path: Path, capsys: Any) -> None:
    flags = ("--data_files", rows(tmp_path), "--protocol=loss", "--output_dir", tmp_path / "out")
    said = refused(capsys, "eval", "--adapter", change(adapter, **settings), *flags)
    assert f"The adapter in {adapter} has the regular expression " in said
    assert "did not end within 1 s on the names of this model's modules: repeat nothing that repeats" in said


@pytest.mark.parametrize("way", ["model", "new adapter", "flag", "base", "as a model"])
def test_every_command_that_takes_an_adapter_refuses_it(
    way: str, adapter: Path, tiny_model_folder: Path, tmp_path: Path, capsys: Any
) -> None:
    change(adapter, target_modules=ENDLESS)
    data = ("--data_files", rows(tmp_path), "--output_dir", tmp_path / "out")
    train = ("train", "--max_steps=1", "--use_cpu", "--bf16=false", *data)
    second = tmp_path / "second"
    second.mkdir()
    (second / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(adapter), "target_modules": ["q_proj"]})
    )
    arguments: tuple[Any, ...] = {
        "model": (*train, "--model_name_or_path", adapter),
        "new adapter": (*train, "--model_name_or_path", tiny_model_folder, "--adapter", adapter),
        "flag": (*train, "--model_name_or_path", tiny_model_folder, "--lora_target_modules", ENDLESS),
        "base": (*train, "--model_name_or_path", second),
        "as a model": ("eval", "--model_name_or_path", adapter, "--protocol=loss", *data),
    }[way]
    said = refused(capsys, *arguments)
    expected = f"{adapter} is an adapter, which serves as no base" if way == "base" else f"{ENDLESS!r}, which did"
    assert expected in said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "sets megatron_config, which imports a module that"),
        ({"peft_type": "XLORA", "adapters": {"a": "x"}, "hidden_size": 8}, "sets adapters, which loads other adapters"),
        ({"rank_pattern": {f"n{number}": 1 for number in range(2000)}}, "texts, and for this model "),
    ],
)
def test_settings_that_no_saved_adapter_may_have(
    settings: dict[str, Any], said: str, adapter: Path, tmp_path: Path, capsys: Any
) -> None:
    data = ("--data_files", rows(tmp_path), "--output_dir", tmp_path / "out")
    change(adapter, **settings)
    assert said in refused(capsys, "eval", "--adapter", adapter, "--protocol=loss", *data)
    training = ("--max_steps=1", "--use_cpu", "--bf16=false")
    assert said in refused(capsys, "train", "--model_name_or_path", adapter, *training, *data)


@pytest.mark.parametrize("text", [UNSLOTH, r".*\.(q_proj|v_proj)$", "all-linear", "(", "a{99999999999}", "q_proj"])
def test_expressions_that_end_pass(text: str) -> None:
    check_expressions(LoraConfig(target_modules=text), tiny_llama(), "x")


def test_names_are_tried_in_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions.subprocess, "run", None)
    check_expressions(LoraConfig(target_modules=["q_proj", "model.layers.0"]), nn.Linear(1, 1), "x")


def test_an_adapter_with_an_expression_is_evaluated_as_a_model(adapter: Path, tmp_path: Path) -> None:
    data = ["--data_files", str(rows(tmp_path)), "--protocol=loss", "--output_dir"]
    change(adapter, target_modules=r".*\.q_proj")
    assert main(["eval", "--model_name_or_path", str(adapter), *data, str(tmp_path / "a")]) == 0
    assert main(["eval", "--adapter", str(adapter), *data, str(tmp_path / "b")]) == 0
    found = [json.loads((tmp_path / name / "ist_eval.json").read_text())["tasks"] for name in "ab"]
    assert found[0] == found[1]


def test_names_that_the_model_lacks_and_peft_matches_are_tried() -> None:
    """Those of embeddings anywhere, and those that experts had before they were one parameter."""
    place = "layers_of_a_mixture.experts"
    model: Any = nn.ModuleDict({"layers_of_a_mixture": nn.ModuleDict({"experts": nn.Module()})})
    model.get_submodule(place).gate_up_proj = nn.Parameter(torch.zeros(2, 2, 2))
    with pytest.raises(ValueError, match=r"which did not end within 1 s"):
        check_expressions(LoraConfig(target_modules=r"(?=.*experts\.w1$)(.+)+!"), model, "x")
    assert {"embed_tokens", "lm_head", f"{place}.w1", f"{place}.gate_up_proj"} <= set(names_of(model))


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (None, "did not start (No such file or directory). Try it again, or name the modules, such as q_proj."),
        ("echo problem >&2; echo cause >&2; exit 3", "ended with status 3 (cause). Try it again"),
        ("exit 1", "ended with status 1 (it printed nothing). Try it again"),
        ("exec sleep 60", "did not start within 1 s. Try it again"),
    ],
)
def test_a_process_that_does_not_start_is_one_line(
    script: str | None, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    if script is not None:
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o700)
    monkeypatch.setattr(expressions.sys, "executable", str(python))
    begins = f"The regular expressions of the file could not be tried in a process of their own: {python} "
    with pytest.raises(ValueError, match=re.escape(f"{begins}{said}")) as error:
        check_expressions(LoraConfig(target_modules=".*q_proj"), tiny_llama(), "the file")
    assert "\n" not in str(error.value)


SKIPS = "(?:[a-z_.0-9]+)+!"
QUANTISED: list[dict[str, Any]] = [
    {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": [SKIPS]},
    {"quant_method": "fp8", "modules_to_not_convert": ["lm_head", SKIPS]},
    {"quant_method": "awq", "bits": 4, "modules_to_not_convert": [ENDLESS]},
    {"quant_method": "compressed-tensors", "ignore": [f"re:{ENDLESS}"]},
    {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"targets": [f"re:{SKIPS}"]}}},
    {"quant_method": "gptq", "bits": 4, "dynamic": {f"-:{ENDLESS}": {}}},
    {"quant_method": "gemma", "module_quant_configs": {"((.+)+!": {}, ")": {}}},
]


@pytest.fixture
def base(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_folder, tmp_path / "base"))


def configure(folder: Path, **settings: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


@pytest.mark.parametrize("settings", QUANTISED, ids=lambda settings: str(list(settings.items())[-1]))
def test_an_endless_expression_of_a_quantised_base_is_refused(
    settings: dict[str, Any], base: Path, tmp_path: Path, capsys: Any
) -> None:
    flags = ("--data_files", rows(tmp_path), "--output_dir", tmp_path / "out")
    configure(base, quantization_config=settings)
    said = refused(capsys, "eval", "--model_name_or_path", base, "--protocol=loss", *flags)
    assert f"The quantization_config of {base} has the regular expression " in said
    assert "did not end within 1 s on the names of this model's modules" in said


@pytest.mark.parametrize("way", ["train", "base of an adapter", "adapter to train"])
def test_every_command_that_takes_a_base_refuses_it(way: str, base: Path, tmp_path: Path, capsys: Any) -> None:
    data = ("--data_files", rows(tmp_path), "--output_dir", tmp_path / "out")
    train = ("train", "--max_steps=1", "--use_cpu", "--bf16=false", *data, "--model_name_or_path")
    folder = tmp_path / "adapter"
    model: Any = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(str(folder))
    configure(base, quantization_config=QUANTISED[1])
    arguments: tuple[Any, ...] = {
        "train": (*train, base),
        "base of an adapter": ("eval", "--adapter", folder, "--protocol=loss", *data),
        "adapter to train": (*train, folder),
    }[way]
    assert f"The quantization_config of {base} has the regular expression {SKIPS!r}, which did" in refused(
        capsys, *arguments
    )


def test_too_many_names_are_refused_and_expressions_that_end_are_none_of_ours(base: Path) -> None:
    many = {"quant_method": "fp8", "modules_to_not_convert": [f"n{number}" for number in range(3000)]}
    with pytest.raises(ValueError, match=r"holds 300\d texts, and for this model \d+ at most: it is damaged"):
        check_settings(str(configure(base, quantization_config=many)), {})
    for settings in (
        {"quant_method": "awq", "modules_to_not_convert": [r".*\.(q_proj|v_proj)$", "(", "lm_head"]},
        {"quant_method": "awq", "modules_to_not_convert": None},
        ["lm_head"],
        None,
    ):
        check_settings(str(configure(base, quantization_config=settings)), {})


@pytest.mark.parametrize("command", ["eval", "train"])
def test_a_tokenizer_whose_expression_takes_too_long(command: str, base: Path, tmp_path: Path, capsys: Any) -> None:
    """Its library gives it up with what is no `Exception`."""
    file = base / "tokenizer.json"
    saved = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    saved["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, saved["pre_tokenizer"]]}
    file.write_text(json.dumps(saved))
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"instruction": "a" * 40 + "!", "output": "b"}) + "\n")
    flags = {
        "eval": ["--protocol=loss"],
        "train": ["--use_cpu", "--bf16=false", "--max_steps=1", "--validation_size=0"],
    }
    said = refused(
        capsys, command, *flags[command], "--model_name_or_path", base, "--data_files", data, "--output_dir", tmp_path
    )
    assert said.startswith(
        f"ist {command}: error: PanicException: Onig: Regex search error: retry-limit-in-match over;"
    )


def test_the_settings_of_a_part_are_found() -> None:
    config = {"text_config": {"quantization_config": {"a": 1}}, "compression_config": {"b": 2}, "c": {"d": 3}}
    assert list(quantised.settings_in(config)) == [{"a": 1}, {"b": 2}]


def test_names_alone_make_no_model(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_config.AutoModelForCausalLM, "from_config", None)
    check_settings(str(configure(base, quantization_config={"modules_to_not_convert": ["lm_head"]})), {})
