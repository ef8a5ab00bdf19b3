"""The benchmark of quality: plans, the data, one training, processes and resuming, on a tiny model."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
import sys
import time
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ist.experiments.data import TASKS, read_task
from ist.experiments.evaluation import evaluate
from ist.experiments.evaluation.likelihood import option_likelihoods
from tests.helpers.task_rows import numbered_rows, raw_row, write_collection

BENCHMARKS = Path(__file__).parents[1]
PATH = [*sys.path]
sys.path.insert(0, str(BENCHMARKS))

from quality import figures, judge, plan, pool, run, session, table, tasks, train  # noqa: E402

sys.path[:] = PATH  # as other tests expect it

PLANS = sorted((BENCHMARKS / "quality" / "plans").glob("*.yaml"))
SMALL = {"steps": 3, "batch_size": 2, "validation_rows": 4, "test_rows": 3, "rank": 2, "points": 2, "train_rows": 40}
METHODS: dict[str, Any] = {
    "LoRA": {"selector": "all"},
    "random": {"selector": "random", "num_active_layers": 2},
    "IST": {"selector": "ist", "num_active_layers": 2, "update_interval": 1, "mu": 100},
    "IST, authors' rule": {"selector": "ist", "preset": "authors", "update_interval": 1},
    "LISA": {"selector": "lisa", "num_active_layers": 1, "update_interval": 2},
    "fixed, at random": {"selector": "fixed:random", "num_active_layers": 2},
    "top": {"selector": "fixed:top", "num_active_layers": 1},
    "half": {"selector": "ist", "num_active_layers": 1, "rate_of": "IST"},
}
Plan = dict[str, Any]


def small_plan(**changed: Any) -> Plan:
    methods = {name: dict(method) for name, method in METHODS.items()}
    base = {"tasks": {"mawps": {}}, "methods": methods, "rates": [1e-3, 1e-2], "seeds": [0, 1], "training": SMALL}
    return {**base, **changed}


def problems(num: int, first: int = 0) -> list[dict[str, Any]]:
    return [
        {"original_text": f"Ann had {n} nuts and finds {n} more .", "ans": 2.0 * n} for n in range(first, first + num)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All five tasks in a few rows; of MAWPS one training row is a test row and one a validation row."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "math").mkdir()
    (folder / "math" / "mawps").mkdir()
    parts = {"trainset": problems(12) + problems(1, 50) + problems(1, 60)}
    parts |= {"validset": problems(4, 50), "test": problems(4, 60)}
    for name, rows in parts.items():
        (folder / "math" / "mawps" / f"{name}.json").write_text(json.dumps(rows))
    solved = [{"question": f"What is {n} + 1?", "answer": f"<<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(30)]
    (folder / "math" / "gsm8k").mkdir()
    for name, rows in {"train": solved[:25], "test": solved[25:]}.items():
        text = "\n".join(map(json.dumps, rows))
        (folder / "math" / "gsm8k" / f"{name}.jsonl").write_text(text)
    for number, name in enumerate(tasks.COMMONSENSE):
        rows = [raw_row("ARC-Easy")] if name.startswith("ARC") else numbered_rows(3, 100 + number)
        write_collection(folder / "commonsense", {name: numbered_rows(10, 10 * number)}, "train")
        write_collection(folder / "commonsense", {name: rows})
    for name, num in {"sst2/train": 9, "sst2/dev": 3, "sst2/test": 4}.items():
        file = folder / f"{name}.tsv"
        file.parent.mkdir(exist_ok=True)
        rows = [f"a {name} film of kind {n} \t{n % 2}" for n in range(num)]
        file.write_text("\n".join(["sentence\tlabel", *rows, ""]))
    (folder / "wikitext-2").mkdir()
    for name in ("train_rebuilt", "valid", "test"):
        (folder / "wikitext-2" / f"{name}.txt").write_text(f"some words of {name} . " * 30)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture(scope="module")
def base(tiny_model_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)


def prepared(name: str, data: Path, tokenizer: Any, folder: Path, **setting: Any) -> tasks.Prepared:
    full = {**plan.TRAINING, **SMALL, "max_length": 200, **setting}
    return pickle.loads(tasks.prepare(name, data, tokenizer, full, folder).read_bytes())


# --- plans


def result_of(training: plan.Training, loss: float = 1.0, **more: Any) -> dict[str, Any]:
    return {**training, "curve": [[0, 0, 2.0], [training["steps"], 1.0, loss]], **more}


def test_a_plan_goes_on_with_what_it_finds() -> None:
    small = small_plan(budgets=["steps", "seconds"])
    lines: dict[str, Any] = {}
    first = plan.expand(small, lines, {})
    assert {t["seed"] for t in first.trainings if t["kind"] == "training"} == {0}
    assert "mawps, top: the importance of the layers is not measured" in first.waiting
    assert "mawps, half: its learning rates are not all tried, or none worked" in first.waiting
    speeds = {"LoRA": 0.3, "random": 0.1, "IST": 0.2}
    for training in first.trainings:  # every method's best rate is the higher one
        lines[training["id"]] = result_of(
            training,
            loss=1 / training["learning_rate"],
            importance=[0.1, 0.4, 0.2, 0.3],
            step_seconds=speeds.get(training["method"], 0.1),
        )
    second = plan.expand(small, lines, {}).trainings
    assert {t["options"]["selector"] for t in second if t["method"] == "top"} == {"fixed:1"}
    others = [t for t in second if t["seed"] == 1]
    assert {t["learning_rate"] for t in others} == {1e-2}
    assert {t["method"] for t in others} >= {"LoRA", "IST", "half"}
    timed = {t["method"]: t["steps"] for t in second if t["budget"] == "seconds"}
    assert (timed["random"], timed["IST"]) == (9, round(3 * 0.3 / 0.2))
    assert "LoRA" not in timed
    ids = [t["id"] for t in second]
    assert len({*ids}) == len(ids)
    assert {*lines} <= {*ids}
    while new := [t for t in plan.expand(small, lines, {}).trainings if t["id"] not in lines]:
        lines |= {t["id"]: result_of(t, importance=[0.0] * 4, step_seconds=0.1) for t in new}
    assert plan.expand(small, lines, {}).waiting == []


def test_a_rate_that_diverged_is_not_chosen() -> None:
    small = small_plan(methods={"LoRA": {"selector": "all"}})
    grid = plan.expand(small, {}, {}).trainings
    lines = {grid[0]["id"]: result_of(grid[0], 3.0), grid[1]["id"]: {**grid[1], "error": "out of memory"}}
    assert {t["learning_rate"] for t in plan.expand(small, lines, {}).trainings if t["seed"] == 1} == {1e-3}
    lines[grid[0]["id"]]["curve"][-1][2] = None
    assert plan.expand(small, lines, {}).waiting


def test_epochs_become_steps() -> None:
    small = small_plan(training={**SMALL, "epochs": 3})
    assert {t["steps"] for t in plan.expand(small, {}, {"mawps": 11}).trainings if t["kind"] == "training"} == {17}


@pytest.mark.parametrize("file", PLANS, ids=lambda file: file.stem)
def test_the_plans_are_sound(file: Path) -> None:
    found = plan.read_plan(file)
    assert set(found["tasks"]) <= set(tasks.PREPARE) == set(figures.FIGURES)
    trainings = plan.expand(found, {}, dict.fromkeys(found["tasks"], 1000)).trainings
    assert len({t["id"] for t in trainings}) == len(trainings) > 0
    if file.stem != "quick":
        grid = plan.expand(plan.read_plan(file.parent / "grid.yaml"), {}, {}).trainings
        main = plan.expand(plan.read_plan(file.parent / "main.yaml"), {}, {}).trainings
        assert {t["id"] for t in grid} <= {t["id"] for t in main}


def test_what_a_plan_cannot_have(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    for text, message in {
        "{tasks: [mawps], methods: {}, colour: red}": "colour: a plan has some of",
        "{tasks: [mawps]}": "lacks methods",
        "{tasks: [mawps], methods: {A: {rate_of: B}}}": "learning rate of B, which is no method",
    }.items():
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            plan.read_plan(file)
    with pytest.raises(ValueError, match="no LISA, xyz"):
        plan.select(small_plan(methods={"LoRA": {}}), None, ["LISA", "xyz"])
    with pytest.raises(ValueError, match="settings width are unknown"):
        plan.expand(small_plan(training={"width": 3}), {}, {})


# --- data


def test_every_task_is_prepared_once(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    for name in tasks.PREPARE:
        task = prepared(name, data, tokenizer, tmp_path)
        assert task.train
        assert task.validation
        assert not {row.ids for row in task.train} & {row.ids for row in task.validation}
        assert task.counts["train"] == len(task.train)
    stamp = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    prepared("mawps", data, tokenizer, tmp_path)
    assert stamp == {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="task='chess' is unknown"):
        prepared("chess", data, tokenizer, tmp_path)


def test_rows_to_judge_by_are_not_trained_on(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    task = prepared("mawps", data, tokenizer, tmp_path)
    assert task.counts == {
        "train": 12, "validation": 4, "left_out": 2, "test exact answers": 3, "test answers": 3,
    }  # fmt: skip
    texts = [tokenizer.decode(row.ids) for row in task.train]
    assert not any(f"had {number} nuts" in text for text in texts for number in (50, 60))


def test_sentiment_is_a_word(data: Path) -> None:
    row = tasks.read_sentiment(data / "sst2" / "dev.tsv")[1]
    assert row.prompt + row.completion == "Review: a sst2/dev film of kind 1\nSentiment: positive"


# --- one training


def test_a_batch_has_the_loss_of_its_rows(data: Path, tokenizer: Any, base: Any, tmp_path: Path) -> None:
    """Padding on the left and logits for the end alone change nothing."""
    for name in ("gsm8k", "wikitext2"):
        task = prepared(name, data, tokenizer, tmp_path)
        rows = task.validation[:2] + task.train[:2]
        batch = judge.collate(rows)
        assert batch["labels"].shape[1] == batch["logits_to_keep"] <= batch["input_ids"].shape[1]
        with torch.no_grad():
            loss = base(**batch).loss
        total, count = 0.0, 0
        for row in rows:
            ids = torch.tensor([[*row.ids, *row.lasts]])
            with torch.no_grad():
                logits = base(input_ids=ids).logits[0, row.start - 1 : -1].log_softmax(-1)
            total -= float(logits.gather(1, ids[0, row.start :, None]).sum())
            count += ids.shape[1] - row.start
        assert int((batch["labels"] != -100).sum()) == count
        assert float(loss) == pytest.approx(total / count, rel=1e-5)


def test_judging_at_once_is_judging_row_by_row(data: Path, tokenizer: Any, base: Any, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    rows = [row for name in tasks.COMMONSENSE for row in read_task(data, TASKS[name])]
    rows += tasks.read_sentiment(data / "sst2" / "test.tsv")
    expected = {i: v for batch in option_likelihoods(base, tokenizer, rows, max_length=200) for i, v in batch}
    found = judge.choose(base, [tasks.choice(row, tokenizer, 200) for row in rows], cpu)
    assert [len(row.options) for row in rows] == [*map(len, found)]
    for index, values in enumerate(found):
        assert values == pytest.approx(expected[index], rel=1e-5)
    solved = read_task(data, TASKS["gsm8k"])
    one = evaluate(base, tokenizer, {"x": solved}, "loss", max_length=200)["x"].to_dict()
    task = prepared("gsm8k", data, tokenizer, tmp_path, test_rows=99)
    assert judge.test(base, tokenizer, task, cpu)["solutions"] == pytest.approx(one, rel=1e-5)


def test_methods_of_a_seed_begin_alike(data: Path, tokenizer: Any, base: Any, tmp_path: Path) -> None:
    task = prepared("mawps", data, tokenizer, tmp_path)
    trainings = [t for t in plan.expand(small_plan(), {}, {}).trainings if t["kind"] == "training"]
    models = [
        train.make_model(t, base, None, torch.device("cpu"))[0]
        for t in trainings
        if t["method"] in ("LoRA", "random", "IST")
    ]
    first = models[0].state_dict()
    for model in models[1:]:
        assert all(torch.equal(first[name], value) for name, value in model.state_dict().items())
    orders = [[b["input_ids"].tolist() for b in train.batches_of(task.train, t)] for t in trainings]
    assert all(order == orders[0] for order in orders)
    assert train.order_of_rows(12, 24, 0) != train.order_of_rows(12, 24, 1)
    assert sorted(train.order_of_rows(12, 24, 0)[12:]) == [*range(12)]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the compiler's own calls
def test_compiled_layers_train_the_same(
    data: Path, tokenizer: Any, base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one model after another in one process: they share their graphs."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    task = prepared("mawps", data, tokenizer, tmp_path)
    setting = small_plan(methods={name: METHODS[name] for name in ("LoRA", "IST", "LISA")}, seeds=[0])
    setting["training"] = {**SMALL, "dropout": 0.0, "steps": 8}
    trainings = plan.expand(setting, {}, {}).trainings
    graphs = []
    for training in [t for t in trainings if t["learning_rate"] == 1e-2] * 2:
        found, expected = (
            train.train(training, base, tokenizer, task, torch.device("cpu"), compiled) for compiled in (True, False)
        )
        assert (found["compiled"], expected["compiled"]) == (training["method"] != "LISA", False)
        assert [loss for *_, loss in found["curve"]] == pytest.approx([loss for *_, loss in expected["curve"]], 1e-4)
        assert found.get("choices") == expected.get("choices")
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] < graphs[2] == graphs[5]
    torch._dynamo.reset()


def test_the_schedule_ends_at_nothing_and_losses_are_spaced() -> None:
    factors = [train.schedule(step, 20, 0.1) for step in range(1, 21)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[-1] == pytest.approx(1 / 18)
    assert train.evaluation_steps(10, 5) == {2, 4, 6, 8, 10}
    assert train.evaluation_steps(2, 5) == {1, 2}


# --- a plan from end to end


def arguments(data: Path, model: Path, folder: Path, file: Path, *more: str) -> list[str]:
    return [
        str(file), "--model", str(model), "--data", str(data), "--output", str(folder / "out.jsonl"), "--results",
        "--work", str(folder / "work"), "--processes", "0", "--device", "cpu", *more,
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*does not require a gradient:UserWarning")
def test_a_plan_is_run_and_gone_on_with(
    data: Path,
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "SPEED_STEPS", 3)
    monkeypatch.setattr(train, "SPEED_WARM", 1)
    file = tmp_path / "small.yaml"
    broken = {"broken": {"selector": "ist", "beta": 7}}
    small = small_plan(methods=METHODS | broken, rates=[1e-3], budgets=["steps", "seconds"], importance={"steps": 2})
    file.write_text(json.dumps({**small, "tasks": ["mawps"]}))
    call = arguments(data, tiny_model_folder, tmp_path, file)
    assert run.main([*call, "--seconds", "0"]) == 1
    assert not (tmp_path / "out.jsonl").exists()
    assert run.main([*call, "--methods", "LoRA"]) == 0
    before = (tmp_path / "out.jsonl").read_text()
    assert run.main(call) == 1  # the broken one waits for a learning rate
    text = (tmp_path / "out.jsonl").read_text()
    assert text.startswith(before)
    lines = [json.loads(line) for line in text.splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    assert "failed: 2" in capsys.readouterr().out

    errors = {line["method"] for line in lines if "error" in line}
    assert errors == {"broken"}
    assert all("beta=7" in line["error"] for line in lines if "error" in line)
    good = [line for line in lines if line["kind"] == "training" and "error" not in line]
    assert {line["method"] for line in good} == {*METHODS}
    for line in good:
        assert line["curve"][0][0] == 0
        assert line["curve"][-1][0] == line["steps"]
        assert 0 < line["train_seconds"] < line["wall_seconds"]
        assert line["test"]["exact answers"]["total"] == 3
        assert math.isfinite(line["test"]["answers"]["loss"])
        assert {"device", "versions", "commit", "model", "date", "learning_rate", "seed", "options"} <= {*line}
        if line["method"] in ("random", "IST"):
            assert sum(line["choices"]) == 2 * line["steps"]
    starts = {line["method"]: line["curve"][0][2] for line in good if line["seed"] == 0}
    assert len({*starts.values()}) == 1
    importance = [line for line in lines if line["kind"] == "importance"]
    assert [len(line["importance"]) for line in importance] == [4]
    assert {line["method"] for line in lines if line["kind"] == "speed"} >= {"LoRA", "random", "LISA"}

    assert run.main(call) == 1
    assert (tmp_path / "out.jsonl").read_text() == text
    page, *others = (Path(shutil.copy(file, tmp_path)) for file in (table.PAGE, table.SUMMARY_PAGE, table.README))
    results = tmp_path / "results"
    results.mkdir()
    (results / "tiny.jsonl").write_text(text)
    table.main(results, page, *others)
    shown = page.read_text()
    for part in ("| LoRA | ", "| IST, authors' rule | ", "| half | ", "| paper: LLaMA 7B, LoRA | 68.9 |", "beta=7"):
        assert part in shown


def test_several_plans_run_as_one(data: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    first = run.load_plan("main:mawps,sst2", None, ["LoRA", "random"])
    assert [*first["tasks"]] == ["mawps", "sst2"]
    assert [*first["methods"]] == ["LoRA", "random"]
    assert [*run.load_plan("main", ["gsm8k"], None)["tasks"]] == ["gsm8k"]
    both = session.expand_all([first, run.load_plan("long:mawps", None, ["LoRA"]), first], {}, {"mawps": 160})
    alone = plan.expand(first, {}, {}).trainings
    assert both.trainings[: len(alone)] == alone
    assert {t["study"] for t in both.trainings[len(alone) :]} == {"long"}
    assert len({t["id"] for t in both.trainings}) == len(both.trainings)

    methods = {"LoRA": {"selector": "all"}}
    files = [tmp_path / f"{name}.yaml" for name in ("one", "two", "other")]
    for file, setting in zip(files, ({}, {"batch_size": 1}, {"train_rows": 5}), strict=True):
        small = small_plan(methods=methods, rates=[1e-3], seeds=[0], training=SMALL | setting)
        file.write_text(json.dumps({**small, "tasks": ["mawps"]}))
    call = arguments(data, tiny_model_folder, tmp_path, files[0])
    assert run.main([str(files[1]), *call, "--kinds", "speed"]) == 1
    assert not (tmp_path / "out.jsonl").exists()
    assert run.main([str(files[1]), *call]) == 0
    sizes = [json.loads(x)["setting"]["batch_size"] for x in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert sizes == [1, 2]
    with pytest.raises(SystemExit, match="different rows of mawps"):
        run.main([str(files[2]), *call])


def test_rows_end_with_a_token_that_ends_the_models_answers(tokenizer: Any, tiny_model_folder: Path) -> None:
    """Files converted from other formats name another one at times, and answers then go on after their end."""
    run.check_ends(str(tiny_model_folder), tokenizer)
    other = copy.deepcopy(tokenizer)
    other.eos_token = "a"
    with pytest.raises(ValueError, match=r"^Rows would end with a, .* end with <eos>: save its tokenizer again"):
        run.check_ends(str(tiny_model_folder), other)


def test_a_training_whose_rows_ended_otherwise_is_run_again(tmp_path: Path) -> None:
    file = tmp_path / "lines.jsonl"
    file.write_text(
        "".join(json.dumps({"id": name, **more}) + "\n" for name, more in (("a", {"rows_end": "b"}), ("c", {})))
    )
    assert [*run.read_lines([file])] == ["c"]


def test_processes_fail_and_are_replaced(
    data: Path, tokenizer: Any, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])  # which the processes inherit
    full = {**plan.TRAINING, **SMALL, "max_length": 200}
    file = tasks.prepare("mawps", data, tokenizer, full, tmp_path)
    home = pool.Home(str(tiny_model_folder), "tiny", {"mawps": str(file)}, "cpu", "abc", 1)
    good = plan.expand(small_plan(methods={"LoRA": {"selector": "all"}}), {}, {}).trainings[0]
    processes = pool.Pool(1, home)
    try:
        for training in ({**good, "task": "chess"}, good):
            processes.start(training)
            assert processes.num_free == 0
            (line,) = processes.collect(60)
            assert ("error" in line) == (training is not good)
            assert processes.num_free == 1
        processes.start(good)
    finally:
        processes.close()
    assert processes.running == []


def test_a_process_gets_trainings_of_a_kind_that_it_has_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    class Pipe:
        def send(self, training: plan.Training) -> None:
            pass

        def poll(self) -> bool:
            return False

    home = pool.Home("model", "tiny", {}, "cpu", "abc", 1, compiled=True)
    processes = pool.Pool(2, home)
    monkeypatch.setattr(processes, "_launch", lambda: (None, Pipe(), processes._places.pop(0)))
    methods = {
        **{name: METHODS[name] for name in ("LoRA", "IST")},
        "LISA": {"selector": "lisa", "num_active_layers": 1},
    }
    trainings = plan.expand(small_plan(methods=methods), {}, {}).trainings
    every, some, whole = (next(t for t in trainings if t["method"] == name) for name in methods)
    places = []
    for training in (every, some, every, some, whole, some):  # Each time all others have ended.
        processes.start(training)
        ((pipe, (process, place, *_)),) = processes._busy.items()
        places.append(place)
        processes._busy.clear()
        processes._idle.append((process, pipe, place))
    assert places == [0, 1, 0, 1, 1, 1], "whole layers are compiled by none, and leave what a process has compiled"
    processes._idle = [other for other in processes._idle if other[2] == 0]
    processes.start(some)
    assert len(processes._busy) == 1, "a process of another kind, where no new one can be started"
    processes._busy.clear()


def test_frozen_weights_rounded_once_give_what_autocast_gives(
    data: Path, tokenizer: Any, base: Any, tmp_path: Path
) -> None:
    task = prepared("mawps", data, tokenizer, tmp_path)
    (training, *_) = plan.expand(small_plan(methods={"LoRA": {"selector": "all"}}), {}, {}).trainings
    losses, gradients = [], []
    for rounded in (False, True):
        model, _ = train.make_model(training, base, None, torch.device("cpu"))
        if rounded:
            train.round_frozen(model)
            assert any(p.dtype == torch.bfloat16 for p in model.parameters())
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(**judge.collate(task.train[:3]), use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert losses[0] == losses[1]
    assert all(torch.equal(gradients[0][name], value) for name, value in gradients[1].items())


class Crowded:
    """A pool of two on a device that has memory for one at a time, but once for two."""

    def __init__(self) -> None:
        self.num, self.running, self.begun = 2, [], []

    @property
    def num_free(self) -> int:
        return self.num - len(self.running)

    def start(self, training: plan.Training) -> None:
        self.running.append(training)
        self.begun.append(training["seed"])

    def collect(self, seconds: float) -> list[dict[str, Any]]:
        full = len(self.running) > 1
        line = result_of(self.running.pop(), train_seconds=1.0, wall_seconds=2.0)
        return [{**line, "error": "OutOfMemoryError: CUDA out of memory."} if full else line]

    def shrink(self) -> None:
        self.num -= 1


def test_a_training_without_memory_is_put_back(tmp_path: Path) -> None:
    small = small_plan(methods={"LoRA": {"selector": "all"}}, rates=[1e-3], seeds=[0, 1, 2])
    (first,) = plan.expand(small, {}, {}).trainings
    lines = {first["id"]: result_of(first)}
    crowded: Any = Crowded()
    session.Session([small], crowded, lines, tmp_path / "out.jsonl", {}, 60, 60, time.monotonic()).run()
    assert crowded.begun == [1, 2, 2]
    assert {line["seed"] for line in lines.values() if "error" not in line} == {0, 1, 2}


def test_what_is_no_number_is_none_in_json() -> None:
    line = {"test": {"a": {"loss": math.nan, "perplexity": math.inf}}, "curve": [[0, 0.0, 1.0]], "error": "x"}
    assert session.finite(line) == {
        "test": {"a": {"loss": None, "perplexity": None}}, "curve": [[0, 0.0, 1.0]], "error": "x",
    }  # fmt: skip


def test_renamed_options_leave_the_ids_of_results() -> None:
    """A plan with today's names comes to the ids of the committed results, so nothing is measured again."""
    files = sorted((BENCHMARKS / "quality" / "results").glob("*-h200.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    named = [line for line in lines if line["options"].get("preset") == "reference"]
    assert len(named) > 10
    today: dict[str, Any] = {}
    for line in named:
        matters = {key: line[key] for key in ("kind", "task", "options", "setting", "steps")}
        today = {**matters, "options": {**line["options"], "preset": "authors"}}
        assert line["id"].endswith("/" + plan.code_of(today))
    other = {**today, "options": {"selector": "ist", "suppression": "scaling", "cost_exponent": 1.0}}
    before = {**today, "options": {"selector": "ist", "damping": "scaling", "price": 1.0}}
    assert plan.code_of(other) == plan.code_of(before) != plan.code_of(today)
