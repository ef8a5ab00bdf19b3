"""Calls that share plans: each training is of one share, and methods that are left out still have learning rates."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

PATH = [*sys.path]
sys.path.insert(0, str(Path(__file__).parents[1]))

from quality import part, plan, run, session  # noqa: E402

sys.path[:] = PATH  # as other tests expect it

PLAN: dict[str, Any] = {
    "tasks": {"gsm8k": {}, "sst2": {}},
    "methods": {
        "LoRA": {"selector": "all"},
        "half": {"selector": "all", "focus": {}, "rate_of": "LoRA"},
        "own": {"selector": "all", "use_dora": True},
    },
    "rates": [1e-3, 2e-3],
    "seeds": [0, 1, 2],
    "budgets": ["steps", "seconds"],
    "training": {"steps": 10},
}


def lines_of(trainings: list[Any]) -> dict[str, Any]:
    return {
        t["id"]: {**t, "curve": [[10, 1.0, t["learning_rate"]]], "step_seconds": 1.0, "importance": [1.0, 2.0]}
        for t in trainings
    }


def finished() -> dict[str, Any]:
    """All lines of the plan."""
    lines: dict[str, Any] = {}
    while left := [t for t in session.expand_all([PLAN], lines, {}).trainings if t["id"] not in lines]:
        lines |= lines_of(left)
    return lines


@pytest.mark.parametrize("shares", [2, 3])
def test_shares_have_nothing_in_common_and_lack_nothing(shares: int) -> None:
    """Also as lines come in, and where a second plan has the same trainings in another order."""
    done = finished()
    other = {**PLAN, "methods": dict(reversed(PLAN["methods"].items())), "seeds": [2, 0]}
    for lines in ({}, done):
        every = session.expand_all([PLAN, other], lines, {}).trainings
        parts = [
            session.expand_all([PLAN, other], lines, {}, part.Part(share=(number, shares))).trainings
            for number in range(1, shares + 1)
        ]
        ids = [training["id"] for own in parts for training in own]
        assert sorted(ids) == sorted(training["id"] for training in every)
    sizes = [len(own) for own in parts]
    assert max(sizes) - min(sizes) <= 0.4 * max(sizes)
    rates = [{(t["task"], t["method"]) for t in own if t["kind"] == "training" and t["seed"] == 0} for own in parts]
    assert not rates[0] & rates[1], "all learning rates of a method are tried by one call"


def test_seeds_alone() -> None:
    done = finished()
    for seeds in ({1}, {0, 2}):
        own = session.expand_all([PLAN], done, {}, part.Part(seeds=frozenset(seeds))).trainings
        assert {t["seed"] for t in own if t["kind"] == "training"} == seeds
        assert any(t["kind"] == "speed" for t in own) == (0 in seeds), "what is timed is of the first seed"
    first = part.Part(seeds=frozenset({1}))
    assert session.expand_all([PLAN], {}, {}, first).trainings == [], "other calls try the learning rates"


@pytest.mark.parametrize(("text", "share"), [("1/1", (1, 1)), ("2/2", (2, 2)), ("3/8", (3, 8))])
def test_a_share_is_read(text: str, share: tuple[int, int]) -> None:
    assert part.read_share(text) == share


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "", "a/b", "1/2/3", "-1/2", "1/0"])
def test_what_is_no_share(text: str) -> None:
    with pytest.raises(ValueError, match="1/2 is the first of two"):
        part.read_share(text)


def test_methods_left_out_still_have_learning_rates_and_times(tmp_path: Path) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(json.dumps(PLAN))
    done = finished()
    for given in ((None, ["LoRA", "own"]), (["half"], ())):
        own = run.load_plan(str(file), None, *given)
        assert [*own["methods"]] == ["half"]
        waiting = session.expand_all([own], {}, {})
        assert {t["method"] for t in waiting.trainings} == {"half", "LoRA"}, "to be timed"
        assert {t["kind"] for t in waiting.trainings} == {"speed"}
        assert any("half: its learning rates are not all tried" in reason for reason in waiting.waiting)
        trainings = [t for t in session.expand_all([own], done, {}).trainings if t["kind"] == "training"]
        assert {t["method"] for t in trainings} == {"half"}
        assert len(trainings) == 2 * 2 * 3
        assert all(t["id"] in done for t in trainings), "ids as those of the whole plan"


def test_a_method_that_no_plan_has_cannot_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(json.dumps(PLAN))
    (tmp_path / "two.yaml").write_text(json.dumps({**PLAN, "methods": {"LoRA": {"selector": "all"}}}))
    call = [str(tmp_path / "one.yaml"), str(tmp_path / "two.yaml"), "--model", "m", "--data", "d", "--output", "o"]
    plans = run.load_plans(run.parse([*call, "--without", "half"]))
    assert [[*each["methods"]] for each in plans] == [["LoRA", "own"], ["LoRA"]]
    with pytest.raises(ValueError, match="have no halb: their methods are LoRA, own, half"):
        run.load_plans(run.parse([*call, "--without", "half", "halb"]))


def test_a_call_starts_its_share_alone(tmp_path: Path) -> None:
    class Pool:
        def __init__(self) -> None:
            self.running: list[Any] = []
            self.begun: list[Any] = []

        @property
        def num_free(self) -> int:
            return 1 - len(self.running)

        def start(self, training: plan.Training) -> None:
            self.running.append(training)
            self.begun.append(training)

        def collect(self, seconds: float) -> list[dict[str, Any]]:
            (line,) = lines_of([self.running.pop()]).values()
            return [{**line, "train_seconds": 1.0, "wall_seconds": 2.0}]

    begun = []
    for number in (1, 2):
        pool: Any = Pool()
        own = part.Part(share=(number, 2))
        lines = {}
        small = {**PLAN, "budgets": ["steps"]}
        out = tmp_path / f"{number}.jsonl"
        session.Session([small], pool, lines, out, {}, 60, 60, time.monotonic(), part=own).run()
        assert pool.begun
        begun.append({t["id"] for t in pool.begun})
    assert not begun[0] & begun[1]


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        (["7"], "The plans have no seed 7: give --seeds of 0, 1, 2."),
        (["0", "-1", "5", "5"], "The plans have no seed -1, 5: give --seeds of 0, 1, 2."),
        (["2", "0", "2"], "--seeds names 2 more than once: give each seed once."),
    ],
)
def test_seeds_that_are_no_seeds_of_the_plans(seeds: list[str], message: str, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(json.dumps(PLAN))
    call = [str(tmp_path / "one.yaml"), "--model", "m", "--data", "d", "--output", "o", "--seeds", *seeds]
    with pytest.raises(SystemExit) as caught:
        run.main(call)
    assert caught.value.code == message
    assert run.read_seeds(None, [PLAN]) is None
    assert run.read_seeds([2, 0], [PLAN, {**PLAN, "seeds": [3]}]) == {0, 2}
