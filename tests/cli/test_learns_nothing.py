"""Adapters whose numbers leave nothing to learn: refused before a training, new or saved, and said in an evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ist.bottleneck import BottleneckConfig
from ist.cli.main import main
from ist.cli.saved_adapter import check_learning, factors_of_0

ON = {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
KINDS: dict[str, Any] = {
    "lora": LoraConfig(**ON),
    "dora": LoraConfig(use_dora=True, **ON),
    "lokr": LoKrConfig(**ON),
    "loha": LoHaConfig(**ON),
    "oft": OFTConfig(oft_block_size=4, **ON),
    "bottleneck": BottleneckConfig(**ON),
}
NOTHING = [
    ("lora", {"lora_alpha": 0}, "lora_alpha to 0, with which the adapter adds nothing: give another number."),
    ("lora", {"lora_alpha": 0.0}, "lora_alpha to 0, with which the adapter adds nothing: give another number."),
    ("lora", {"lora_dropout": 1}, "lora_dropout to 1: give a number from 0 to below 1."),
    ("lora", {"lora_dropout": 1.5}, "lora_dropout to 1.5: give a number from 0 to below 1."),
    ("lora", {"alpha_pattern": {"q_proj": 0}}, "alpha_pattern of 'q_proj' to 0, with which the adapter adds nothing"),
    ("lora", {"rank_pattern": {"q_proj": 0}}, "rank_pattern of 'q_proj' to 0, with which the adapter adds nothing"),
    ("dora", {"lora_alpha": 0}, "lora_alpha to 0, with which the adapter adds nothing: give another number."),
    ("dora", {"lora_dropout": 1}, "lora_dropout to 1: give a number from 0 to below 1."),
    ("lokr", {"alpha": 0}, "alpha to 0, with which the adapter adds nothing: give another number."),
    ("loha", {"module_dropout": 1}, "module_dropout to 1: give a number from 0 to below 1."),
    ("loha", {"alpha_pattern": {"q_proj": 0}}, "alpha_pattern of 'q_proj' to 0, with which the adapter adds"),
    ("oft", {"module_dropout": 1}, "module_dropout to 1: give a number from 0 to below 1."),
    ("bottleneck", {"scaling": 0}, "scaling to 0, with which the adapter adds nothing: give another number."),
]


NEW = {"lora": "lora_r", "bottleneck": "bottleneck_size"}
OF: dict[str, list[str]] = {"lora": [], "bottleneck": ["--adapter=series"]}
"""The flag of a new adapter's rank, and that of its kind."""


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n' * 8)
    return file


def saved(model: Path, folder: Path, kind: str, **settings: Any) -> Path:
    """A saved adapter whose configuration has other numbers."""
    base: Any = AutoModelForCausalLM.from_pretrained(model)
    get_peft_model(base, KINDS[kind]).save_pretrained(str(folder))
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


def run(capsys: Any, *arguments: Any) -> tuple[int, list[str]]:
    capsys.readouterr()
    status = main([*map(str, arguments)])
    return status, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("kind", "settings", "said"), NOTHING)
def test_no_training_continues_from_an_adapter_that_learns_nothing(
    kind: str, settings: dict[str, Any], said: str, tiny_model_folder: Path, rows: Path, tmp_path: Path, capsys: Any
) -> None:
    """Nor does a new one take such numbers from its file."""
    adapter = saved(tiny_model_folder, tmp_path / "adapter", kind, **settings)
    train = ("train", "--use_cpu", "--bf16=false", "--max_steps=1", "--data_files", rows, "--output_dir")
    for number, model in enumerate(([adapter], [tiny_model_folder, "--adapter", adapter])):
        folder = tmp_path / f"out{number}"
        status, lines = run(capsys, *train, folder, "--model_name_or_path", *model)
        assert (status, len(lines)) == (2, 1)
        assert f"{adapter} sets {said}" in lines[0]
        assert not (folder / "adapter_model.safetensors").exists()


