"""`--adapter` beyond LoRA: types of PEFT's by name, bottlenecks by place, and files with a configuration."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ist.cli.main import main
from ist.cli.recipes.safety import check_safe
from ist.cli.saved_adapter import read_config
from ist.cli.train.adapter_files import config_from_file, peft_types
from ist.cli.train.arguments import parse_arguments
from ist.cli.train.command import train
from ist.cli.train.model import load_model

LOKR = {"peft_type": "LOKR", "r": 3, "target_modules": ["q_proj", "v_proj"]}
MIXED = {"peft_type": "BOTTLENECK", "placement": "pfeiffer", "bottleneck_size": 2, "lora_modules": ["q_proj"]}


def write(file: Path, content: Any) -> str:
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def config(*arguments: str) -> Any:
    return parse_arguments(["--model_name_or_path=m", "--data_files=x", "--bf16=false", *arguments]).peft_config()


@pytest.mark.parametrize(
    ("content", "names"),
    [(LOKR, {"lokr_w1", "lokr_w2_a", "lokr_w2_b"}), (MIXED, {"bottleneck_down", "bottleneck_up"})],
)
def test_a_configuration_trains_and_is_saved(
    tiny_model_folder: Path, tmp_path: Path, content: dict[str, Any], names: set[str], capsys: Any
) -> None:
    result = train([
        "--model_name_or_path", str(tiny_model_folder), "--task=word-problems", "--num_train_problems=8",
        "--num_test_problems=0", "--max_steps=2", "--use_cpu", "--save_strategy=no", "--bf16=false",
        "--per_device_train_batch_size=2", "--adapter", write(tmp_path / "mine.json", content), "--lora_r=5",
        "--output_dir", str(tmp_path / "run"),
    ])  # fmt: skip
    assert result["adapter"] == str(tmp_path / "mine.json")
    saved = PeftConfig.from_pretrained(str(tmp_path / "run"))
    assert saved.peft_type == content["peft_type"]
    assert names <= {part for name in load_file(tmp_path / "run/adapter_model.safetensors") for part in name.split(".")}
    assert f"without effect with {tmp_path / 'mine.json'}, ist: --lora_r" in capsys.readouterr().out


def test_what_ia3_saves_can_be_loaded(tiny_model_folder: Path, tmp_path: Path) -> None:
    run = parse_arguments(
        ["--model_name_or_path", str(tiny_model_folder), "--data_files=x", "--bf16=false", "--adapter=ia3"]
    )
    model, _, found = load_model(run)
    get_peft_model(model, found).save_pretrained(str(tmp_path / "ia3"))
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "ia3"))
    names = {name.rpartition(".")[0] for name, _ in loaded.named_parameters() if "ia3_l" in name}
    assert {name.split(".")[-2] for name in names} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip


def test_a_type_of_pefts_has_its_own_defaults_on_all_linear_modules() -> None:
    found = config("--adapter=lokr")
    assert (found.peft_type, found.r, found.target_modules, found.task_type) == ("LOKR", 8, "all-linear", "CAUSAL_LM")
    assert {"loha", "ia3", "oft", "shira", "vera"} <= set(peft_types())
    assert not {"lora", "bottleneck"} & set(peft_types())


@pytest.mark.filterwarnings("ignore:Unsupported layer type")  # PEFT's own, of every norm
def test_a_type_for_other_places_is_left_to_peft(tiny_model_folder: Path) -> None:
    """`ln_tuning` trains norms: on linear modules it would train whole copies of their weights."""
    found = config("--adapter=ln_tuning")
    assert found.target_modules is None
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_folder), found)
    names = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
    assert names
    assert all("norm" in name for name in names)


def test_modules_of_a_file_are_pefts_to_check(tiny_model_folder: Path, tmp_path: Path) -> None:
    norms = write(tmp_path / "norms.json", {"peft_type": "LN_TUNING", "target_modules": ["input_layernorm"]})
    run = parse_arguments([
        "--model_name_or_path", str(tiny_model_folder), "--data_files=x", "--bf16=false", "--adapter", norms
    ])  # fmt: skip
    assert load_model(run)[2].target_modules == ["input_layernorm"]


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": "(a+)+$"}, {"exclude_modules": "(.+)+!"}, {"rank_pattern": {"(q|k)+_proj": 4}}],
)
def test_a_strangers_file_has_no_regular_expressions(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """A user's own recipe, or the command line, may name it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "lora.json", {"peft_type": "LORA", **settings})
    write(tmp_path / "recipe.yaml", "adapter: lora.json\nmodel_name_or_path: m\ntask: word-problems\nbf16: false\n")
    with pytest.raises(
        ValueError, match="which is no name of a module: give the file on the command line as --adapter"
    ):
        parse_arguments(["--recipe", "recipe.yaml"])
    for own in (["--trust_recipe"], ["--adapter", "lora.json"]):
        found = parse_arguments(["--recipe", "recipe.yaml", *own]).peft_config()
        assert all(getattr(found, name) == value for name, value in settings.items())


