"""`ist compare` and `ist analyse` from a recipe to their tables, with a training that is killed on the way."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from ist.cli.compare.command import Comparison
from ist.cli.compare.recipe import read_comparison
from ist.cli.compare.runs import run_command
from ist.cli.main import main
from ist.cli.train.arguments import parse_arguments
from ist.cli.train.command import make_trainer, train
from ist.cli.train.data import load_data

RECIPE = """
methods:
  LoRA: {method: peft}
  IST: {method: ist}
seeds: [1]
flags:
  task: word-problems
  num_train_problems: 40
  num_test_problems: 8
  max_steps: 30
  per_device_train_batch_size: 4
  learning_rate: 1.0e-2
  update_interval: 5
  gradient_checkpointing: false
  eval_strategy: steps
  eval_steps: 10
  save_strategy: steps
  save_steps: 5
  save_total_limit: 2
  use_cpu: true
  bf16: false
  lora_r: 4
  lora_target_modules: [q_proj, v_proj, up_proj]
"""


def command(folder: Path, model: Path, *more: str) -> list[str]:
    (folder / "small.yaml").write_text(RECIPE)
    where = ["--recipe", str(folder / "small.yaml"), "--output_dir", str(folder / "out")]
    return ["compare", *where, "--model_name_or_path", str(model), *more]


def kill_when(file: Path) -> threading.Thread:
    """Kill the training that this process has started once a file is there; other tests have children here too."""

    def watch() -> None:
        while not file.exists():
            time.sleep(0.005)
        for child in psutil.Process().children():
            if child.cmdline()[1:4] == ["-m", "ist", "train"]:
                child.kill()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def compared(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison whose first training was killed, and which was then told to go on."""
    folder = tmp_path_factory.mktemp("compare")
    killer = kill_when(folder / "out" / "LoRA" / "seed-1" / "checkpoint-10" / "trainer_state.json")
    assert main(command(folder, tiny_model_folder)) == 2
    killer.join()
    assert not (folder / "out" / "LoRA" / "seed-1" / "ist_result.json").exists()
    assert main(command(folder, tiny_model_folder)) == 0
    return folder / "out"


