"""The curves of learning rates, on made-up result lines."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

PATH = [*sys.path]
sys.path.insert(0, str(Path(__file__).parents[1]))

from quality import figures, plan, scaling  # noqa: E402

sys.path[:] = PATH  # as other tests expect it

RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)
BEST = {"all layers": 5e-4, "half, sqrt": 5e-4, "half, kept": 1e-3, "half, linear": 2.5e-4}


def line_of(method: str, rate: float, loss: float | None, **changed: Any) -> dict[str, Any]:
    return {
        "id": f"{method} {rate} {changed}", "kind": "training", "task": "gsm8k", "method": method, "seed": 0,
        "learning_rate": rate, "study": "scaling", "model": "small", "curve": [[8, 1.0, loss]], **changed,
    }  # fmt: skip


def made_lines() -> list[dict[str, Any]]:
    """The loss of each method grows with the distance from its best rate, by .01 for each factor of two."""
    return [
        line_of(method, rate, 0.6 + 0.01 * abs(math.log2(rate / best)))
        for method, best in BEST.items()
        for rate in RATES
    ]


def test_curves_are_of_the_first_seed_of_the_study() -> None:
    others = [
        line_of("all layers", 5e-4, 0.1, study="focused"),
        line_of("all layers", 5e-4, 0.1, seed=1),
        line_of("half, sqrt", 4e-3, None),  # it diverged
        {**line_of("half, sqrt", 8e-3, None, error="x"), "curve": []},
        line_of("half, sqrt", 5e-4, 0.1, task="wikitext2"),  # LoRA is not there
    ]
    (found,) = scaling.read_curves(made_lines() + others)
    assert (found.model, found.task, found.part) == ("small", "gsm8k", "half")
    assert found.reference == pytest.approx({2.5e-4: 0.61, 5e-4: 0.6, 1e-3: 0.61, 2e-3: 0.62})
    assert sorted(found.of_alpha) == ["kept", "linear", "sqrt"]
    assert set(found.of_alpha["sqrt"]) == set(RATES)
    above = {alpha: found.loss_at_reference(alpha) for alpha in scaling.ALPHAS}
    assert above == pytest.approx({"kept": 0.01, "sqrt": 0.0, "linear": 0.01})
    missing = [line for line in made_lines() if (line["method"], line["learning_rate"]) != ("half, kept", 5e-4)]
    assert scaling.read_curves(missing)[0].loss_at_reference("kept") is None


def test_the_table_says_what_is_lost_at_loras_best_rate() -> None:
    table, picture = scaling.scaling_section(made_lines())
    assert table.splitlines()[2:] == [
        "| small | gsm8k | all | – | 0.0005 | 0.6000 | – |",
        "| small | gsm8k | half | kept | 0.001 | 0.6000 | +0.0100 (more than 0.003) |",
        "| small | gsm8k | half | raised by the square root | 0.0005 | 0.6000 | +0.0000 |",
        "| small | gsm8k | half | raised like the rank | 0.00025 (edge) | 0.6000 | +0.0100 (more than 0.003) |",
    ]
    assert picture == scaling.TEXT
    assert [*scaling.scaling_section([])] == []


def test_the_figure_is_drawn_from_json_lines(tmp_path: Path) -> None:
    text = "".join(json.dumps(line) + "\n" for line in [*made_lines(), {**made_lines()[0], "study": "quick"}])
    (tmp_path / "made.jsonl").write_text(text)
    assert figures.load_lines(tmp_path) == [], "they stand in no other table"
    curves = scaling.read_curves(figures.read_folder(tmp_path))
    scaling.draw_curves(tmp_path / "images" / scaling.PICTURE, curves)
    assert (tmp_path / "images" / scaling.PICTURE).read_bytes().startswith(b"\x89PNG")


def test_the_plan_makes_these_lines() -> None:
    made = plan.read_plan(Path(plan.__file__).parent / "plans" / "focused-scaling.yaml")
    lines: dict[str, Any] = {}
    for training in plan.expand(made, lines, {}).trainings:
        loss = 0.6 + abs(math.log2(training["learning_rate"] / 5e-4))
        lines[training["id"]] = {**training, "model": "small", "curve": [[250, 1.0, loss]]}
    assert plan.expand(made, lines, {}).waiting == []
    curves = scaling.read_curves(lines.values())
    assert {(each.task, each.part, *each.of_alpha) for each in curves} == {
        (task, part, "kept", "sqrt", "linear") for task in ("gsm8k", "wikitext2") for part in ("half", "quarter")
    }
    assert len(lines) == 2 * 7 * 6