def test_no_training_continues_from_zeros_alone(
    tiny_model_folder: Path, rows: Path, tmp_path: Path, capsys: Any
) -> None:
    """Of LoRA's product each matrix has a gradient only where the other is not zero."""
    adapter = saved(tiny_model_folder, tmp_path / "adapter", "lora")
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name: torch.zeros_like(weight) for name, weight in weights.items()}, file)
    train = (
        "train",
        "--use_cpu",
        "--bf16=false",
        "--max_steps=1",
        "--data_files",
        rows,
        "--model_name_or_path",
        adapter,
    )
    status, lines = run(capsys, *train, "--output_dir", tmp_path / "out")
    assert (status, len(lines)) == (2, 1)
    assert f"The adapter in {adapter} holds zeros alone, from which no gradient starts: give its base" in lines[0]
    first = next(iter(weights))
    save_file({name: torch.zeros_like(weight).add_(name == first) for name, weight in weights.items()}, file)
    assert run(capsys, *train, "--output_dir", tmp_path / "other")[0] == 0


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("lora", {"r": 10**9}, "sets r to 1000000000, which no memory holds: give at most 65536."),
        ("lora", {"rank_pattern": {"q_proj": 10**9}}, "sets rank_pattern of 'q_proj' to 1000000000, which no memory"),
        ("bottleneck", {"bottleneck_size": 10**9}, "sets bottleneck_size to 1000000000, which no memory holds"),
    ],
)
def test_a_rank_that_no_memory_holds_is_refused_before_its_matrices_are_made(
    kind: str, settings: dict[str, Any], said: str, tiny_model_folder: Path, rows: Path, tmp_path: Path, capsys: Any
) -> None:
    adapter = saved(tiny_model_folder, tmp_path / "adapter", kind, **settings)
    train = ("train", "--use_cpu", "--bf16=false", "--data_files", rows, "--model_name_or_path")
    for model in ([adapter], [tiny_model_folder, "--adapter", adapter]):
        status, lines = run(capsys, *train, *model)
        assert (status, len(lines)) == (2, 1)
        assert f"{adapter} {said}" in lines[0]
    status, lines = run(capsys, *train, tiny_model_folder, f"--{NEW[kind]}={10**9}", *OF[kind])
    assert (status, len(lines)) == (2, 1)
    assert "to 1000000000, which no memory holds" in lines[0]


def test_a_new_vera_that_begins_at_0_twice_learns_nothing(
    tiny_model_folder: Path, rows: Path, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "vera.json"
    file.write_text(json.dumps({"peft_type": "VERA", "d_initial": 0}))
    status, lines = run(
        capsys, "train", "--use_cpu", "--bf16=false", "--data_files", rows, "--model_name_or_path", tiny_model_folder,
        "--adapter", file,
    )  # fmt: skip
    assert (status, len(lines)) == (2, 1)
    assert "sets d_initial to 0, with which the adapter learns nothing: give another number." in lines[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora_alpha": 0}, "sets lora_alpha to 0, with which the adapter adds nothing."),
        ({"alpha_pattern": {"q_proj": 0}}, "sets alpha_pattern of 'q_proj' to 0, with which the adapter adds nothing "),
        ({"lora_dropout": 1}, ""),  # It is off in an evaluation.
    ],
)
def test_an_evaluation_says_that_its_adapter_adds_nothing(
    settings: dict[str, Any], said: str, tiny_model_folder: Path, rows: Path, tmp_path: Path, capsys: Any
) -> None:
    adapter = saved(tiny_model_folder, tmp_path / "adapter", "lora", **settings)
    status, lines = run(
        capsys, "eval", "--adapter", adapter, "--protocol=loss", "--data_files", rows, "--output_dir", tmp_path / "out"
    )
    assert status == 0
    assert [f"The adapter in {adapter} {said}" in line for line in lines] == ([True] if said else [])


@pytest.mark.parametrize("kind", [*KINDS])
def test_what_is_saved_ordinarily_learns(kind: str, tiny_model_folder: Path, tmp_path: Path) -> None:
    """AdaLoRA's rank_pattern holds masks, and other patterns may be empty or absent."""
    config = PeftConfig.from_pretrained(str(saved(tiny_model_folder, tmp_path, kind)))
    check_learning(vars(config), "here")
    check_learning({"rank_pattern": {"q_proj": [True, False]}, "alpha_pattern": None, "rank_dropout": None}, "here")
    assert list(factors_of_0(vars(config))) == []
