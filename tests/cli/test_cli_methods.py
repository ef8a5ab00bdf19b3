"""`ist train --method … --adapter …`: every word trains what it says, and words that do not go together are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, TrainingArguments

from ist import read_history
from ist.cli.main import main
from ist.cli.train.arguments import known_flags, parse_arguments
from ist.cli.train.command import train
from ist.cli.train.methods import EFFECTS, EVERY_ADAPTER, METHODS, unused_flags
from tests.helpers.tiny import moved_layers, snapshot

QUICK = [
    "--task=word-problems", "--num_train_problems=40", "--num_test_problems=0", "--max_steps=6", "--use_cpu",
    "--per_device_train_batch_size=4", "--logging_steps=2", "--learning_rate=1e-2", "--lora_r=4", "--lora_dropout=0",
    "--lora_target_modules", "q_proj", "v_proj", "up_proj", "--save_strategy=no",
]  # fmt: skip


def run(model: Path, folder: Path, *arguments: str) -> dict[str, Any]:
    return train(["--model_name_or_path", str(model), *QUICK, "--output_dir", str(folder), *arguments])


def active_sets(folder: Path) -> list[tuple[int, ...]]:
    return [tuple(event["active"]) for event in read_history(folder) if event["event"] == "step"]


PERIODS = ["--num_active_layers=1", "--update_interval=2"]
# fmt: off
SETS: list[tuple[list[str], list[tuple[int, ...]]]] = [
    (["--method=lift-front-to-end", *PERIODS], [(0,), (0,), (1,), (1,), (2,), (2,)]),
    (["--method=lift-end-to-front", *PERIODS], [(3,), (3,), (2,), (2,), (1,), (1,)]),
    (["--method=fixed", "--fixed_layers=0,layers.2"], [(0, 2)] * 6),
    (["--method=fixed", "--fixed_layers=top:{scores}", "--num_active_layers=2"], [(1, 3)] * 6),
    (["--method=fixed", "--fixed_layers=bottom:{scores}", "--num_active_layers=1", "--adapter=series",
      "--bottleneck_size=4"], [(2,)] * 6),
    (["--method=fixed", "--fixed_layers=3", "--adapter=adalora"], [(3,)] * 6),
    (["--method=peft", "--adapter=adalora"], [(0, 1, 2, 3)] * 6),
]
# fmt: on


@pytest.mark.parametrize(("arguments", "sets"), SETS, ids=[" ".join(a) for a, _ in SETS])
def test_the_layers_that_a_method_trains(
    tiny_model_folder: Path, tmp_path: Path, arguments: list[str], sets: list[tuple[int, ...]]
) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text("[0.1, 0.5, -0.2, 0.4]")
    result = run(tiny_model_folder, tmp_path / "run", *(argument.format(scores=scores) for argument in arguments))
    assert active_sets(tmp_path / "run") == sets
    assert result["num_steps"] == 6


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        (["--adapter=dora"], {"peft_type": "LORA", "use_dora": True, "r": 4}),
        (["--adapter=dora", "--method=random"], {"peft_type": "LORA", "use_dora": True}),
        (["--adapter=adalora"], {"peft_type": "ADALORA", "init_r": 6, "target_r": 4, "total_step": 6, "tfinal": 1}),
        (
            ["--adapter=adalora", "--adalora_init_r=5", "--adalora_warmup_steps=2", "--adalora_final_steps=3"],
            {"peft_type": "ADALORA", "init_r": 5, "tinit": 2, "tfinal": 3, "deltaT": 1},
        ),
        ([], {"peft_type": "LORA", "use_dora": False}),
    ],
    ids=str,
)
def test_the_adapter_that_a_word_makes(
    tiny_model_folder: Path, tmp_path: Path, arguments: list[str], config: dict[str, Any]
) -> None:
    run(tiny_model_folder, tmp_path, "--update_interval=2", *arguments)
    saved = PeftConfig.from_pretrained(str(tmp_path))
    assert {name: getattr(saved, name) for name in config} == config


def test_adalora_alone_allocates_its_ranks(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Which the Trainer does not do of itself."""
    run(tiny_model_folder, tmp_path, "--method=peft", "--adapter=adalora")
    weights = load_file(tmp_path / "adapter_model.safetensors")
    values = [value for name, value in weights.items() if "lora_E" in name]
    assert sum(int((value != 0).sum()) for value in values) == 4 * len(values)
    assert sum(value.numel() for value in values) == 6 * len(values)


