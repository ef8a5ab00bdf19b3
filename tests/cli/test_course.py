"""A run of `ist train` that is resumed with something else than it began with: refused or said, whatever the method."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from ist.cli.main import main
from ist.cli.train.course import adapter_settings, check_course, saved_values
from tests.helpers.tiny import tiny_llama

ROWS = [{"instruction": f"Say {n}.", "output": str(n)} for n in range(20)]


@pytest.fixture(scope="module")
def begun(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run by each of two methods with a checkpoint after its first step."""
    folder = tmp_path_factory.mktemp("course")
    for name, rows in (("mine", ROWS), ("other", ROWS[::-1]), ("small", ROWS[:4])):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    for method in ("peft", "random"):
        assert main(command(folder, tiny_model_folder, method)) == 0
    return folder


def command(folder: Path, model: Path, method: str, data: str = "mine", *more: str) -> list[str]:
    return [
        "train", "--model_name_or_path", str(model), "--data_files", str(folder / f"{data}.json"), "--use_cpu",
        f"--method={method}", "--max_steps=2", "--save_strategy=steps", "--save_steps=1", "--lora_r=2",
        "--per_device_train_batch_size=2", "--bf16=false", "--lora_target_modules", "q_proj", "v_proj",
        "--output_dir", str(folder / method), *more,
    ]  # fmt: skip


def resumed(folder: Path, model: Path, method: str, data: str, *more: str) -> int:
    checkpoint = str(folder / method / "checkpoint-1")
    return main(command(folder, model, method, data, "--resume_from_checkpoint", checkpoint, *more))


REFUSED = [
    ("peft", ["--lora_r=4"], "another adapter (r was 2 and is 4): give the former flags, or begin a new run"),
    ("peft", ["--method=focused"], "--method peft and would resume with --method focused: give the former flags"),
    ("random", ["--lora_alpha=7"], "another adapter (lora_alpha was 32 and is 7)"),
]


@pytest.mark.parametrize(("method", "more", "message"), REFUSED)
def test_another_training_is_refused(
    begun: Path, tiny_model_folder: Path, capsys: Any, method: str, more: list[str], message: str
) -> None:
    assert resumed(begun, tiny_model_folder, method, "mine", *more) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


SAID = [
    ("peft", "other", [], ["train_dataset was '18 rows, ", "other validation data (2 rows, "]),
    ("peft", "mine", ["--learning_rate=0.1"], ["learning_rate was 0.0002 and is 0.1"]),
    ("peft", "mine", ["--seed=7"], ["seed was 42 and is 7"]),
    ("random", "mine", ["--validation_size=0"], [", now none)"]),
]


@pytest.mark.filterwarnings("ignore:The run began with other arguments")
@pytest.mark.parametrize(("method", "data", "more", "messages"), SAID)
def test_what_may_be_meant_is_said(
    begun: Path,
    tiny_model_folder: Path,
    caplog: pytest.LogCaptureFixture,
    method: str,
    data: str,
    more: list[str],
    messages: list[str],
) -> None:
    assert resumed(begun, tiny_model_folder, method, data, *more) == 0
    assert [message for message in messages if message not in caplog.text] == []


ADAPTERS = [
    ({"r": 4}, "r was 2 and is 4"),
    ({"lora_dropout": 0.5}, "lora_dropout was 0.0 and is 0.5"),
    ({"target_modules": ["q_proj"]}, "target_modules was ['q_proj', 'v_proj'] and is ['q_proj']"),
    ({"use_rslora": True}, "use_rslora was False and is True"),
    ({"use_dora": True}, "use_dora was False and is True"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save was None and is ['lm_head']"),
]


def settings_of(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"r": 2, "target_modules": ["v_proj", "q_proj"], **changes}
    return adapter_settings(get_peft_model(tiny_llama(2), LoraConfig(**config)))


@pytest.mark.parametrize(("options", "message"), ADAPTERS)
def test_another_adapter_is_refused(options: dict[str, Any], message: str) -> None:
    now = {"validation": None}
    with pytest.raises(ValueError, match=re.escape(f"The run began with another adapter ({message}): give the former")):
        check_course({"adapter": settings_of()}, {**now, "adapter": settings_of(**options)})


def test_the_same_run_resumes_without_a_word(begun: Path, tiny_model_folder: Path, caplog: Any) -> None:
    assert resumed(begun, tiny_model_folder, "peft", "mine") == 0
    assert "The run began with" not in caplog.text


def test_frozen_weights_that_are_others_are_refused() -> None:
    now = {"method": "peft", "adapter": {}, "validation": None, "base": "a"}
    with pytest.raises(ValueError, match="The frozen weights are not those that the run began with"):
        check_course({**now, "base": "b"}, now)
    check_course({}, now)
    check_course({"adapter": 3, "course": [], "base": None}, now)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"stateful_callbacks": {"RunCourse": 3}}', "{}"])
def test_a_checkpoint_that_says_nothing_is_taken(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "trainer_state.json").write_text(text)
    assert saved_values(tmp_path) == {}


def test_the_settings_of_an_adapter_are_its_own() -> None:
    assert settings_of() == settings_of(target_modules=["q_proj", "v_proj"])
    assert settings_of()["target_modules"] == ["q_proj", "v_proj"]
    assert "base_model_name_or_path" not in settings_of()
    assert adapter_settings(tiny_llama(2)) == {}
