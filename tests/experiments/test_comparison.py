"""The table of a comparison, against values worked out by hand, and its pictures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from ist.experiments.comparison import best_rate, figures_of, steps_in_time, tabulate
from ist.experiments.report.comparison import draw_comparison, loss_curve, value_at


def run(method: str, seed: int, loss: float, **more: Any) -> dict[str, Any]:
    return {"method": method, "seed": seed, "budget": "steps", "figures": {"validation loss": loss}, **more}


RUNS = [
    run("LoRA", 0, 1.0), run("random", 0, 1.5), run("IST", 0, 1.3),
    run("LoRA", 1, 2.0), run("random", 1, 2.5), run("IST", 1, 2.1),
    run("LoRA", 2, 3.0), run("IST", 2, 3.2),
]  # fmt: skip
AGAINST = {"LoRA": (), "random": ("LoRA",), "IST": ("LoRA", "random")}


def test_means_deviations_and_pairs() -> None:
    rows = tabulate(RUNS, AGAINST)["validation loss"]
    assert list(rows) == ["LoRA", "random", "IST"]
    assert rows["LoRA"] == {"values": {"0": 1.0, "1": 2.0, "2": 3.0}, "mean": 2.0, "deviation": 1.0, "differences": {}}
    difference = rows["IST"]["differences"]["LoRA"]  # 0.3, 0.1, 0.2: deviation 0.1, half width 4.3027 · 0.1 / √3
    assert difference["mean"] == pytest.approx(0.2)
    assert difference["high"] - difference["mean"] == pytest.approx(4.30265 * 0.1 / math.sqrt(3), abs=1e-5)
    assert difference["num_pairs"] == 3


def test_only_seeds_that_both_have_are_paired() -> None:
    difference = tabulate(RUNS, AGAINST)["validation loss"]["IST"]["differences"]["random"]
    assert difference["num_pairs"] == 2
    assert difference["mean"] == pytest.approx((-0.2 - 0.4) / 2)


def test_a_method_without_runs_has_no_row() -> None:
    table = tabulate(RUNS, {**AGAINST, "LISA": ("LoRA",)})
    assert "LISA" not in table["validation loss"]
    assert tabulate([], AGAINST) == {}


@pytest.mark.parametrize(
    ("after", "tasks", "figures"),
    [
        ({"loss": 1.0}, {}, {"validation loss": 1.0}),
        ({"loss": 1.0, "accuracy": 0.5}, {}, {"validation loss": 1.0, "exact match": 0.5}),
        ({}, {"boolq": {"accuracy": 0.5, "low": 0.4}}, {"boolq": 0.5}),
        ({}, {"a": {"accuracy": 0.5}, "b": {"accuracy": 0.75}}, {"a": 0.5, "b": 0.75, "average": 0.625}),
        ({}, {"wikitext": {"loss": 3.0, "perplexity": 20.1, "tokens": 5}}, {"wikitext loss": 3.0}),
    ],
)
def test_figures_of_a_run(after: dict[str, float], tasks: dict[str, Any], figures: dict[str, float]) -> None:
    assert figures_of({"after": after}, {"tasks": tasks}) == figures


@pytest.mark.parametrize(
    ("losses", "best"),
    [({1e-4: 2.0, 2e-4: 1.0}, 2e-4), ({2e-4: 1.0, 1e-4: 1.0}, 1e-4), ({1e-4: 3.0, 1e-2: math.nan}, 1e-4)],
)
def test_the_best_learning_rate(losses: dict[float, float], best: float) -> None:
    assert best_rate(losses) == best


def test_steps_in_the_time_of_another() -> None:
    runs = [{"num_steps": 100, "step_seconds": 40.0}, {"num_steps": 100, "step_seconds": 60.0}]
    assert steps_in_time(100, runs) == 200  # two steps a second
    assert steps_in_time(0.01, runs) == 1


def test_a_curve_goes_from_before_to_after() -> None:
    log = [
        {"step": 2, "step_seconds": 4.0, "eval_loss": 1.5},
        {"step": 2, "step_seconds": 4.0, "loss": 9.0},
        {"step": 5, "step_seconds": 10.0, "eval_loss": 1.0},
    ]
    made = {"num_steps": 5, "step_seconds": 10.0, "before": {"loss": 3.0}, "after": {"loss": 1.0}}
    assert loss_curve({**made, "log": log}) == [(0, 0.0, 3.0), (2, 4.0, 1.5), (5, 10.0, 1.0)]
    assert loss_curve({**made, "log": []}) == [(0, 0.0, 3.0), (5, 10.0, 1.0)]
    assert loss_curve({**made, "log": [], "before": {}}) == []
    assert value_at(3.5, loss_curve({**made, "log": log}), 0) == 1.25
    assert value_at(7.0, loss_curve({**made, "log": log}), 1) == 1.25


def full_run(method: str, seed: int, learns: bool, budget: str = "steps") -> dict[str, Any]:
    """A run as `compare.json` holds it, of invented numbers."""
    return {
        "method": method, "seed": seed, "budget": budget, "num_steps": 4, "step_seconds": 2.0 + seed,
        "before": {"loss": 3.0}, "after": {"loss": 1.0 + seed}, "figures": {"validation loss": 1.0 + seed},
        "log": [{"step": 2, "step_seconds": 1.0, "eval_loss": 2.0}],
        "choices": [1, 0, 4] if learns else None,
        "importance": {"steps": [2, 4], "scores": [[0, 1, -1], [0, 2, -2 - seed]]} if learns else None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        ([full_run("LoRA", 0, False), full_run("IST", 0, True)], ["losses", "importance", "choices"]),
        (
            [full_run("IST", s, True, b) for s in (0, 1) for b in ("steps", "seconds")],
            ["losses", "importance", "choices"],
        ),
        ([full_run("LoRA", 0, False)], ["losses"]),
        (
            [full_run(name, seed, False) for name in ("all", "top-1", "top-2", "bottom-1") for seed in (0, 1)],
            ["losses", "selection"],
        ),
        ([{**full_run("LoRA", 0, False), "log": [], "before": {}}], []),
        (
            [{**full_run("LoRA", s, False), "figures": {"exact match": 0.5, "half score": 3.0 + s}} for s in (0, 1)],
            ["losses", "metrics"],
        ),
    ],
)
def test_pictures_of_what_there_is(tmp_path: Path, runs: list[dict[str, Any]], names: list[str]) -> None:
    pictures = draw_comparison({"runs": runs}, tmp_path)
    assert [picture.stem for picture in pictures] == names
    for picture in pictures:
        assert matplotlib.image.imread(picture)[..., :3].std() > 0.02