@pytest.mark.parametrize("method", ["lisa", "full", "lift-random"])
def test_whole_layers_are_saved_as_a_model(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    run(
        tiny_model_folder, tmp_path, "--method", method, "--adapter=none", "--num_active_layers=1",
        "--update_interval=10", "--gradient_checkpointing=true",
    )  # fmt: skip
    before = snapshot(AutoModelForCausalLM.from_pretrained(tiny_model_folder))
    after = snapshot(AutoModelForCausalLM.from_pretrained(tmp_path))
    moved = moved_layers(before, after)
    if method == "full":
        assert moved == {0, 1, 2, 3, None}
        assert not (tmp_path / "ist_history.jsonl").exists()
    else:
        (chosen,) = set(active_sets(tmp_path))
        assert moved == {*chosen, None}
        assert "1 of 4 whole layers a step, from model.layers.0" in capsys.readouterr().out
    assert not (tmp_path / "adapter_config.json").exists()


def test_a_method_goes_over_the_adapter_of_a_recipe(tiny_model_folder: Path, tmp_path: Path) -> None:
    """One word on the command line is enough for another method."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("adapter: lora\nmethod: ist\nnum_active_layers: 2\nmu: 100\nlora_r: 2\n")
    result = run(tiny_model_folder, tmp_path / "run", "--recipe", str(recipe), "--method=lisa")
    assert (result["method"], result["adapter"]) == ("lisa", "none")
    assert {len(chosen) for chosen in active_sets(tmp_path / "run")} == {2}


def test_greedy_trains_the_set_that_it_found_as_fixed_would(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--num_active_layers=2", "--seed=1", "--lora_dropout=0.1"]
    result = run(tiny_model_folder, tmp_path / "greedy", "--method=greedy", "--greedy_steps=3", *options)
    found = json.loads((tmp_path / "greedy" / "ist_greedy.json").read_text())
    assert {name: found[name] for name in result["search"]} == result["search"]
    assert (found["num_trainings"], found["num_steps"], len(found["trials"])) == (7, 21, 7)
    said = capsys.readouterr().out
    assert "greedy search: up to 7 trainings of 3 steps come first" in said
    assert "after 7 trainings, 21 steps" in said
    layers = ",".join(map(str, found["layers"]))
    run(tiny_model_folder, tmp_path / "fixed", "--method=fixed", f"--fixed_layers={layers}", *options)
    greedy, fixed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("greedy", "fixed"))
    assert all(torch.equal(greedy[name], fixed[name]) for name in fixed)


def test_a_resumed_greedy_run_keeps_its_set(tiny_model_folder: Path, tmp_path: Path) -> None:
    options = [
        "--method=greedy",
        "--num_active_layers=1",
        "--greedy_steps=1",
        "--save_strategy=steps",
        "--save_steps=3",
    ]
    run(tiny_model_folder, tmp_path, *options)
    whole = load_file(tmp_path / "adapter_model.safetensors")
    searched = (tmp_path / "ist_greedy.json").stat().st_mtime_ns
    run(tiny_model_folder, tmp_path, *options, "--resume_from_checkpoint", str(tmp_path / "checkpoint-3"))
    assert (tmp_path / "ist_greedy.json").stat().st_mtime_ns == searched
    again = load_file(tmp_path / "adapter_model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


@pytest.mark.parametrize("mode", ["frozen", "all"])
def test_recomputing_needs_no_other_flag(tiny_model_folder: Path, tmp_path: Path, mode: str) -> None:
    result = run(tiny_model_folder, tmp_path, f"--recompute={mode}")
    assert result["num_steps"] == 6


@pytest.mark.parametrize(
    ("arguments", "on"),
    [
        ([], False),
        (["--gradient_checkpointing"], True),
        (["--recompute=frozen"], False),
        (["--recompute=frozen", "--no_gradient_checkpointing"], False),
        (["--recompute=frozen", "--method=peft"], False),
        (["--method=peft", "--gradient_checkpointing", "--recompute=frozen"], True),
    ],
    ids=str,
)
def test_gradient_checkpointing_is_off_unless_asked_for(arguments: list[str], on: bool) -> None:
    assert parse_arguments([*QUICK, "--bf16=false", *arguments]).training.gradient_checkpointing == on


# ---- From a saved adapter


GOING_ON = [flag for flag in QUICK if flag.startswith("--") and not flag.startswith("--lora")]


@pytest.mark.parametrize("adapter", ["lora", "dora", "series"])
def test_training_goes_on_from_a_saved_adapter(
    tiny_model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, adapter: str
) -> None:
    shape = ["--adapter", adapter, *(["--bottleneck_size=4"] if adapter == "series" else [])]
    first = run(tiny_model_folder, tmp_path / "a", *shape, "--num_test_problems=10")
    second = train(
        ["--model_name_or_path", str(tmp_path / "a"), *GOING_ON, "--num_test_problems=10", "--output_dir",
         str(tmp_path / "b")]
    )  # fmt: skip
    assert second["before"] == first["after"]
    assert second["after"]["loss"] < second["before"]["loss"]
    assert second["adapter"] == adapter
    assert f"Training continues from the adapter in {tmp_path / 'a'} ({adapter})" in caplog.text
    saved = [PeftConfig.from_pretrained(str(tmp_path / name)) for name in "ab"]
    assert saved[0].base_model_name_or_path == saved[1].base_model_name_or_path == str(tiny_model_folder)


@pytest.fixture(scope="module")
def saved_adapter(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run(tiny_model_folder, folder, "--max_steps=1")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora_r=8", "--lora_alpha=2"], "leave out --lora_r, --lora_alpha, or give its base"),
        (["--adapter=series"], "is an adapter (lora) that training continues from as it is: leave out --adapter"),
        (["--method=full"], "--method full without an adapter trains the model's own weights: give its base"),
        (["--method=lisa"], "--method lisa without an adapter trains the model's own weights: give its base"),
        (["--method=lift-random", "--adapter=none"], "--method lift-random without an adapter trains"),
    ],
    ids=str,
)
def test_what_does_not_go_with_a_saved_adapter_is_one_line(
    saved_adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    source = ["--model_name_or_path", str(saved_adapter), "--output_dir", str(tmp_path)]
    assert main(["train", *source, *GOING_ON, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# ---- What goes with what


# fmt: off
NEW_NAME = [(["--recompute=frozen", "--activation-checkpointing"], "and --gradient_checkpointing are both on")]
if not hasattr(TrainingArguments, "activation_checkpointing"):
    NEW_NAME.clear()  # transformers before 5.23

CONTRADICTIONS: list[tuple[list[str], str]] = [
    (["--method=lisa", "--adapter=lora"], "trains the model's own weights, so --adapter lora does not go with it"),
    (["--method=full", "--adapter=dora"], "trains the model's own weights, so --adapter dora does not go with it"),
    (["--method=ist", "--adapter=none"], "--method ist trains adapters, so it does not go with --adapter none"),
    (["--method=random", "--adapter=none"], "name one, or take --method lisa"),
    (["--method=peft", "--adapter=none"], "name one, or take --method full"),
    (["--method=fixed"], "--method fixed needs --fixed_layers: indices (0,3,5), names of blocks, random, top:FILE"),
    (["--method=fixed", "--fixed_layers=9"], "The fixed layer '9' is no layer of this model"),
    (["--method=fixed", "--fixed_layers=top:none.json"], "none.json does not exist"),
    (["--adapter=adalora", "--max_steps=-1"], "--adapter adalora needs --max_steps"),
    (["--adapter=adalora", "--adalora_warmup_steps=4", "--adalora_final_steps=2"], "leave none of 6 between them"),
    (["--adapter=adalora", "--adalora_init_r=3"], "adalora_init_r=3 is not a whole number of at least 4"),
    (["--adapter=adalora", "--adalora_interval=0"], "adalora_interval=0 is not a whole number of at least 1"),
    (["--adapter=adalora", "--method=greedy"], "--method greedy does not go with AdaLoRA"),
    (["--recompute=frozen", "--gradient_checkpointing"], "and --gradient_checkpointing are both on"),
    *NEW_NAME,
    (["--method=greedy", "--greedy_steps=0"], "greedy_steps=0 is not a whole number of at least 1"),
    (["--method=lisa", "--load_in_4bit"], "quantised ones cannot be: leave load_in_4bit and load_in_8bit out"),
    (["--method=lisa", "--layers=h"], "layers='h' names no stack of at least 2 blocks with trainable weights"),
]
# fmt: on


@pytest.mark.parametrize(("arguments", "message"), CONTRADICTIONS, ids=[" ".join(a) for a, _ in CONTRADICTIONS])
def test_what_does_not_go_together_is_one_line(
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    model = ["--model_name_or_path", str(tiny_model_folder)]
    assert main(["train", *model, *QUICK, "--output_dir", str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


# fmt: off
UNUSED: list[tuple[str, str, str, str]] = [
    ("peft", "lora", "mu beta lora_r learning_rate num_active_layers", "--mu --beta --num_active_layers"),
    ("random", "lora", "mu update_interval cost_exponent num_active_layers", "--mu --update_interval"),
    ("lisa", "none", "update_interval num_active_layers lora_r fused mu", "--lora_r --fused --mu"),
    ("ist", "series", "lora_r bottleneck_size lora_modules_to_save mu", "--lora_r"),
    ("ist", "lora", "bottleneck_size adalora_init_r fixed_layers", "--bottleneck_size --adalora_init_r --fixed_layers"),
    ("ist", "adalora", "lora_r adalora_init_r use_rslora fused", "--use_rslora --fused"),
    ("fixed", "dora", "fixed_layers greedy_steps use_dora", "--greedy_steps"),
    ("greedy", "lora", "greedy_steps num_active_layers", ""),
    ("full", "none", "max_steps optimizer_state", "--optimizer_state"),
]
# fmt: on


@pytest.mark.parametrize(("method", "adapter", "given", "unused"), UNUSED)
def test_flags_without_effect_are_known(method: str, adapter: str, given: str, unused: str) -> None:
    assert unused_flags(method, adapter, given.split()) == unused.split()


def test_flags_without_effect_are_said(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny_model_folder, tmp_path, "--method=peft", "--mu=3", "--bottleneck-size", "8", "--no_fused")
    assert "without effect with lora, peft: --mu, --bottleneck_size, --fused\n" in capsys.readouterr().out


def test_every_flag_in_the_table_of_effects_is_one() -> None:
    assert all(effect.names <= known_flags() for effect in EFFECTS)
    assert all(effect.methods <= set(METHODS) and effect.adapters <= set(EVERY_ADAPTER) for effect in EFFECTS)