def test_a_killed_training_ends_as_one_that_was_not(compared: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    recipe = read_comparison(compared.parent / "small.yaml", ["--model_name_or_path", str(tiny_model_folder)])
    whole = train(recipe.arguments(recipe.methods[0], 1, tmp_path))
    resumed = json.loads((compared / "LoRA" / "seed-1" / "ist_result.json").read_text())
    assert (resumed["before"], resumed["after"]) == (whole["before"], whole["after"])
    assert [entry["step"] for entry in resumed["log"]] == [entry["step"] for entry in whole["log"]]
    weights = [folder / "adapter_model.safetensors" for folder in (compared / "LoRA" / "seed-1", tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_everything_is_in_the_json(compared: Path, tiny_model_folder: Path) -> None:
    summary = json.loads((compared / "compare.json").read_text())
    assert [(run["method"], run["seed"]) for run in summary["runs"]] == [("LoRA", 1), ("IST", 1)]
    for run in summary["runs"]:
        assert run["num_steps"] == 30
        assert run["step_seconds"] > 0
        assert run["peak_memory_bytes"] > 2**20
        assert run["versions"]["peft"]
        assert run["device"]
        assert run["figures"]["validation loss"] == run["after"]["loss"] < run["before"]["loss"]
        assert [entry["step"] for entry in run["log"] if "eval_loss" in entry] == [10, 20, 30]
        assert (compared / run["folder"] / "adapter_model.safetensors").exists()
    plain, ist = summary["runs"]
    assert (plain["choices"], plain["importance"]) == (None, None)
    assert sum(ist["choices"]) == 30  # one of four layers a step
    assert ist["importance"]["steps"] == list(range(5, 31, 5))
    rows = summary["table"]["steps"]["validation loss"]
    losses = [run["after"]["loss"] for run in summary["runs"]]
    assert rows["IST"]["differences"]["LoRA"]["mean"] == pytest.approx(losses[1] - losses[0])
    assert summary["more_flags"] == ["--model_name_or_path", str(tiny_model_folder)]
    for name in ("losses", "importance", "choices"):
        assert (compared / f"{name}.png").stat().st_size > 10_000


def test_a_second_call_trains_nothing(
    compared: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [compared / name / "seed-1" / "ist_result.json" for name in ("LoRA", "IST")]
    before = [file.stat().st_mtime_ns for file in files]
    assert main(command(compared.parent, tiny_model_folder)) == 0
    assert [file.stat().st_mtime_ns for file in files] == before
    console = capsys.readouterr().out
    for text in ("small: 2 methods × 1 seed,", "validation loss, equal steps, 1 seed", "minus LoRA", "picture: "):
        assert text in console


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--max_steps=7"], "holds a run with other flags (it has fewer, now asked for is --max_steps=7)"),
        (["--methods", "IST", "--budget", "seconds"], "Equal time needs the runs of 'LoRA'"),
        (["--methods", "DoRA"], "methods='DoRA' is unknown: choose one of 'LoRA', 'IST'"),
        (["--mux=3"], "method 'LoRA': There is no flag --mux (did you mean --mu?)"),
    ],
)
def test_a_mistake_is_one_line(
    compared: Path, tiny_model_folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(command(compared.parent, tiny_model_folder, *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_command_that_fails_says_why(tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(ValueError, match=r"ist tune ended with status 2 \(ist tune: error: there is no command 'tune'"):
        run_command("tune", [], tmp_path / "tune.log", lines.append)
    assert lines == [(tmp_path / "tune.log").read_text().strip()]


def course_of_data(arguments: Sequence[str]) -> tuple[list[Any], list[float]]:
    """The training batches of a run, as they reached the model, and the first weights of its adapters."""
    run = parse_arguments(arguments)
    trainer = make_trainer(run, load_data(run))
    seen: list[Any] = []

    def record(module: Any, args: Any, kwargs: Any) -> None:
        if module.training:
            seen.append(kwargs["input_ids"].tolist())

    assert trainer.model is not None
    first = next(p for name, p in trainer.model.named_parameters() if "lora_A" in name)[0].tolist()
    trainer.model.register_forward_pre_hook(record, with_kwargs=True)
    trainer.train()
    return seen, first


def test_all_methods_see_the_same_data_in_the_same_order(tiny_model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(
        RECIPE.replace(
            "  IST: {method: ist}", "  IST: {method: ist}\n  DoRA: {method: random, use_dora: true, lora_r: 2}"
        )
    )
    flags = ["--model_name_or_path", str(tiny_model_folder), "--max_steps=15", "--save_strategy=no"]
    recipe = read_comparison(tmp_path / "small.yaml", flags)
    courses = [course_of_data(recipe.arguments(method, 1, tmp_path / "run")) for method in recipe.methods]
    (plain, plain_weights), (ist, ist_weights), (dora, _) = courses
    assert len(plain) == 15
    assert plain == ist == dora
    assert plain_weights == ist_weights
    other, other_weights = course_of_data(recipe.arguments(recipe.methods[0], 2, tmp_path / "run"))
    assert other != plain
    assert other_weights != plain_weights


def put_result(arguments: Sequence[str], folder: Path, **result: Any) -> None:
    """Leave a finished run in a folder, as `ist train` would."""
    folder.mkdir(parents=True)
    usual = {"before": {"loss": 3.0}, "log": [], "peak_memory_bytes": 2**20, "model": "x"}
    (folder / "run.json").write_text(json.dumps({"arguments": list(arguments)}))
    (folder / "ist_result.json").write_text(json.dumps({**usual, **result}))


def test_the_best_rate_is_taken_and_equal_time_is_the_references(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every run that is asked for is there; another one, or other flags, would be trained or refused."""
    (tmp_path / "small.yaml").write_text(RECIPE.replace("method: ist", "method: ist, learning_rates: [0.01, 0.04]"))
    recipe = read_comparison(tmp_path / "small.yaml", ["--model_name_or_path=x"], budget="seconds")
    out = tmp_path / "out"
    plain, ist = recipe.methods
    where = out / "LoRA" / "seed-1"
    put_result(recipe.arguments(plain, 1, where), where, after={"loss": 1.0}, num_steps=60, step_seconds=10.0)
    for rate, loss in ((0.01, 1.5), (0.04, 1.2)):
        where = out / "IST" / f"lr-{rate}" / "seed-1"
        arguments = recipe.arguments(ist, 1, where, {"learning_rate": rate})
        put_result(arguments, where, after={"loss": loss}, num_steps=60, step_seconds=5.0)
    where = out / "IST" / "lr-0.04" / "seconds" / "seed-1"
    changes = {"max_steps": 120, "max_train_seconds": 10.0, "learning_rate": 0.04}
    put_result(recipe.arguments(ist, 1, where, changes), where, after={"loss": 0.9}, num_steps=120, step_seconds=9.9)

    Comparison(recipe, out).run()
    summary = json.loads((out / "compare.json").read_text())
    chosen = {"tried": {"0.01": 1.5, "0.04": 1.2}, "chosen": 0.04, "at_the_edge": True}
    assert summary["learning_rates"] == {"IST": chosen}
    differences = {
        budget: figures["validation loss"]["IST"]["differences"]["LoRA"]["mean"]
        for budget, figures in summary["table"].items()
    }
    assert differences == {"steps": pytest.approx(0.2), "seconds": pytest.approx(-0.1)}
    assert "validation loss, equal training time, 1 seed" in capsys.readouterr().out


def test_all_pairs_at_equal_time_have_trained_for_one_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With several in the recipe's `against`, the first one's seconds are those of all, and it is trained once; a
    method with a reference of its own is paired with that alone.
    """
    seconds = {"LoRA": 10.0, "random": 6.0, "IST": 5.0, "DoRA": 20.0, "DoRA + IST": 15.0}
    lines = "".join(f"  {name}: {{method: random}}\n" for name in ("random", "DoRA"))
    lines += '  "DoRA + IST": {method: ist, against: [DoRA, LoRA]}\nagainst: [LoRA, random]\n'
    (tmp_path / "small.yaml").write_text(RECIPE.replace("seeds: [1]", lines + "seeds: [1, 2]"))
    trained: list[tuple[str, str]] = []

    def train_once(arguments: Sequence[str], folder: Path, on_line: Any) -> dict[str, Any]:
        name = folder.relative_to(tmp_path / "out").parts[0].replace("-+-", " + ")
        limit = [argument.partition("=")[2] for argument in arguments if "max_train_seconds" in argument]
        took = float(limit[0]) if limit else seconds[name] + int(folder.name[-1])
        trained.append((name, folder.parent.name))
        folder.mkdir(parents=True)
        return {**RESULT, "num_steps": 60, "step_seconds": took}

    monkeypatch.setattr("ist.cli.compare.command.train_once", train_once)
    recipe = read_comparison(tmp_path / "small.yaml", ["--model_name_or_path=x"], budget="seconds")
    Comparison(recipe, tmp_path / "out").run()
    summary = json.loads((tmp_path / "out" / "compare.json").read_text())
    took = {(r["method"], r["seed"]): r["step_seconds"] for r in summary["runs"] if r["budget"] == "seconds"}
    table = summary["table"]["seconds"]["validation loss"]
    pairs = {(name, other) for name, row in table.items() for other in row["differences"]}
    assert pairs == {("random", "LoRA"), ("IST", "LoRA"), ("IST", "random"), ("DoRA + IST", "DoRA"), ("LoRA", "random")}
    for name, other in pairs:
        assert [took[name, seed] for seed in (1, 2)] == [took[other, seed] for seed in (1, 2)]
    assert {name for name, folder in trained if folder == "seconds"} == {"random", "IST", "DoRA + IST"}
    assert ("DoRA + IST", "LoRA") not in pairs
    assert "LoRA" in summary["table"]["steps"]["validation loss"]["DoRA + IST"]["differences"]


RESULT = {
    **{"before": {"loss": 3.0}, "after": {"loss": 2.0}, "num_steps": 2, "step_seconds": 1.0, "log": [], "model": "x"},
    "peak_memory_bytes": 2**20,
}
LAYER = '{"event": "run", "layers": ["a"]}\n'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("ist_result.json", {**RESULT, "before": {"loss": 2**70}}, "its 'before' is not what a run writes"),
        ("ist_result.json", {**RESULT, "model": ["x", "--trust_remote_code"]}, "its 'model' is not what a run writes"),
        ("ist_result.json", {**RESULT, "after": {"loss": "2"}}, "its 'after' is not"),
        ("ist_result.json", {**RESULT, "after": {}}, "it has other figures before than after"),
        ("ist_result.json", {**RESULT, "before": None}, "its 'before' is not"),
        ("ist_result.json", {**RESULT, "num_steps": 0}, "its 'num_steps' is not"),
        ("ist_result.json", {**RESULT, "step_seconds": "1"}, "its 'step_seconds' is not"),
        ("ist_result.json", {**RESULT, "peak_memory_bytes": None}, "its 'peak_memory_bytes' is not"),
        ("ist_result.json", {**RESULT, "log": [{"eval_loss": 1}]}, "its 'log' is not"),
        ("ist_result.json", [], "it is no JSON object"),
        ("ist_result.json", "{", "it is no JSON object"),
        ("ist_result.json", "[" * 100_000, "it is no JSON object"),
        ("run.json", {"arguments": 3}, "its 'arguments' is not"),
        ("run.json", [], "it is no JSON object"),
        ("evaluation/ist_eval.json", {"tasks": {"a": {"accuracy": None}}}, "its 'tasks' is not"),
        ("evaluation/ist_eval.json", {"tasks": {"a": 1}}, "its 'tasks' is not"),
        ("evaluation/ist_eval.json", {}, "its 'tasks' is not"),
        ("ist_history.jsonl", "", "its lines do not fit together"),
        ("ist_history.jsonl", {"event": "run", "layers": []}, "its lines do not fit together"),
        ("ist_history.jsonl", LAYER + '{"event": "importance", "step": 1}', "its lines do not fit together"),
        ("ist_history.jsonl", LAYER + '{"event": "step", "active": [1]}', "its lines do not fit together"),
    ],
    ids=range(21),
)
def test_a_damaged_run_is_named_and_nothing_of_it_runs(tmp_path: Path, name: str, content: Any, said: str) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    recipe = read_comparison(
        tmp_path / "small.yaml", ["--model_name_or_path=x"], evaluation={"tasks": ["word-problems"]}
    )
    out = tmp_path / "out"
    comparison, method = Comparison(recipe, out), recipe.methods[0]
    folder = out / method.folder / "seed-1"
    put_result(recipe.arguments(method, 1, folder), folder, **RESULT)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "ist_eval.json").write_text('{"tasks": {}}')
    assert comparison.one(method, 1)["figures"] == {"validation loss": 2.0}
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(said)) as error:
        comparison.one(method, 1)
    assert str(error.value).startswith(f"{folder / name} is damaged")
    assert "\n" not in str(error.value)


def test_an_analysis_of_a_run(compared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = compared / "IST" / "seed-1"
    after = json.loads((folder / "ist_result.json").read_text())["after"]
    assert main(["analyse", str(folder), "--per_device_eval_batch_size=1", "--num_problems=2"]) == 0
    console = capsys.readouterr().out
    assert "Kendall's tau between true and learned importance" in console
    result = json.loads((folder / "analysis.json").read_text())
    assert result["loss"] == pytest.approx(after["loss"], rel=0.02)  # there batches count alike, here tokens do
    assert (len(result["importance"]), len(result["intervals"]), result["num_batches"]) == (4, 4, 8)
    for removal in result["removal"].values():
        assert sorted(removal["order"]) == [0, 1, 2, 3]
        assert (len(removal["loss"]), len(removal["accuracy"])) == (5, 5)
        assert removal["loss"][0] == pytest.approx(result["loss"])
    least, most = (result["removal"][name]["loss"] for name in ("least_first", "most_first"))
    assert least[1] < most[1]
    assert least[-1] == most[-1]
    assert (folder / "analysis.png").stat().st_size > 10_000


def test_an_analysis_by_each_layers_own_importance(compared: Path) -> None:
    folder = compared / "LoRA" / "seed-1"
    assert main(["analyse", str(folder), "--order", "importance", "--num_problems=0"]) == 0
    result = json.loads((folder / "analysis.json").read_text())
    ranked = sorted(range(4), key=lambda layer: result["importance"][layer])
    assert result["removal"]["least_first"]["order"] == ranked
    assert result["removal"]["most_first"]["order"] == ranked[::-1]
    assert result["removal"]["least_first"]["accuracy"] is None
    assert (result["learned"], result["rank_correlation"]) == (None, None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--order=luck"], "--order luck is unknown: give one of greedy, importance."),
        (["--search_batches=0"], "--search_batches 0 is too few: give 1 or more."),
        (["--beta=1"], "--beta 1.0 suppresses nothing"),
        (["--num_test_problems=0"], "The run has no validation data to measure on"),
        (["--lora_target_modules", "q_proj", "v_proj"], "is of another kind than the run's flags make"),
    ],
)
def test_a_mistake_in_an_analysis_is_one_line(
    compared: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["analyse", str(compared / "LoRA" / "seed-1"), *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyse", str(tmp_path)]) == 2
    assert "holds no finished run with an adapter" in capsys.readouterr().err
