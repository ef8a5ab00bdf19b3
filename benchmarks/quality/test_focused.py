"""The verdict on focused training, on made-up result lines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

PATH = [*sys.path]
sys.path.insert(0, str(Path(__file__).parents[1]))

from quality import figures, focused, plan, settings  # noqa: E402
from step_time.cases import GROUPS, PARTS, UPPER  # noqa: E402
from step_time.shares import time_shares  # noqa: E402

sys.path[:] = PATH  # as other tests expect it

PLANS = Path(__file__).parent / "plans"
LOSS, SHARE = "test loss, nats a token", "exact match, %"


def difference(mean: float, half_width: float | None) -> dict[str, Any]:
    low, high = (None, None) if half_width is None else (mean - half_width, mean + half_width)
    return {"mean": mean, "low": low, "high": high, "num_pairs": 3}


@pytest.mark.parametrize(
    ("mean", "half_width", "title", "expected"),
    [
        (-0.010, 0.005, LOSS, "better"),
        (+0.002, 0.001, LOSS, "worse"),  # within the margin, and beyond chance on the wrong side
        (+0.004, 0.005, LOSS, "not worse"),
        (+0.006, 0.010, LOSS, "open"),
        (-0.010, 0.020, LOSS, "not worse"),
        (+0.030, 0.010, SHARE, "better"),
        (-0.030, 0.010, SHARE, "worse"),
        (-0.009, 0.020, SHARE, "not worse"),
        (-0.011, 0.020, SHARE, "open"),
        (-0.011, None, SHARE, "one seed"),
    ],
)
def test_the_rule(mean: float, half_width: float | None, title: str, expected: str) -> None:
    assert focused.judged(difference(mean, half_width), title) == expected


def line_of(method: str, seed: int, loss: float, **changed: Any) -> dict[str, Any]:
    return {
        "id": f"{method} {seed}", "kind": "training", "task": "gsm8k", "method": method, "seed": seed, "steps": 8,
        "learning_rate": 1e-3, "study": "focused", "model": "small", "base_steps": 8, "epochs": None, "ablation": False,
        "budget": "steps", "options": {"selector": "all"}, "test": {"solutions": {"loss": loss}}, "file": "x.jsonl",
        "setting": {"batch_size": 2}, "curve": [[8, 1.0, loss]], "date": "2026", "device": "GPU", "commit": "abc",
        **changed,
    }  # fmt: skip


def test_the_table_pairs_by_seed_and_says_how_many_steps_lora_had() -> None:
    lines = []
    for seed in range(3):
        lines.append(line_of("LoRA", seed, 0.5 + 0.1 * seed))
        lines.append(line_of("LoRA, time of half", seed, 0.52 + 0.1 * seed, steps=6, time_share=0.75))
        lines.append(line_of("focused, half", seed, 0.501 + 0.1 * seed + 0.001 * (seed % 2), focus={"layers": [0, 2]}))
    lines.append(line_of("LoRA", 0, 9.0, study="main", setting={"batch_size": 2, "dropout": 0.5}))
    caption, table, layers = focused.focused_section(figures.compare(lines))
    assert caption == "**small, 8 steps.** LoRA, time of half: 6 steps (0.750). GPU, abc, x.jsonl"
    rows = table.splitlines()[2:]
    assert rows[0].startswith("| half, equal steps | focused, half − LoRA | +0.0013 [")
    assert rows[0].endswith("3 seeds: not worse | 1 not worse |")
    assert rows[1].startswith("| half, equal time | focused, half − LoRA, time of half | -0.0187 [")
    assert rows[1].endswith("3 seeds: better | 1 better |")
    assert len(rows) == 2
    assert "| gsm8k | focused, half | 0, 2 (all seeds) |" in layers


def test_rows_that_end_with_another_token_are_compared_among_themselves() -> None:
    def lines_of(end: str, value: float) -> list[dict[str, Any]]:
        more = {"rows_end": end} if end else {}
        made = [line_of(name, seed, value, **more) for name in ("LoRA", "focused, half") for seed in (0, 1)]
        for line in made:
            line["test"]["exact answers"] = {"accuracy": 0.5}
        return made

    found = figures.compare([*lines_of("", 0.5), *lines_of("<|other|>", 0.7)])
    assert [(comparison.named, comparison.group[2], len(comparison.lines)) for comparison in found] == [
        ("small", "", 4),
        ("small, rows that end with `<|other|>`", "<|other|>", 4),
    ]
    assert "exact answers" in figures.figures(found[0].lines[0])
    assert "exact answers" not in figures.figures(found[1].lines[0])


# --- the plans


def plan_of(**changed: Any) -> dict[str, Any]:
    return {
        "study": "focused",
        "tasks": {"gsm8k": {}},
        "methods": {
            "LoRA": {"selector": "all"},
            "short": {"selector": "all", "rate_of": "LoRA", "time_share": "half"},
        },
        "rates": {"gsm8k": [1e-3, 2e-3]},
        "seeds": [0, 1],
        "time_shares": {"half": 0.7},
        "training": {"steps": 100},
        **changed,
    }


def results(trainings: list[dict[str, Any]], best: float) -> dict[str, Any]:
    """Lines whose loss grows with the distance from the best rate."""
    return {t["id"]: {**t, "curve": [[t["steps"], 1.0, abs(t["learning_rate"] - best)]]} for t in trainings}


def test_lora_at_the_time_of_another_gets_its_part_of_the_steps() -> None:
    made = plan_of()
    first = plan.expand(made, {}, {}).trainings
    found = plan.expand(made, results(first, 1e-3), {}).trainings
    short = [t for t in found if t["method"] == "short"]
    assert [(t["steps"], t["base_steps"], t["seed"], t["time_share"]) for t in short] == [
        (70, 100, 0, 0.7),
        (70, 100, 1, 0.7),
    ]
    with pytest.raises(ValueError, match=r"time_share='half': the plan has none\."):
        plan.expand(plan_of(time_shares={}), results(first, 1e-3), {})


def test_a_grid_grows_while_its_best_rate_is_at_an_edge() -> None:
    made = plan_of(more_rates=2, methods={"LoRA": {"selector": "all"}})
    lines: dict[str, Any] = {}
    for expected in ([1e-3, 2e-3], [1e-3, 2e-3, 4e-3], [1e-3, 2e-3, 4e-3, 8e-3]):
        grid = [t for t in plan.expand(made, lines, {}).trainings if t["seed"] == 0]
        assert sorted({t["learning_rate"] for t in grid}) == expected
        lines = results(grid, 4e-3)
    last = plan.expand(made, lines, {}).trainings
    assert {t["learning_rate"] for t in last if t["seed"] == 1} == {4e-3}
    assert len({t["learning_rate"] for t in last}) == 4


def test_the_time_of_a_step_is_to_the_faster_lora() -> None:
    rows = {
        "LoRA, Liger, no dropout": {"step_ms": [400.0, 380.0, 390.0]},
        "LoRA in our step, Liger, no dropout": {"step_ms": [300.0]},
        "focused half, Liger, no dropout": {"step_ms": [240.0]},
        "focused third, Liger, no dropout": {"error": "out of memory"},
    }
    assert time_shares({"rows": rows}) == {"half": 0.8}
    assert time_shares({"rows": {}}) == {}


def test_each_part_above_the_lowest_has_its_time() -> None:
    rows = {case.name: {"step_ms": [200.0 * (1 - case.above / 2)]} for case in GROUPS["focused-upper"]}
    rows["LoRA in our step, Liger, no dropout"] = {"step_ms": [250.0]}
    assert time_shares({"rows": rows}) == {
        "half above an eighth": 0.75,
        "half above a quarter": 0.7,
        "third above a quarter": 0.7,
        "all above a quarter": 0.7,
    }


def test_plans_of_the_upper_part_have_the_times_that_are_measured() -> None:
    names = {*PARTS, *UPPER}
    for file in ("focused-upper", "focused-upper-small", "focused-upper-five", "focused-commonsense"):
        made = settings.read_plan(PLANS / f"{file}.yaml")
        used = {method["time_share"] for method in made["methods"].values() if "time_share" in method}
        assert used <= names & set(made["time_shares"]), file
