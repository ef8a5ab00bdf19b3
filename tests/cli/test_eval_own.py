"""`ist eval` on a user's own rows with a metric of their own, and an adapter that names its base."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ist.cli.eval.arguments import known_eval_flags
from ist.cli.eval.model import find_base
from ist.cli.eval.progress import Progress
from ist.cli.main import main
from ist.cli.metric import load_metric
from ist.cli.recipes.safety import COMMAND_LINE_ONLY, EVALUATION_KEYS
from ist.cli.train.arguments import parse_arguments
from ist.cli.train.command import train
from ist.cli.train.data import load_data
from ist.experiments.comparison import figures_of
from ist.experiments.evaluation import Accuracy

ROWS = [{"instruction": f"Say {word}.", "output": word} for word in ("yes", "no", "yes", "no", "yes")]


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path / "mine.jsonl"


def run(output: Path, *arguments: str | Path, status: int = 0) -> dict[str, Any]:
    assert main(["eval", "--output_dir", str(output), *map(str, arguments)]) == status
    return json.loads((output / "ist_eval.json").read_text()) if status == 0 else {}


def answers(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "answers" / "mine.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("flags", [(), ("--metric=exact_match",), ("--metric=label_accuracy", "--labels", "yes", "no")])
def test_own_rows_are_answered_and_marked(
    tiny_model_folder: Path, mine: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    common = ["--model_name_or_path", tiny_model_folder, "--data_files", mine, "--max_new_tokens=2"]
    result = run(tmp_path / "out", *common, *flags)
    assert result["tasks"]["mine"].keys() == {"accuracy", "low", "high", "correct", "total"}
    assert result["tasks"]["mine"]["total"] == 5
    assert result["settings"]["metric"] == (flags[0].removeprefix("--metric=") if flags else "exact_match")
    written = answers(tmp_path / "out")
    assert sorted(row["expected"] for row in written) == ["no", "no", "yes", "yes", "yes"]
    assert {"text", "score", "id", "index"} <= set(written[0])


def test_a_function_of_the_users_marks(tiny_model_folder: Path, mine: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "beside.py").write_text("SCALE = 4\n")
    metric = tmp_path / "my_metric.py"
    metric.write_text(
        "from beside import SCALE\n"
        "def length(response, expected, row):\n"
        "    assert row['output'] == expected\n"
        "    return len(expected) / SCALE\n"
    )
    common = ["--model_name_or_path", tiny_model_folder, "--data_files", mine, "--max_new_tokens=1"]
    result = run(tmp_path / "out", *common, f"--metric_function={metric}:length")
    assert result["tasks"]["mine"]["score"] == pytest.approx((3 * 3 + 2 * 2) / 5 / 4)
    assert result["settings"]["metric"].startswith(f"{metric}:length ")
    assert figures_of({"after": {}}, result) == {"mine score": result["tasks"]["mine"]["score"]}
    assert "score 0.65 (" in capsys.readouterr().out
    metric.write_text("def length(response, expected):\n    return 1\n")
    run(tmp_path / "out", *common, f"--metric_function={metric}:length", status=2)
    assert "has the answers of another evaluation (metric " in capsys.readouterr().err
    ones = run(tmp_path / "ones", *common, f"--metric_function={metric}:length")["tasks"]["mine"]
    assert ones == {"score": 1.0, "low": 1.0, "high": 1.0, "total": 5}  # no share, although each is 1


def test_a_module_of_this_folder_has_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ist_test_metrics.py").write_text("def half(response, expected):\n    return 0.5\n")
    monkeypatch.chdir(tmp_path)
    found = load_metric("ist_test_metrics:half")
    assert (found.function("a", "b"), found.name, len(found.digest)) == (0.5, "ist_test_metrics:half", 16)
    assert load_metric("operator:eq").function("a", "a") is True


def test_a_metric_file_can_define_dataclasses_and_change_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for name in ("ist_test_marks", "ist_test_raises"):
        (tmp_path / f"{name}.py").write_text(
            "from __future__ import annotations\n"
            "import os, sys\n"
            "from dataclasses import dataclass\n"
            "os.chdir('elsewhere')\n"
            "@dataclass\n"
            "class Mark:\n"
            "    value: float\n"
            "def mark(response, expected):\n"
            "    return Mark(0.5).value\n"
            f"{'1 / 0' if 'raises' in name else ''}\n"
        )
    before = list(sys.path)
    for text in ("ist_test_marks.py:mark", "ist_test_marks:mark"):
        os.chdir(tmp_path)
        assert load_metric(text).function("a", "b") == 0.5
    os.chdir(tmp_path)
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        load_metric("ist_test_raises.py:mark")
    assert sys.path == before
    assert "ist_metric_ist_test_marks" in sys.modules
    assert "ist_metric_ist_test_raises" not in sys.modules


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("metric", "is neither FILE.py:FUNCTION nor MODULE:FUNCTION"),
        ("metric.py:", "is neither"),
        (":f", "is neither"),
        ("metric.py:f g", "is neither"),
        ("none.py:f", "none.py is not a file"),
        ("no_such_module:f", r"cannot be imported \(ModuleNotFoundError: No module named 'no_such_module'\)\.$"),
        ("needs.py:f", r"put it beside needs\.py, or install it with pip install opencv-python\.$"),
        ("bad.py:f", r"cannot be imported \(SyntaxError: "),
        ("raises.py:f", r"cannot be imported \(ZeroDivisionError: division by zero\)"),
        ("good.py:g", "good.py has no function g"),
        ("good.py:VALUE", "good.py has no function VALUE"),
    ],
)
def test_a_metric_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    (tmp_path / "bad.py").write_text("def f(:\n")
    (tmp_path / "raises.py").write_text("1 / 0\n")
    (tmp_path / "good.py").write_text("VALUE = 3\n")
    (tmp_path / "needs.py").write_text("import cv2\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said) as error:
        load_metric(text)
    assert "\n" not in str(error.value)


def test_a_recipe_names_no_function() -> None:
    assert {"metric", "labels"} <= EVALUATION_KEYS
    assert "metric_function" in COMMAND_LINE_ONLY
    assert {"metric", "labels", "metric_function"} <= known_eval_flags()


MODEL = "--model_name_or_path=x"
MISTAKES = [
    ([MODEL, "--data_files=a", "--protocol=likelihood"], "--data_files has no options for likelihood"),
    ([MODEL, "--data_files=a", "--protocol=lm-eval"], "--data_files has no options for lm-eval"),
    ([MODEL, "--data_files=a", "--protocol=loss", "--metric=exact_match"], "--metric marks generated answers"),
    ([MODEL, "--tasks=boolq", "--metric_function=a:b"], "--metric_function marks generated answers to --data_files"),
    ([MODEL, "--data_files=a", "--metric=exact_match", "--metric_function=a:b"], "answers are marked by one of them"),
    ([MODEL, "--data_files=a", "--labels", "b"], "--labels are for --metric label_accuracy"),
    ([MODEL, "--data_files=a", "--metric=f1"], "--metric f1 is unknown: give one of exact_match, label_accuracy"),
    ([MODEL, "--data_files=a"], "There is no file a (looked for"),
    ([MODEL, "--data_files={mine}", "--metric_function=a"], "is neither FILE.py:FUNCTION nor"),
    ([MODEL, " "], "' ' belongs to no flag: write --FLAG before a value"),
    ([MODEL, ""], "'' belongs to no flag"),
    (["--data_files={mine}"], "No model given: --model_name_or_path takes a folder"),
    (
        ["--data_files={mine}", "--adapter={folder}"],
        "holds no adapter_config.json, and so no adapter: --adapter takes a folder",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, mine: Path, arguments: list[str], message: str
) -> None:
    given = [argument.format(folder=tmp_path, mine=mine) for argument in arguments]
    assert main(["eval", *given, f"--output_dir={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# An adapter names its base


def adapter_of(model: Path, folder: Path, **changes: Any) -> Path:
    base: Any = AutoModelForCausalLM.from_pretrained(model)
    get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained(str(folder))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_an_adapter_alone_is_evaluated(tiny_model_folder: Path, mine: Path, tmp_path: Path) -> None:
    adapter = adapter_of(tiny_model_folder, tmp_path / "adapter")
    flags = ["--data_files", mine, "--protocol=loss"]
    alone = run(tmp_path / "alone", "--adapter", adapter, *flags)
    named = run(tmp_path / "named", "--adapter", adapter, "--model_name_or_path", tiny_model_folder, *flags)
    assert alone["model"] == named["model"] == str(tiny_model_folder)
    assert alone["tasks"] == named["tasks"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"base_model_name_or_path": None}, "names no model that the adapter belongs to: add --model_name_or_path"),
        ({"base_model_name_or_path": ""}, "names no model"),
        ({"base_model_name_or_path": 3}, "names no model"),
        ({}, "names no model"),
        ([], "names no model"),
        ({"base_model_name_or_path": "/no/such/model"}, "names the model /no/such/model, which is not there: add"),
        ("{", r"adapter_config\.json is damaged \(JSONDecodeError\)"),
    ],
)
def test_a_base_that_is_not_named_or_not_there_is_one_line(tmp_path: Path, config: Any, said: str) -> None:
    text = config if isinstance(config, str) else json.dumps(config)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        find_base(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_damaged_result_is_named(tiny_model_folder: Path, mine: Path, tmp_path: Path, capsys: Any) -> None:
    common = ["--model_name_or_path", tiny_model_folder, "--data_files", mine, "--protocol=loss"]
    result = run(tmp_path / "out", *common)
    for text in ("{", "[]", '{"tasks": 3}', "{}"):
        (tmp_path / "out" / "ist_eval.json").write_text(text)
        run(tmp_path / "out", *common, status=2)
        assert "ist_eval.json is damaged: remove it" in capsys.readouterr().err
    os.remove(tmp_path / "out" / "ist_eval.json")
    assert run(tmp_path / "out", *common)["tasks"] == result["tasks"]


def test_the_way_is_shown_by_tenths(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    for done in range(4, 101, 4):
        progress.found("mine", Accuracy(done // 2, done))
        progress("mine", done, 100)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 9
    assert lines[0] == "mine: 12 of 100, 50.0% (25.4% to 74.6%), 6 of 12"


def test_a_second_evaluation_without_a_folder_has_one_of_its_own(
    tiny_model_folder: Path, mine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The base first and then the adapter, and the first command again."""
    monkeypatch.chdir(tmp_path)
    adapter = adapter_of(tiny_model_folder, tmp_path / "adapter")
    adapter_file = adapter / "adapter_model.safetensors"
    save_file({name: torch.ones_like(weight) for name, weight in load_file(adapter_file).items()}, adapter_file)
    flags = ["eval", "--data_files", str(mine), "--max_new_tokens=1"]
    base = [*flags, "--model_name_or_path", str(tiny_model_folder)]
    written = []
    for command in (base, [*flags, "--adapter", str(adapter)], [*base, "--num_beams=2"], base):
        assert main(command) == 0
        written.append(capsys.readouterr().out.splitlines()[-1].removeprefix("written: "))
    folders = ["runs/eval", "runs/eval-2", "runs/eval-3", "runs/eval"]
    assert written == [f"{folder}/ist_eval.json" for folder in folders]
    assert [json.loads(Path(file).read_text())["adapter"] for file in written] == [None, str(adapter), None, None]
    assert len((tmp_path / "runs/eval/answers/mine.jsonl").read_text().splitlines()) == len(ROWS)
    mine.write_text(json.dumps({"instruction": "Say maybe.", "output": "maybe"}))
    assert main(base) == 0, "other rows under the same name"
    assert json.loads(Path("runs/eval-4/ist_eval.json").read_text())["tasks"]["mine"]["total"] == 1
    assert main([*base, "--output_dir=runs/eval"]) == 2