def test_parts_of_a_strangers_file_are_looked_at_too(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "recipe.yaml", "adapter: a.json\nmodel_name_or_path: m\ntask: word-problems\nbf16: false\n")
    text = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4, "prompt_tuning_init": "TEXT",
            "prompt_tuning_init_text": "x", "tokenizer_name_or_path": "/home"}  # fmt: skip
    for settings, said in [
        (text, "sets tokenizer_name_or_path, which names files to load: give the file on the command line"),
        ({"peft_type": "SHADOW", "shadow_model": "/home"}, "sets shadow_model, which names files to load"),
        (
            {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 4,
             "prompt_tuning_init_state_dict_path": "/home/a.pt"},
            "sets prompt_tuning_init_state_dict_path, which names files to load",
        ),
        ({"peft_type": "BOTTLENECK", "lora_modules": ["(a+)+$"]}, "sets lora_modules to '(a+)+$', which is no name"),
        ({"peft_type": "LORA", "target_parameters": ["(a+)+$"]}, "sets target_parameters to '(a+)+$'"),
    ]:  # fmt: skip
        write(tmp_path / "a.json", settings)
        with pytest.raises(ValueError, match=re.escape(said)):
            parse_arguments(["--recipe", "recipe.yaml"])


@pytest.mark.parametrize("rounds", ["1001", "9" * 5000])
def test_rounds_that_never_end_are_refused(rounds: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.json", {"peft_type": "LORA", "init_lora_weights": f"pissa_niter_{rounds}"})
    with pytest.raises(ValueError, match="which would take for ever: give at most 1000 rounds") as error:
        config_from_file(file)
    assert len(str(error.value)) < 300
    write(tmp_path / "adapter_config.json", json.loads(Path(file).read_text()))
    with pytest.raises(ValueError, match="which would take for ever: give at most 1000 rounds"):
        read_config(str(tmp_path))


@pytest.mark.parametrize(("name", "mode"), [("houlsby", "series"), ("pfeiffer", "series"), ("he", "parallel")])
def test_bottlenecks_by_their_places(name: str, mode: str) -> None:
    found = config(f"--adapter={name}", "--bottleneck_size=5", "--bottleneck_sparsity=0.5")
    assert (found.placement, found.mode, found.bottleneck_size, found.sparsity) == (name, mode, 5, 0.5)
    run = parse_arguments(
        ["--model_name_or_path=m", "--bf16=false", f"--adapter={name}", "--bottleneck_target_modules=x"]
    )
    assert run.unused == ("--bottleneck_target_modules",)
    assert config("--adapter=series", "--bottleneck_target_modules", "o_proj").placement is None


def test_a_saved_adapters_configuration_is_a_file_too(tmp_path: Path) -> None:
    LoraConfig(r=3, target_modules=["q_proj"], base_model_name_or_path="m").save_pretrained(str(tmp_path))
    for path in (tmp_path, tmp_path / "adapter_config.json"):
        found = config("--adapter", str(path))
        assert (found.r, found.target_modules, found.base_model_name_or_path) == (3, {"q_proj"}, None)
        assert found.inference_mode is False


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "the file is not JSON (JSONDecodeError)"),
        ("[" * 10**5, "the file is not JSON (RecursionError)"),
        ([LOKR, MIXED], 'several configurations, and PEFT saves one kind of adapter with a model: for LoRA beside'),
        ("3", "holds a int, not an object with `peft_type`"),
        ({}, "has peft_type=None: choose one of "),
        ({"peft_type": "NEW"}, "has peft_type='NEW': choose one of "),
        ({"peft_type": ["LORA"]}, "has peft_type=['LORA']"),
        ({**LOKR, "rank": 3}, "sets 'rank', which LoKrConfig of this version of PEFT does not know"),
        ({"peft_type": "ADALORA"}, "give --adapter adalora"),
        ({**LOKR, "r": "3"}, "sets r to '3': give a number"),
        ({**LOKR, "r": [3]}, "sets r to [3]: give a number"),
        ({"peft_type": "LORA", "lora_dropout": 1}, "sets lora_dropout to 1: give a number from 0 to below 1"),
        ({"peft_type": "LORA", "lora_alpha": 0}, "sets lora_alpha to 0, with which the adapter adds nothing"),
        ({**LOKR, "alpha": 0}, "sets alpha to 0, with which the adapter adds nothing"),
        ({"peft_type": "LORA", "task_type": "SEQ_CLS"}, "is for SEQ_CLS, and `ist train` trains causal language"),
        ({"peft_type": "LORA", "arrow_config": {"top_k": 3}}, "sets arrow_config, which mixes other adapters"),
        ({"peft_type": "LORA", "megatron_config": {"a": 1}}, "sets megatron_config, which imports a module"),
        ({"peft_type": "PROMPT_TUNING"}, "lacks num_virtual_tokens, without a default in PEFT: give --adapter a JSON "),
        ({"peft_type": "ADAPTION_PROMPT", "adapter_len": 3}, "lacks adapter_layers, without a default in PEFT"),
        ({"peft_type": "BOTTLENECK", "mode": "up"}, "is no usable configuration (mode='up'"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_one_line(tmp_path: Path, capsys: Any, content: Any, message: str) -> None:
    file = write(tmp_path / "mine.json", content)
    assert main(["train", "--model_name_or_path=m", "--data_files=x", f"--adapter={file}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_is_neither_a_name_nor_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter='lorra' is unknown: choose one of lora, dora, .* or a JSON file"):
        config("--adapter=lorra")
    with pytest.raises(ValueError, match="is not a file; give a JSON file"):
        config_from_file(str(tmp_path))
    (tmp_path / "big.json").write_bytes(b" " * 1_000_001)
    with pytest.raises(ValueError, match="has more than 1000000 bytes"):
        config_from_file(str(tmp_path / "big.json"))


def test_a_recipe_names_no_file_outside_of_its_folder() -> None:
    with pytest.raises(ValueError, match="paths in a recipe are relative"):
        check_safe({"adapter": "/etc/mine.json"}, "recipe.yaml")
    check_safe({"adapter": "mine.json", "bottleneck_sparsity": 0.5}, "recipe.yaml")
