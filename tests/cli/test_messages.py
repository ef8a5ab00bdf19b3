"""Messages name what was typed: the flag and not the keyword behind it, the module that is missing, the place."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from ist.cli.nearest import did_you_mean, nearest, unknown_flag
from ist.cli.sources import looked_for_adapter, looked_for_model
from ist.cli.train.arguments import known_flags
from ist.cli.train.targets import check_named, check_targets
from ist.cli.wording import FLAG_OF, in_flags
from ist.experiments.data.files import check_file


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("num_layers=99 is more than the 6 layers", "--num_focused_layers 99 is more than the 6 layers"),
        ("criterion='activation' or spread='even', or", "--focus_criterion activation or --focus_spread even, or"),
        ("save the measuring with selector='random'.", "save the measuring with --method random."),
        ('selector="random" measures nothing.', "--method random measures nothing."),
        ("non_linearity='reluu' is unknown", "--bottleneck_non_linearity reluu is unknown"),
        ("num_layers=0.5: give", "--num_focused_layers 0.5: give"),
        ("num_layers=3.", "--num_focused_layers 3."),
        # a part of a path stays
        ("runs/criterion=gradient/x holds", "runs/criterion=gradient/x holds"),
        ("criterion=gradient/x, spread=a.b-c/d", "criterion=gradient/x, spread=a.b-c/d"),
        ("C:\\runs\\spread=3 and a.spread=3", "C:\\runs\\spread=3 and a.spread=3"),
        ("spread=3\\x", "spread=3\\x"),
        # what is a flag already, or a part of another word, stays
        ("num_active_layers=9, --selector=x", "num_active_layers=9, --selector=x"),
        ("my_spread=3, a spread of layers", "my_spread=3, a spread of layers"),
    ],
)  # fmt: skip
def test_a_keyword_reads_as_its_flag(said: str, shown: str) -> None:
    assert in_flags(said) == shown


def test_every_flag_of_a_keyword_exists() -> None:
    assert set(FLAG_OF.values()) <= known_flags()
    assert not set(FLAG_OF) & known_flags()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm, self.act_fn = nn.LayerNorm(4), nn.SiLU()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return nn.Sequential(Block(), Block())


ALLOWED = "the model's modules that take adapters are q_proj, v_proj"


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_prj", "v_proj"], f"_modules q_prj is no module of this model (did you mean q_proj?): {ALLOWED}."),
        (["nothing"], f"--lora_target_modules nothing is no module of this model: {ALLOWED}."),
        (["act_fn"], "act_fn is no module of this model"),
        (["norm"], "norm is no module of this model"),
        (".*q_pro", f"--lora_target_modules .*q_pro matches the whole path of no module, such as 0.q_proj: {ALLOWED}."),
        ("q_pro[", "--lora_target_modules q_pro[ is no regular expression ("),
    ],
)  # fmt: skip
def test_a_target_module_that_is_not_there(model: nn.Module, targets: list[str] | str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        check_targets(model, LoraConfig(target_modules=targets), "lora_target_modules")


@pytest.mark.parametrize("targets", [["q_proj"], ["0.q_proj", "v_proj"], r".*\.v_proj", "all-linear", None])
def test_target_modules_that_are_there(model: nn.Module, targets: list[str] | str | None) -> None:
    check_targets(model, LoraConfig(target_modules=targets), "lora_target_modules")
    check_targets(model, None, "lora_target_modules")


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"modules_to_save": ["q_proj", "0.norm"]}, ""),
        (
            {"modules_to_save": ["nrom"]},
            "names nrom for modules_to_save, and that is no module of this model (did you m",
        ),
        ({"target_parameters": ["q_proj.weight"]}, ""),
        ({"target_parameters": ["experts"]}, "names experts for target_parameters, and that is no parameter of this "),
        ({"target_parameters": ["proj.weight"]}, "names proj.weight for target_parameters, and that is no parameter "),
        ({"target_parameters": ["eight"]}, "names eight for target_parameters, and that is no parameter of this "),
        ({"modules_to_save": "q_proj"}, "sets modules_to_save to the text 'q_proj', and it takes a list: give [\"q_p"),
    ],
)
def test_modules_and_parameters_that_peft_would_pass_over(model: nn.Module, setting: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)) if said else nullcontext():
        check_named(model, LoraConfig(target_modules=["q_proj"], **setting), "--adapter lora")
    check_named(model, None, "x")


def test_names_of_fused_experts_are_left_to_peft() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Parameter(torch.zeros(2, 4, 8))

    check_targets(nn.Sequential(Block(), Experts()), LoraConfig(target_modules=["w1"]), "lora_target_modules")
    with pytest.raises(ValueError, match="w1 is no module"):
        check_targets(nn.Sequential(Block(), nn.Conv1d(2, 2, 2)), LoraConfig(target_modules=["w1"]), "x")


@pytest.mark.parametrize(
    ("looked_for", "what"), [(looked_for_model, "model"), (looked_for_adapter, "adapter")], ids=["model", "adapter"]
)
def test_what_was_looked_for_and_where(
    looked_for: Callable[[str], AbstractContextManager[None]], what: str, tmp_path: Path
) -> None:
    path = tmp_path / "none"
    said = re.escape(f"There is no {what} at {path} (looked for {path}): --")
    with pytest.raises(ValueError, match=said), looked_for(str(path)):
        raise AssertionError("nothing is loaded")
    here = Path("nope").absolute()
    said = f"nope is not a folder here ({here}), and the Hugging Face hub gave no {what} (No such repository): --"
    with pytest.raises(ValueError, match=re.escape(said)), looked_for("nope"):
        raise OSError("No such repository.\nMore.")
    with (
        pytest.raises(ValueError, match=r"hub gave no \w+ \(Can't find 'adapter_config.json' at 'nope'\): --"),
        looked_for("nope"),
    ):
        raise ValueError("Can't find 'adapter_config.json' at 'nope'")
    with pytest.raises(ValueError, match=r"^it runs code$"), looked_for("nope"):
        raise ValueError("it runs code")
    with pytest.raises(OSError, match="No weights"), looked_for(str(tmp_path)):
        raise OSError("No weights")


def test_an_argument_that_no_flag_takes() -> None:
    assert str(unknown_flag("--max-step=3", {"max_steps"}, "x --help")) == (
        "There is no flag --max-step (did you mean --max_steps?): `x --help` lists the flags."
    )
    assert "belongs to no flag" in str(unknown_flag("3", {"max_steps"}, "x --help"))
    assert did_you_mean("zzz", {"max_steps"}) == ""
    assert nearest("n_layers", {"layers", "num_active_layers"}) == "num_active_layers"  # as the library's keywords


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for name in ("a.json", "b.jsonl", "c.csv", "d.parquet", "notes.txt"):
        (tmp_path / name).touch()
    cases = {
        tmp_path: f"{tmp_path} is a folder: name the files in it (it holds a.json, b.jsonl, c.csv, …); give a list",
        tmp_path / "*.tsv": f"{tmp_path / '*.tsv'} matches no file in {tmp_path}: give a list",
        tmp_path / "*.json": f"{tmp_path / '*.json'} is a pattern, and files go by name",
        tmp_path / "e.csv": f"There is no file {tmp_path / 'e.csv'} (looked for {tmp_path / 'e.csv'}): give a list",
    }
    for file, said in cases.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            check_file(file)
    check_file(tmp_path / "a.json")
