"""What one call of the driver starts, in which order, and when it stops."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

PATH = [*sys.path]
sys.path.insert(0, str(Path(__file__).parents[1]))

from quality import memory, plan, pool, session  # noqa: E402

sys.path[:] = PATH  # as other tests expect it

GIB = 2.0**30


def plan_of(**changed: Any) -> dict[str, Any]:
    base = {
        "tasks": {"gsm8k": {}, "sst2": {}},
        "methods": {"LoRA": {"selector": "all"}, "half": {"selector": "all", "focus": {}, "rate_of": "LoRA"}},
        "rates": [1e-3, 2e-3],
        "seeds": [0, 1],
        "training": {"steps": 10},
    }
    return {**base, **changed}


class Pool:
    """Ends what it was given in order, each training with a loss that is lower at the lower rate."""

    def __init__(self, num: int, gib: float = 1.0) -> None:
        self.num, self.gib, self.running, self.begun, self.most = num, gib, [], [], 0

    @property
    def num_free(self) -> int:
        return self.num - len(self.running)

    def start(self, training: plan.Training) -> None:
        self.running.append(training)
        self.begun.append((training["task"], training["method"], training["learning_rate"], training["seed"]))
        self.most = max(self.most, len(self.running))

    def collect(self, seconds: float) -> list[dict[str, Any]]:
        training = self.running.pop(0)
        curve = [[10, 1.0, training["learning_rate"]]]
        used = {"peak_memory_bytes": GIB, "device_memory_bytes": self.gib * GIB}
        return [{**training, **used, "curve": curve, "train_seconds": 1.0, "wall_seconds": 2.0}]


def go(plans: list[Any], pool: Any, output: Path, seconds: float = 60, **more: Any) -> dict[str, Any]:
    lines: dict[str, Any] = {}
    session.Session(plans, pool, lines, output, {}, seconds, 60, time.monotonic(), **more).run()
    return lines


def test_rates_come_first_then_seed_by_seed_over_all_tasks_and_methods(tmp_path: Path) -> None:
    other = plan_of(tasks={"mawps": {}}, methods={"LoRA": {"selector": "all"}})
    pool: Any = Pool(1)
    lines = go([plan_of(), other], pool, tmp_path / "out.jsonl")
    tasks = ("gsm8k", "sst2")
    assert pool.begun == [
        ("gsm8k", "LoRA", 1e-3, 0),
        ("gsm8k", "LoRA", 2e-3, 0),
        ("gsm8k", "half", 1e-3, 0),
        ("sst2", "LoRA", 1e-3, 0),
        ("sst2", "LoRA", 2e-3, 0),
        ("sst2", "half", 1e-3, 0),
        *((task, method, 1e-3, 1) for task in tasks for method in ("LoRA", "half")),
        *(("mawps", "LoRA", rate, 0) for rate in (1e-3, 2e-3)),
        ("mawps", "LoRA", 1e-3, 1),
    ]
    again: Any = Pool(1)
    session.Session([plan_of(), other], again, lines, tmp_path / "out.jsonl", {}, 60, 60, time.monotonic()).run()
    assert again.begun == [], "every line is there"


def test_after_the_budget_nothing_starts_and_what_runs_is_finished(tmp_path: Path) -> None:
    class Slow(Pool):
        def collect(self, seconds: float) -> list[dict[str, Any]]:
            now.begin -= 1.0  # A second passes.
            return super().collect(seconds)

    pool: Any = Slow(2)
    lines: dict[str, Any] = {}
    out = tmp_path / "out.jsonl"
    now = session.Session([plan_of()], pool, lines, out, {}, 1.5, 60, time.monotonic())
    now.run()
    assert len(pool.begun) == len(lines) == 3
    assert pool.running == []
    assert len([json.loads(text) for text in out.read_text().splitlines()]) == 3
    assert go([plan_of()], Pool(2), tmp_path / "other.jsonl", seconds=0) == {}


@pytest.mark.parametrize(("total", "most"), [(None, 4), (100, 4), (25, 2), (11, 1), (1, 1)])
def test_no_more_run_side_by_side_than_the_memory_holds(tmp_path: Path, total: float | None, most: int) -> None:
    """Of 10 GiB each and the context of its process, once one has ended; the first ones are not known."""
    known = {"x": {"task": "gsm8k", "method": "LoRA", "device_memory_bytes": 10 * GIB}}
    pool: Any = Pool(4, gib=10)
    limit = None if total is None else total * GIB
    lines = go([plan_of()], pool, tmp_path / "out.jsonl", memory=memory.Memory(limit, known))
    assert pool.most == most
    assert len(lines) == 10, "all are trained in the end"


def test_what_a_training_takes_is_that_of_its_like() -> None:
    lines = {
        "a": {"task": "gsm8k", "method": "LoRA", "device_memory_bytes": 8 * GIB, "peak_memory_bytes": 5 * GIB},
        "b": {"task": "gsm8k", "method": "half", "peak_memory_bytes": 5 * GIB},  # of an earlier commit
        "c": {"task": "sst2", "method": "LoRA", "device_memory_bytes": 3 * GIB},
        "d": {"task": "sst2", "method": "half", "device_memory_bytes": 90 * GIB, "error": "OutOfMemoryError"},
        "e": {"task": "mawps", "method": "LoRA", "peak_memory_bytes": None},
    }
    found = memory.Memory(20 * GIB, lines)

    def expected(task: str, method: str) -> float:
        return round((found.expected({"task": task, "method": method}) - memory.PROCESS) / GIB, 6)

    assert expected("gsm8k", "LoRA") == 8
    assert expected("gsm8k", "half") == 6
    assert expected("gsm8k", "third") == 8, "the largest of the task"
    assert expected("sst2", "half") == 3
    assert expected("wikitext2", "LoRA") == 8, "the largest of all"
    assert memory.Memory(20 * GIB).expected({"task": "gsm8k", "method": "LoRA"}) == 0
    assert memory.device_memory("cpu") is None


class Failing(Pool):
    """One in which methods fail, each with its own error."""

    def __init__(self, *methods: str, num: int = 1) -> None:
        super().__init__(num)
        self.methods = methods

    def collect(self, seconds: float) -> list[dict[str, Any]]:
        (line,) = super().collect(seconds)
        return [{**line, "error": f"no {line['method']}", "curve": []} if line["method"] in self.methods else line]


def test_where_all_fail_alike_the_call_ends_and_leaves_them_for_the_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder of the model is not there, which ends every training."""
    out = tmp_path / "out.jsonl"
    wanted = plan_of(methods={"LoRA": {"selector": "all"}}, rates=[1e-3, 2e-3, 4e-3])
    home = pool.Home(str(tmp_path / "model"), "tiny", {"gsm8k": "x", "sst2": "x"}, "cpu", "abc", 1)
    assert go([wanted], pool.Inline(home), out) == {}
    assert not out.exists(), "what failed for a reason that is not its own has no line"
    said = capsys.readouterr().out
    assert said.count("stopped: 5 trainings failed and none succeeded, with ") == 1
    assert said.splitlines()[-1].startswith("stopped: ")
    assert len(go([wanted], Pool(1), out)) == 8, "the next call trains all"
    assert len(out.read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("failing", "methods", "num_lines"),
    [
        (("LoRA",), ("LoRA", "other"), 26),  # One method's fault: the others are trained.
        (("other",), ("LoRA", "other"), 26),
        (("LoRA", "other"), ("LoRA", "other"), 24),  # Both fail, each by itself.
        (("LoRA",), ("LoRA",), 0),
    ],
)
def test_failures_of_one_method_are_its_own(
    tmp_path: Path, failing: tuple[str, ...], methods: tuple[str, ...], num_lines: int
) -> None:
    out = tmp_path / "out.jsonl"
    rates = [1e-3 * (1 + number) for number in range(6)]
    wanted = plan_of(methods={name: {"selector": "all"} for name in methods}, rates=rates)
    lines = go([wanted], Failing(*failing), out)
    written = [json.loads(text)["id"] for text in out.read_text().splitlines()] if out.exists() else []
    assert len(lines) == len(written) == num_lines
    assert {*written} == {*lines}
    if len(failing) == 1 and num_lines:
        again: Any = Pool(1)
        session.Session([wanted], again, lines, out, {}, 60, 60, time.monotonic()).run()
        assert again.begun == [], "what failed by its own fault is not tried again"


