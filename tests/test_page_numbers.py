"""Numbers in the prose of the pages are those of the result files; `make tables` makes the tables."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]


def words_of(page: str) -> str:
    """A page of the docs on one line."""
    return " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())


def trainings_of(file: str) -> list[dict[str, Any]]:
    """The lines of a result file of benchmarks/quality."""
    text = (ROOT / "benchmarks" / "quality" / "results" / file).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_numbers_of_focused_training_are_those_of_its_trainings() -> None:
    """Those that no table shows."""
    text = words_of("focused.md")
    large, small = trainings_of("focused-qwen-h200.jsonl"), trainings_of("focused-small-h200.jsonl")
    focused = [row for row in large if row["method"] == "focused, half"]
    looks, seconds = [row["focus"]["seconds"] for row in focused], [row["train_seconds"] for row in focused]
    assert f"took {min(looks):.1f} to {max(looks):.1f} seconds" in text
    others = [row for row in small if row["method"] == "focused, half"]
    looks, slower = [row["focus"]["seconds"] for row in others], [row["train_seconds"] for row in others]
    assert f"the small one {min(looks):.1f} to {max(looks):.1f} before {min(slower):.0f} to {max(slower):.0f}," in text
    assert f"trainings of {min(seconds):.0f} to {max(seconds):.0f} seconds" in text
    assert {row["steps"] for row in focused} == {250}
    (old,), (new,) = (
        {row["steps"] for row in rows if row["method"] == "LoRA, time of half"} for rows in (large, small)
    )
    assert f"{new} of 250 for the small model. For the 0.5B model it is {old}, by an older measurement" in text
    assert f"{old} by an older measurement, {new} by the present one" in words_of("results.md")


def test_losses_of_a_quarter_are_those_of_its_trainings() -> None:
    rows = [*trainings_of("focused-qwen-h200.jsonl"), *trainings_of("focused-quarter-qwen-h200.jsonl")]
    first = [row for row in rows if row["seed"] == 0 and row["learning_rate"] == 5e-4]

    def above(task: str, metric: str, method: str) -> str:
        (loss,), (lora,) = (
            {row["test"][metric]["loss"] for row in first if (row["task"], row["method"]) == (task, name)}
            for name in (method, "LoRA")
        )
        return f"{loss - lora:.3f}"

    methods = ("focused, quarter", "even, quarter", "by weights, quarter", "by activations, quarter")
    gradient, even, weights, activations = (above("wikitext2", "text", method) for method in methods)
    assert weights == activations
    text = words_of("focused.md")
    assert f"ended {gradient} nats above LoRA, an even one {even}, and with" in text
    assert f'or `"activations"` {weights}.' in text
    solved = sorted(above("gsm8k", "solutions", method) for method in methods)
    assert f"all were between {solved[0]} and {solved[-1]} above" in text


def test_times_of_focused_training_are_those_of_its_steps() -> None:
    file = ROOT / "benchmarks" / "step_time" / "results" / "focused-16x256-h200.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]

    def to(name: str, other: str = "LoRA", figure: str = "step_ms") -> str:
        one, two = (median(rows[f"{row}, Liger, no dropout"][figure]) for row in (name, other))
        return f"{one / two:.2f}"

    def again(part: str, figure: str) -> str:
        one, two = (
            rows[f"{row}, Liger, no dropout{more}"][figure] for row, more in ((part, ", recomputed"), ("LoRA", ""))
        )
        return f"{median(one) / median(two):.2f}"

    half, fused, of_fused = to("focused half"), to("LoRA in our step"), to("focused half", "LoRA in our step")
    text = words_of("focused.md")
    assert f"a step takes {half} of the time of PEFT's LoRA" in text
    assert f'with `IST(selector="all")` takes {fused}' in text
    assert f"the step takes {of_fused} of LoRA's in the fused step" in text
    peaks, times = (
        [again(f"focused {part}", name) for part in ("half", "quarter")] for name in ("peak_gib", "step_ms")
    )
    assert (
        f"the peak is {peaks[0]} of PEFT's for a half and {peaks[1]} for a quarter, at {times[0]} and {times[1]}"
        in text
    )
    assert f"in {half} of PEFT's time" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"The fused step takes {fused} of PEFT's time" in words_of("cost.md")