# `ist train --validation_files`


def load(*arguments: str | Path) -> Any:
    return load_data(parse_arguments([*map(str, arguments), "--bf16=false"]))


def test_validation_files_take_the_place_of_rows_held_out(mine: Path, tmp_path: Path, caplog: Any) -> None:
    (tmp_path / "other.json").write_text(json.dumps([{"instruction": "Say maybe.", "output": "maybe"}, ROWS[0]]))
    data = load("--data_files", mine, "--validation_files", tmp_path / "other.json", "--validation_size=3")
    assert (len(data.train), len(data.evaluation)) == (5, 2)
    assert [row["completion"] for row in data.evaluation] == ["maybe", "yes"]
    assert "1 of 2 validation rows are training rows too" in caplog.text


def test_validation_files_that_do_not_go_with_the_rest_are_refused(mine: Path, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "chats.json").write_text(json.dumps([chat]))
    with pytest.raises(ValueError, match="are not of one kind: give chats for chats"):
        load("--data_files", mine, "--validation_files", tmp_path / "chats.json")
    assert len(load("--data_files", tmp_path / "chats.json", "--validation_files", tmp_path / "chats.json").train) == 1
    for data in (["--task=word-problems"], ["--dataset_name=x"]):
        with pytest.raises(ValueError, match="--validation_files goes with --data_files"):
            load(*data, "--validation_files", mine)


def test_validation_losses_are_printed_on_the_way(
    tiny_model_folder: Path, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = train([
        "--model_name_or_path", str(tiny_model_folder), "--data_files", str(mine), "--validation_files", str(mine),
        "--max_steps=2", "--eval_strategy=steps", "--eval_steps=1", "--save_strategy=no", "--use_cpu", "--lora_r=2",
        "--lora_target_modules", "q_proj", "v_proj", "--gradient_checkpointing=false", "--bf16=false",
        "--output_dir", str(tmp_path / "run"),
    ])  # fmt: skip
    losses = [entry["eval_loss"] for entry in result["log"] if "eval_loss" in entry]
    assert len(losses) == 2
    console = capsys.readouterr().out
    for step, loss in enumerate(losses, start=1):
        assert f"step    {step}/2 validation loss {loss:.3f}" in console
    assert console.count("validation loss") == 2 + 3  # before, after, and in the table
