"""`ist` as a user types it: a run from flags to a saved adapter, and one line for every mistake."""

from __future__ import annotations

import io
import json
import re
import sys
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from trl.scripts.utils import DatasetConfig

from ist import read_history
from ist.cli.main import main
from ist.cli.train.arguments import parse_arguments
from ist.cli.train.command import train
from ist.cli.train.data import load_data
from ist.cli.train.folder import settle_former_run
from tests.helpers.processes import run

QUICK = [
    "--max_steps=6", "--per_device_train_batch_size=4", "--logging_steps=2", "--update_interval=2",
    "--gradient_checkpointing=false", "--save_strategy=no", "--use_cpu", "--lora_r=4",
    "--lora_target_modules", "q_proj", "v_proj", "up_proj",
]  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder and the console of a run on the built-in task."""
    folder = tmp_path_factory.mktemp("run")
    arguments = [
        "train", "--model_name_or_path", str(tiny_model_folder), "--task=word-problems", "--num_train_problems=40",
        "--num_test_problems=8", "--output_dir", str(folder), *QUICK,
    ]  # fmt: skip
    with redirect_stdout(io.StringIO()) as console, redirect_stderr(io.StringIO()) as errors:
        assert main(arguments) == 0
    assert "Traceback" not in errors.getvalue()
    return folder, console.getvalue()


def test_a_run_says_what_it_does_and_what_it_brought(finished: tuple[Path, str]) -> None:
    folder, console = finished
    result = json.loads((folder / "ist_result.json").read_text())
    for when in ("before", "after"):
        assert result[when]["loss"] > 0
        assert 0 <= result[when]["accuracy"] <= 1
        assert f"{when}: validation loss {result[when]['loss']:.3f}" in console
    assert result["after"]["loss"] < result["before"]["loss"]
    assert result["num_steps"] == 6
    assert result["peak_memory_bytes"] > 2**20
    assert result["fused"]["modules"] > 0
    assert not result["fused"]["others"]
    assert 0 < result["probe_share"] < 1
    assert f"{result['fused']['modules']} LoRA modules are fused; measuring took" in console
    assert "6 steps in" in console
    assert "peak memory" in console
    assert "exact match, held-out problems" in console
    active = [event["active"] for event in read_history(folder) if event["event"] == "step"]
    assert len(active) == 6
    shown = "".join("■" if layer in active[1] else "·" for layer in range(4))
    assert f"step    2/6 {shown} loss" in console


def test_a_run_leaves_an_adapter_a_history_and_a_picture(finished: tuple[Path, str]) -> None:
    folder, console = finished
    assert (folder / "adapter_model.safetensors").stat().st_size > 1000
    assert (folder / "importance.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder / "importance.png") in console


def test_the_adapter_answers_without_this_library(finished: tuple[Path, str], tiny_model_folder: Path) -> None:
    code = f"""