class Killed(Pool):
    """One of whose processes the host kills some: each time that so many run, or a training's first so many times."""

    def __init__(self, num: int, beside: int = 99, times: dict[str, int] | None = None) -> None:
        super().__init__(num)
        self.beside, self.times = beside, times or {}

    def collect(self, seconds: float) -> list[dict[str, Any]]:
        crowded = len(self.running) >= self.beside
        (line,) = super().collect(seconds)
        left = self.times.get(line["method"], 0)
        self.times[line["method"]] = max(0, left - 1)
        return [{**line, "error": pool.KILLED, "curve": []} if crowded or left else line]

    def shrink(self) -> None:
        self.num -= 1


def test_what_a_host_without_memory_kills_is_put_back_with_one_process_less(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    some: Any = Killed(4, beside=3)
    lines = go([plan_of()], some, out)
    assert some.num == 2
    assert len(lines) == len(out.read_text().splitlines()) == 10
    assert not any("error" in line for line in lines.values())
    assert capsys.readouterr().out.count("its process was killed: put back, with one process less\n") == 2


@pytest.mark.parametrize(("times", "left"), [(session.MOST_KILLED, 0), (session.MOST_KILLED + 1, 1)])
def test_a_training_that_is_killed_again_and_again_is_left_for_the_next_call(
    times: int, left: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.jsonl"
    wanted = plan_of(methods={"LoRA": {"selector": "all"}, "other": {"selector": "all"}}, rates=[1e-3], seeds=[0])
    some: Any = Killed(1, times={"LoRA": times})
    lines = go([wanted], some, out)
    assert some.num == 1
    assert len(lines) == len(out.read_text().splitlines()) == 4 - left
    assert capsys.readouterr().out.count(f"{times} times, and is left for the next call\n") == left
    again: Any = Pool(1)
    session.Session([wanted], again, lines, out, {}, 60, 60, time.monotonic()).run()
    assert len(again.begun) == left


def test_a_call_whose_every_training_is_killed_ends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    wanted = plan_of(methods={"LoRA": {"selector": "all"}}, rates=[1e-3, 2e-3, 4e-3])
    some: Any = Killed(2, beside=1)
    assert go([wanted], some, out) == {}
    assert not out.exists()
    assert len(some.begun) <= session.ALIKE * (session.MOST_KILLED + 1) + 1
    assert (
        capsys.readouterr().out.splitlines()[-1].startswith("stopped: the processes of 5 trainings were killed again")
    )
