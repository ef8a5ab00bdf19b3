"""`ist train --method focused`: adapters on the layers that matter, `focus.json`, resume, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

from ist.cli.main import main
from ist.cli.train import focus as focus_module
from ist.cli.train.command import train
from ist.cli.train.focus_flags import FocusArguments
from ist.cli.train.methods import unused_flags
from ist.cli.train.options import field_docstrings
from ist.focusing import gradient_init
from ist.method.spreading import best_of_parts, evenly_spread, most_important
from ist.probing.criteria import CRITERIA, TRAINED
from ist.runs.history import read_history

QUICK = [
    "--task=word-problems", "--num_train_problems=40", "--num_test_problems=0", "--max_steps=6", "--use_cpu",
    "--per_device_train_batch_size=4", "--logging_steps=2", "--learning_rate=1e-2", "--lora_r=4", "--lora_dropout=0",
    "--lora_target_modules", "q_proj", "v_proj", "up_proj", "--save_strategy=no", "--method=focused",
]  # fmt: skip


def run(model: Path, folder: Path, *arguments: str) -> dict[str, Any]:
    return train(["--model_name_or_path", str(model), *QUICK, "--output_dir", str(folder), *arguments])


def focus_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "focus.json").read_text())


CHOICES = {"focused": best_of_parts, "top-gradient": most_important, "even": lambda s, n: evenly_spread(len(s), n)}


@pytest.mark.parametrize("method", CHOICES)
def test_half_of_the_layers_get_the_rank_of_all(
    tiny_model_folder: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(tiny_model_folder, tmp_path, f"--method={method}")
    told = focus_of(tmp_path)
    assert result["focus"] == told
    assert len(told["names"]) == 4
    assert (told["scores"] is None) == (method == "even")
    assert tuple(told["layers"]) == CHOICES[method](told["scores"] or [0] * 4, 2)
    saved = PeftConfig.from_pretrained(str(tmp_path))
    assert saved.layers_to_transform == told["layers"]  # type: ignore[attr-defined]
    assert saved.r == 8  # type: ignore[attr-defined]
    adapted = {name.split(".layers.")[1].split(".")[0] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert adapted == set(map(str, told["layers"]))
    assert told["num_parameters"] == told["num_parameters_before"]
    assert result["fused"]["modules"] == 6
    assert "focused on 2 of 4 layers" in capsys.readouterr().out
    assert not [event for event in read_history(tmp_path) if event["event"] == "importance"]


def test_flags_of_the_focus(tiny_model_folder: Path, tmp_path: Path) -> None:
    run(
        tiny_model_folder, tmp_path, "--num_focused_layers=0.75", "--focused_rank=kept", "--focus_criterion=activation",
        "--focus_spread=distance",
    )  # fmt: skip
    told = focus_of(tmp_path)
    assert len(told["layers"]) == 3
    assert set(told["ranks"].values()) == {4}
    assert (told["criterion"], told["spread"]) == ("activation", "distance")


@pytest.mark.parametrize("criterion", [name for name in CRITERIA if name not in TRAINED])
def test_every_criterion_of_a_model_without_adapters(tiny_model_folder: Path, tmp_path: Path, criterion: str) -> None:
    run(tiny_model_folder, tmp_path, f"--focus_criterion={criterion}", "--max_steps=1")
    told = focus_of(tmp_path)
    assert told["criterion"] == criterion
    assert tuple(told["layers"]) == best_of_parts(told["scores"], 2)
    assert f"`{criterion}`" in field_docstrings(FocusArguments)["focus_criterion"], "the flag's help"


def test_same_command_same_adapter(tiny_model_folder: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        run(tiny_model_folder, tmp_path / name)
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "other"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert focus_of(tmp_path / "one")["scores"] == focus_of(tmp_path / "other")["scores"]


def test_the_lowest_part_is_left_out_and_the_start_is_the_gradients(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_to = []
    monkeypatch.setattr(focus_module, "gradient_init", lambda *a, **b: set_to.append(gradient_init(*a, **b)))
    more = ("--method=even", "--focus_min_depth=0.5", "--focus_init=gradient", "--max_steps=2")
    result = run(tiny_model_folder, tmp_path, *more, "--save_strategy=steps", "--save_steps=1")
    assert result["focus"] == focus_of(tmp_path)
    assert (result["focus"]["layers"], result["focus"]["init"]) == ([2, 3], "gradient")
    assert set_to == [6]
    (tmp_path / "adapter_model.safetensors").unlink()
    run(tiny_model_folder, tmp_path, *more, f"--resume_from_checkpoint={tmp_path / 'checkpoint-1'}")
    assert set_to == [6], "a resumed adapter does not start anew"


@pytest.mark.parametrize("more", [["--packing"], ["--adapter=series", "--bottleneck_size=4"], ["--adapter=dora"]])
def test_packed_rows_and_other_adapters(tiny_model_folder: Path, tmp_path: Path, more: list[str]) -> None:
    run(tiny_model_folder, tmp_path, "--max_length=128", *more)
    assert len(focus_of(tmp_path)["layers"]) == 2


def test_a_resumed_run_keeps_its_layers_and_measures_nothing(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = ("--save_strategy=steps", "--save_steps=3")
    run(tiny_model_folder, tmp_path / "whole", *saving)
    run(tiny_model_folder, tmp_path / "cut", *saving, "--lr_scheduler_type=linear")
    before = focus_of(tmp_path / "cut")

    def fail(*arguments: Any, **options: Any) -> None:
        raise AssertionError("a resumed run measured again")

    monkeypatch.setattr(focus_module, "probe_batches", fail)
    (tmp_path / "cut" / "adapter_model.safetensors").unlink()
    checkpoint = str(tmp_path / "cut" / "checkpoint-3")
    run(tiny_model_folder, tmp_path / "cut", *saving, f"--resume_from_checkpoint={checkpoint}")
    assert focus_of(tmp_path / "cut") == before
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)

    (tmp_path / "cut" / "focus.json").write_text("[]")
    with pytest.raises(ValueError, match=r"focus\.json cannot be read .* put it back"):
        run(tiny_model_folder, tmp_path / "cut", f"--resume_from_checkpoint={checkpoint}")


def test_a_single_layer_trains(tiny_model_folder: Path, tmp_path: Path) -> None:
    assert len(run(tiny_model_folder, tmp_path, "--num_focused_layers=1")["focus"]["layers"]) == 1
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len({name.split(".layers.")[1].split(".")[0] for name in saved}) == 1
    assert any(weight.any() for name, weight in saved.items() if "lora_B" in name)


def test_a_saved_adapter_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    run(tiny_model_folder, tmp_path / "first")
    with pytest.raises(ValueError, match="chooses layers before there are adapters"):
        train(
            ["--model_name_or_path", str(tmp_path / "first"), "--task=word-problems", "--max_steps=1", "--use_cpu",
             "--num_test_problems=0", "--method=focused", "--output_dir", str(tmp_path / "second")]
        )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_focused_layers=0"], "num_focused_layers=0"),
        (["--num_focused_layers=many"], "num_focused_layers='many' is not a number"),
        (["--num_focused_layers=9"], "--num_focused_layers 9 is more than the 4 layers that get adapters"),
        (
            ["--lora_target_modules=q_prj"],
            "--lora_target_modules q_prj is no module of this model (did you mean q_proj?)",
        ),
        (["--adapter=series", "--bottleneck_target_modules=none"], "--bottleneck_target_modules none is no module of"),
        (["--adapter=series", "--bottleneck_non_linearity=reluu"], "--bottleneck_non_linearity reluu is unknown"),
        (["--focused_rank=-1"], "focused_rank=-1 is not a whole number"),
        (["--focused_rank=big"], "give a rank, or 'moved', 'kept' or 'uneven'"),
        (["--focus_criterion=gate"], "focus_criterion='gate' is unknown"),
        (["--focus_spread=wide"], "focus_spread='wide' is unknown"),
        (["--focus_init=svd"], "focus_init='svd' is unknown"),
        (["--focus_init=gradient", "--adapter=series"], "--focus_init gradient sets A of LoRA, which --adapter series"),
        (["--focus_min_depth=1"], "focus_min_depth=1.0 is not allowed: give a fraction of the depth from 0 to below 1"),
        (["--focus_min_depth=0.75"], "min_depth=0.75 leaves 1 of 4 layers, and 2 are to be kept"),
        (["--adapter=none"], "--method focused trains adapters"),
    ],
)
def test_what_does_not_fit_is_one_line(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    command = ["train", "--model_name_or_path", str(tiny_model_folder), *QUICK, "--output_dir", str(tmp_path / "run")]
    assert main([*command, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_flags_without_effect_are_named() -> None:
    assert unused_flags("focused", "series", ["focus_init", "focus_min_depth"]) == ["--focus_init"]
    given = ["focused_rank", "num_active_layers", "recompute", "focus_spread", "mu"]
    assert unused_flags("focused", "lora", given) == ["--num_active_layers", "--mu"]
    assert unused_flags("even", "lora", given) == ["--num_active_layers", "--focus_spread", "--mu"]
    assert unused_flags("ist", "lora", given) == ["--focused_rank", "--focus_spread"]