import sys
sys.modules["ist"] = None  # any import of it fails
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(finished[0])!r})
model = AutoModelForCausalLM.from_pretrained({str(tiny_model_folder)!r})
plain = model(**tokenizer("2 and 3", return_tensors="pt")).logits
model = PeftModel.from_pretrained(model, {str(finished[0])!r})
inputs = tokenizer("2 and 3", return_tensors="pt")
print(bool((model(**inputs).logits != plain).any()), model.generate(**inputs, max_new_tokens=4).shape[1])
"""
    process = run(code)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == ["True", "11"]


def test_a_run_can_be_resumed(tiny_model_folder: Path, tmp_path: Path) -> None:
    arguments = [
        "--model_name_or_path", str(tiny_model_folder), "--task=word-problems", "--num_train_problems=40",
        "--num_test_problems=4", *QUICK, "--save_strategy=steps", "--save_steps=3",
    ]  # fmt: skip
    whole = train([*arguments, "--output_dir", str(tmp_path / "whole")])
    train([*arguments, "--output_dir", str(tmp_path / "cut")])
    resumed = train(
        [*arguments, f"--output_dir={tmp_path / 'cut'}", f"--resume_from_checkpoint={tmp_path / 'cut/checkpoint-3'}"]
    )
    assert resumed["after"] == whole["after"]
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert weights[0] == weights[1]


def test_a_folder_with_another_run_is_refused(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    arguments = [
        "train", "--model_name_or_path", str(tiny_model_folder), "--task=word-problems", "--num_train_problems=40",
        "--num_test_problems=0", *QUICK, "--save_strategy=steps", "--save_steps=3", "--output_dir", str(folder),
    ]  # fmt: skip
    ways = "resume it by --resume_from_checkpoint last, give another --output_dir, or --overwrite."
    assert main(arguments) == 0
    before = snapshot_files(folder)
    assert "the choice of layers is nearly uniform" in capsys.readouterr().err
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"ist train: error: {folder} holds another run: {ways}\n"
    assert snapshot_files(folder) == before
    assert main([*arguments, "--resume_from_checkpoint=last"]) == 0
    assert main([*arguments, "--overwrite", "--max_steps=3"]) == 0
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    (folder / "ist_result.json").unlink()
    assert main(arguments) == 2
    assert ways in capsys.readouterr().err


def snapshot_files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("arguments", "refused"),
    [
        ([], False),
        (["--recipe=quickstart"], False),
        (["--output_dir=runs/quickstart"], True),
        (["--task=word-problems", "--output_dir=runs/quickstart"], True),
        (["--output_dir=runs/quickstart", "--resume_from_checkpoint=auto"], False),
    ],
    ids=str,
)
def test_the_quickstart_is_made_anew_in_its_own_folder(tmp_path: Path, arguments: list[str], refused: bool) -> None:
    (tmp_path / "ist_result.json").write_text("{}")
    run_arguments = parse_arguments([*arguments, "--bf16=false"])
    with pytest.raises(ValueError, match=r"run: give another --output_dir") if refused else nullcontext():
        settle_former_run(run_arguments, tmp_path)
    resumed = "--resume_from_checkpoint=auto" in arguments
    assert (tmp_path / "ist_result.json").exists() == (refused or resumed)


@pytest.mark.parametrize("value", ["false", "False", "none", "no"])
def test_a_resume_that_is_declined_is_a_fresh_start(value: str) -> None:
    run_arguments = parse_arguments(["--bf16=false", f"--resume_from_checkpoint={value}"])
    assert run_arguments.training.resume_from_checkpoint is None


def test_a_run_that_torchrun_started_again_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    settle_former_run(parse_arguments(["--bf16=false", "--overwrite"]), tmp_path)
    assert (tmp_path / "checkpoint-3").exists()


@pytest.mark.parametrize("method", ["ist", "random", "peft"])
@pytest.mark.parametrize("adapter", ["lora", "series", "parallel"])
def test_instructions_from_files(tiny_model_folder: Path, tmp_path: Path, method: str, adapter: str) -> None:
    rows = [
        {"instruction": f"Say {word}.", "input": "", "output": word} for word in ["one", "two", "three", "four"] * 6
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    result = train(
        [
            "--model_name_or_path", str(tiny_model_folder), "--data_files", str(tmp_path / "a.json"),
            str(tmp_path / "b.jsonl"), "--validation_size=8", "--method", method, "--adapter", adapter,
            "--bottleneck_size=8", "--output_dir", str(tmp_path / "run"), *QUICK, "--learning_rate=1e-2",
        ]
    )  # fmt: skip
    assert set(result["after"]) == {"loss"}
    assert result["after"]["loss"] < result["before"]["loss"]
    assert (tmp_path / "run" / "ist_history.jsonl").exists() == (method != "peft")


def write_long_and_short(file: Path, short: int, long: int) -> None:
    rows = [{"prompt": "Say a. ", "completion": "a"}] * short + [{"prompt": "x" * 100, "completion": "a"}] * long
    file.write_text(json.dumps(rows))


def test_rows_whose_answer_is_cut_off_are_counted(
    tiny_model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_long_and_short(tmp_path / "rows.json", 20, 20)
    arguments = [
        "--model_name_or_path", str(tiny_model_folder), "--data_files", str(tmp_path / "rows.json"), *QUICK,
        "--max_steps=1", "--validation_size=20", "--max_length=64",
    ]  # fmt: skip
    train([*arguments, "--output_dir", str(tmp_path / "a")])
    lines = [record.getMessage() for record in caplog.records if "max_length" in record.getMessage()]
    (training, validation) = [re.match(r"(\d+) of 20 (training|validation) rows (.+)$", line) for line in lines]
    assert training
    assert validation
    assert int(training[1]) + int(validation[1]) == 20
    assert training[3] == "are longer than max_length=64 before their answer begins, and are left out."
    caplog.clear()
    train([*arguments, "--max_length=128", "--output_dir", str(tmp_path / "b")])
    train([*arguments, "--packing", "--output_dir", str(tmp_path / "c")])
    assert "max_length" not in caplog.text


@pytest.mark.parametrize(
    ("short", "message"),
    [
        (
            0,
            "All 20 training rows are longer than max_length=64 before their answer begins: give a greater --max_length",
        ),
        (20, "All 20 validation rows are longer than max_length=64 before their answer begins: give a greater"),
    ],
)
def test_no_row_with_an_answer_left_is_one_line(
    tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], short: int, message: str
) -> None:
    (tmp_path / "set").mkdir()
    for name, number in (("train", short), ("test", 0)):
        write_long_and_short(tmp_path / "set" / f"{name}.json", number, 20 - number)
    status = main(
        ["train", "--model_name_or_path", str(tiny_model_folder), "--dataset_name", str(tmp_path / "set"), *QUICK,
         "--max_length=64", "--output_dir", str(tmp_path / "run")]
    )  # fmt: skip
    error = capsys.readouterr().err
    assert status == 2
    assert message in error
    assert error.count("\n") == 1


def test_a_recipe_and_flags_over_it(tiny_model_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "task: word-problems\nnum_train_problems: 40\nnum_test_problems: 4\n"
        "max_steps: 50\nlearning_rate: 2e-4\nmu: 7\nnum_active_layers: 3\nbf16: false\nuse_cpu: true\n"
        "save_strategy: 'no'\nlora_r: 2\n"
    )
    places = ["--model_name_or_path", str(tiny_model_folder), "--output_dir", str(tmp_path / "run")]
    result = train(["--recipe", str(recipe), *places, "--max_steps", "2", "--mu", "9"])
    assert (result["num_steps"], result["recipe"]) == (2, "mine")
    events = read_history(tmp_path / "run")
    assert (events[0]["config"]["mu"], events[0]["config"]["num_active_layers"]) == (9.0, 3)


# fmt: off
RECIPE_VALUES: list[tuple[str, str, str, Any]] = [
    ("data_files: inst.jsonl", "ist", "data_files", ["inst.jsonl"]),
    ("data_files: [a.json, b.json]", "ist", "data_files", ["a.json", "b.json"]),
    ("task: word-problems", "ist", "task", ["word-problems"]),
    ("num_active_layers: 3", "ist_config", "num_active_layers", 3),
    ("max_steps: 1.0e+3", "training", "max_steps", 1000),
    ("learning_rate: 1e-3", "training", "learning_rate", 1e-3),
    ("learning_rate: 1", "training", "learning_rate", 1.0),
    ("max_length: null", "training", "max_length", None),
    ("greedy_min_gain:", "ist", "greedy_min_gain", None),
    ("fused: false", "ist_config", "fused", False),
    ("fused: 'no'", "ist_config", "fused", False),
    ("save_strategy: no", "training", "save_strategy", "no"),
    ("lora_target_modules: all-linear", "model", "lora_target_modules", "all-linear"),
    ("lora_target_modules: [q_proj, v_proj]", "model", "lora_target_modules", ["q_proj", "v_proj"]),
    ("lr_scheduler_kwargs: {num_cycles: 2}", "training", "lr_scheduler_kwargs", {"num_cycles": 2}),
    ("report_to: [tensorboard]", "training", "report_to", ["tensorboard"]),
    ("datasets: [{path: a}]", "mixture", "datasets", [DatasetConfig(path="a")]),
]
# fmt: on


@pytest.mark.parametrize(("line", "part", "key", "value"), RECIPE_VALUES, ids=[line for line, *_ in RECIPE_VALUES])
def test_a_value_of_a_recipe_is_what_its_flag_would_make_of_it(
    tmp_path: Path, line: str, part: str, key: str, value: Any
) -> None:
    (tmp_path / "mine.yaml").write_text(line + "\n")
    arguments = ["--recipe", str(tmp_path / "mine.yaml"), "--trust_recipe", "--bf16=false"]
    found = getattr(getattr(parse_arguments(arguments), part), key)
    assert (found, type(found) is type(value) or key == "save_strategy") == (value, True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rate:", "mine.yaml sets learning_rate to nothing: give a number."),
        ("learning_rate: [1, 2]", "mine.yaml sets learning_rate to [1, 2]: give a number."),
        ("max_steps: 2.5", "mine.yaml sets max_steps to 2.5: give a whole number."),
        ("max_steps: many", "mine.yaml sets max_steps to 'many': give a whole number."),
        ("max_steps: true", "mine.yaml sets max_steps to True: give a whole number."),
        ("fused: 7", "mine.yaml sets fused to 7: give true or false."),
        ("eos_token: {a: b}", "mine.yaml sets eos_token to {'a': 'b'}: give a text."),
        ("data_files: [[a]]", "mine.yaml sets data_files to [['a']]: give a text, or a list of such."),
        ("save_strategy: often", "mine.yaml sets save_strategy to 'often': give one of no, steps, epoch, best."),
    ],
)
def test_a_value_that_does_not_fit_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(line + "\n")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse_arguments(["--recipe", str(tmp_path / "mine.yaml"), "--bf16=false"])


# fmt: off
MISTAKES = [
    (["--recipe", "nothing"], "There is no recipe 'nothing': give the path of a YAML file, or one of paper-"),
    (["--recipe", "{bad}/unknown.yaml"], "unknown.yaml has the unknown key 'leaning_rate': did you mean 'learning_rate'?"),
    (["--recipe", "{bad}/broken.yaml"], "broken.yaml is not YAML in line 2"),
    (["--recipe", "{bad}/list.yaml"], "list.yaml holds no `key: value` lines"),
    (["--recipe", "{bad}/env.yaml"], "env.yaml sets env, which changes the environment of this process"),
    (["--recipe"], "--recipe needs a name or a file"),
    (["--task=word-problems", "--leaning_rate", "3"], "There is no flag --leaning_rate (did you mean --learning_rate?)"),
    (["--task=word-problems", "--max_steps=many"], "--max_steps many is not allowed: give a whole number."),
    (["--task=word-problems", "--bf16=true"], "bf16 is on, and this machine has no GPU"),
    (["--task=riddles"], "task='riddles' is unknown: choose some of boolq, piqa,"),
    (["--task", "word-problems", "boolq"], "task=word-problems, boolq is not allowed: word-problems trains alone."),
    (["--model_name_or_path=x", "--task=boolq"], "boolq does not come with this library: give --data_folder FOLDER"),
    (["--model_name_or_path=x", "--task=boolq", "--data_folder={bad}"], "holds no train set of boolq: it belongs in boolq/train.json."),
    (["--model_name_or_path=x", "--task=boolq", "--data_folder={bad}", "--from_hub"], "the tasks come from one of them"),
    (["--model_name_or_path=x", "--data_files={bad}/fields.json", "--test_tasks=riddles"], "task='riddles' is unknown"),
    (["--task=word-problems"], "No model given: --model_name_or_path takes a folder"),
    (["--model_name_or_path=x"], "No dataset given: name one of --task word-problems, --data_files"),
    (["--model_name_or_path=x", "--task=word-problems", "--dataset_name=y"], "--task and --dataset_name"),
    (["--model_name_or_path=/nowhere/model", "--task=word-problems"], "/nowhere/model"),
    (["--model_name_or_path=x", "--data_files=none.json"], "There is no file none.json (looked for"),
    (["--model_name_or_path=x", "--data_files={bad}/fields.json"], "fields.json, row 1 lacks output (it has instruction)"),
    (["--model_name_or_path=x", "--dataset_name={bad}/set"], "The dataset has the columns answer, question, and training needs 'text'"),
    (["--model_name_or_path=x", "--dataset_name={bad}/set", "--dataset_train_split=dev"], "The dataset has no split 'dev'"),
    (["--recipe", "{bad}/half.yaml"], "half.yaml sets num_train_problems to 1.5: give a whole number."),
    (["--policy=best"], "policy='best' is unknown: choose one of 'uniform', 'proportional'."),
    (["--num_active_layers=0"], "num_active_layers=0 is neither a count of layers"),
    (["--num_active_layers=few"], "num_active_layers='few' is not a number: write 8 for a count of 8, or 0.25 for a quarter"),
    (["--num_unsuppressed_layers=1.5"], "num_unsuppressed_layers=1.5 is neither a count of layers"),
    (["--beta=2"], "beta=2.0 is not a number in [0, 1]"),
    (["--mu=-1"], "mu=-1.0 is not a finite number of at least 0"),
    (["--update_interval=0"], "update_interval=0 is not a whole number of at least 1"),
    (["--num_candidates=1"], "num_candidates=1 is not a whole number of at least 2"),
    (["--preset=robust"], "preset='robust' is unknown: choose one of 'paper', 'authors'."),
    (["--method=lift"], "method='lift' is unknown: choose one of 'ist', 'random', 'lisa', 'lift-front-to-end',"),
    (["--adapter=prefix"], "adapter='prefix' is unknown"),
    (["--validation_size=-1"], "validation_size=-1 is neither a count of rows nor a fraction below 1"),
    (["--resume_from_checkpoint={bad}/gone"], "gone: give a checkpoint-N folder, `last` or `auto`."),
    (["--model_name_or_path=x", "--data_files={bad}/fields.json"], "or messages, or prompt and completion."),
    (["--model_name_or_path=x", "--data_files={bad}/texts.json"], "texts.json, row 1 is a str: rows are objects with instruction and output (and input, if need be), or messages, or"),
    (["--model_name_or_path=x", "--dataset_name={bad}/fields.json"], "fields.json is a file: give --data_files."),
    (["--output_dir={bad}/list.yaml/run"], "cannot be written (Not a directory): give another one with --output_dir."),
]
# fmt: on


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[" ".join(a) for a, _ in MISTAKES])
def test_a_mistake_is_one_line_and_status_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    files = {
        "unknown.yaml": "leaning_rate: 3\n",
        "broken.yaml": "a: [1\n",
        "list.yaml": "- 1\n",
        "env.yaml": "env: {LD_PRELOAD: x}\n",
        "texts.json": '["Hi"]',
        "fields.json": '[{"instruction": "Hi"}]',
    }
    files["half.yaml"] = "num_train_problems: 1.5\n"
    (tmp_path / "set").mkdir()
    files["set/train.jsonl"] = '{"question": "Hi", "answer": "Ho"}\n'
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    status = main(["train", *(argument.format(bad=tmp_path) for argument in arguments)])
    error = capsys.readouterr().err
    assert status == 2
    assert error.startswith("ist train: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ([], 0, "ist train --recipe NAME"),
        (["--help"], 0, "ist recipes"),
        (["--version"], 0, "ist 0."),
        (["recipes"], 0, "quickstart"),
        (["tune"], 2, "there is no command 'tune': choose one of train, eval, compare, analyse, recipes, report."),
        (["recipes", "--help"], 0, "usage: ist recipes"),
        (["report", "--help"], 0, "usage: ist report FOLDER"),
        (["report", "-h"], 0, "usage: ist report FOLDER"),
        (["report"], 2, "ist report takes the folder of a run"),
        (["report", "nowhere"], 2, "nowhere does not exist"),
    ],
)
def test_the_other_commands(
    capsys: pytest.CaptureFixture[str], arguments: list[str], status: int, message: str
) -> None:
    assert main(arguments) == status
    assert message in "".join(capsys.readouterr())


def test_report_draws_a_finished_run(finished: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    (finished[0] / "importance.png").unlink()
    assert main(["report", str(finished[0])]) == 0
    assert Path(capsys.readouterr().out.strip()) == finished[0] / "importance.png"
    assert (finished[0] / "importance.png").exists()


def test_debug_shows_where_an_error_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IST_DEBUG", "1")
    with pytest.raises(ValueError, match="there is no command"):
        main(["tune"])


@pytest.mark.parametrize("value", ["0", "false", ""])
def test_debug_can_be_off(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("IST_DEBUG", value)
    assert main(["tune"]) == 2


def test_held_out_problems_are_worded_otherwise() -> None:
    data: Any = load_data(parse_arguments(["--task=word-problems", "--num_train_problems=300", "--bf16=false"]))
    training = {row["prompt"] for row in data.train}
    assert len(data.train) == 300
    assert not training & {problem.prompt for problem in data.problems}
    assert len(data.problems) == len(data.evaluation) == 100


@pytest.mark.parametrize(("command", "extra"), [("train", "train"), ("report", "report")])
def test_a_missing_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, extra: str
) -> None:
    module = "ist.cli.train.command" if command == "train" else "ist.experiments.report"
    monkeypatch.setitem(sys.modules, module, None)
    assert main([command, "x"]) == 2
    error = capsys.readouterr().err
    assert f"install it with pip install 'ist-peft[{extra}] @ git+https://github.com/ist-peft/ist-peft'" in error
    assert error.count("\n") == 1
