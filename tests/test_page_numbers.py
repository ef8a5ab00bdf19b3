"""Numbers in the prose of the pages are those of the result files; `make tables` makes the tables."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, median
from typing import Any

ROOT = Path(__file__).parents[1]
PEFT = "PEFT's step"
STEPS = ROOT / "benchmarks" / "step_time" / "results"


def words_of(page: str) -> str:
    """A page of the docs on one line."""
    return " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())


def trainings_of(file: str) -> list[dict[str, Any]]:
    """The lines of a result file of benchmarks/quality."""
    text = (ROOT / "benchmarks" / "quality" / "results" / file).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


LARGE_FILES = ("focused", "focused-quarter", "focused-upper", "focused-more")
ALL_LARGE = [row for name in LARGE_FILES for row in trainings_of(f"{name}-qwen-h200.jsonl")]
"""Of the 0.5B model."""


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
    more = trainings_of("focused-more-small-h200.jsonl")
    latest, before, mawps = (
        {latest_steps(rows, task, "LoRA, time of half") for task in tasks}
        for rows, tasks in (
            (ALL_LARGE, ("gsm8k", "wikitext2", "mawps", "sst2")),
            (small, ("gsm8k", "wikitext2", "sst2")),
            (more, ("mawps",)),
        )
    )
    assert latest == mawps
    assert f"{latest.pop()} of 250, and {before.pop()} for the small model on all tasks but MAWPS." in text
    rows = json.loads((STEPS / "focused-16x256-h200.json").read_text(encoding="utf-8"))["rows"]
    lora, half = (rows[f"{name}, Liger, no dropout"]["step_ms"] for name in ("LoRA in our step", "focused half"))
    assert f"the 239 rest on, one took {max(half) / min(half) - 1:.0%} longer" in text
    assert round(250 * median(half) / median(lora)) == 239
    assert f"by the faster ones it would be {round(250 * min(half) / min(lora))}." in text


def latest_steps(rows: list[dict[str, Any]], task: str, method: str) -> int:
    """The steps of a method's latest training."""
    return max((row for row in rows if (row["task"], row["method"]) == (task, method)), key=lambda r: r["date"])[
        "steps"
    ]


def gap(one: str, other: str, task: str, rows: list[dict[str, Any]] = ALL_LARGE, rates: Any = None) -> float:
    """By how much a method's test is above another's, at its latest number of steps, over the seeds that both have.

    Args:
        one: a method.
        other: another one.
        task: whose loss it is, of MAWPS the share of exact matches.
        rows: trainings that end their rows alike.
        rates: the learning rate of each; 5e-4 of both without.
    """
    metric, figure = TESTS[task]
    both = []
    for method, rate in zip((one, other), rates or (5e-4, 5e-4), strict=True):
        steps = latest_steps(rows, task, method)
        own = [row for row in rows if (row["task"], row["method"], row["steps"]) == (task, method, steps)]
        both.append({row["seed"]: row["test"][metric][figure] for row in own if row["learning_rate"] == rate})
    seeds = both[0].keys() & both[1].keys()
    assert len(seeds) >= 1
    return mean(both[0][seed] - both[1][seed] for seed in seeds)


TESTS = {"gsm8k": ("solutions", "loss"), "wikitext2": ("text", "loss"), "mawps": ("exact answers", "accuracy")}


def test_losses_of_sets_of_layers_are_those_of_their_trainings() -> None:
    text = words_of("focused.md")
    usual = [row for row in ALL_LARGE if not row.get("rows_end")]
    half = "focused, half"

    def above(one: str, other: str, task: str) -> str:
        return f"{abs(gap(one, other, task, usual)):.3f}"

    assert f"GSM8K's loss {above(half, 'LoRA', 'gsm8k')} nats worse, three tasks" in text
    assert f"GSM8K's loss {above(half, 'LoRA, time of half', 'gsm8k')} nats worse, three tasks" in text
    assert f"WikiText-2: {above(half, 'even, half', 'wikitext2')} nats below the evenly spread half" in text
    top = {task: above("top, half", half, task) for task in ("gsm8k", "wikitext2")}
    assert f"ended {top['gsm8k']} nats above the default, significantly, and {top['wikitext2']} on" in text
    points = 100 * gap("top, half", half, "mawps", usual, (2.5e-4, 2.5e-4))
    assert f"they answered {points:.1f} points more" in text
    random = {task: above("random fixed, half", half, task) for task in ("gsm8k", "wikitext2")}
    assert f"ended {random['gsm8k']} and {random['wikitext2']} above the default" in text
    rule = {task: above("IST, half", half, task) for task in ("gsm8k", "wikitext2")}
    assert f"ended {rule['gsm8k']} nats below the paper's rule" in text
    assert f"and {rule['wikitext2']} below it on WikiText-2" in text
    lisa = gap("LISA", half, "wikitext2", usual, (5e-5, 5e-4))
    assert f"LISA ended {lisa:.3f} above the default" in text
    for task in ("gsm8k", "wikitext2"):
        assert abs(gap("uneven, half", half, task, usual)) < 0.002
    start = [gap("gradient start, half", half, task, usual, (2.5e-4, 5e-4)) for task in ("gsm8k", "wikitext2")]
    assert f"(one seed: {start[0]:.3f} worse on GSM8K, {-start[1]:.3f} better" in text
    others = ("distance, half", "activation, half", "first step, half", "warm start, half")
    assert max(abs(gap(other, half, "gsm8k", usual)) for other in others) < 0.00105


def test_losses_of_parts_of_the_depth_are_those_of_their_trainings() -> None:
    text = words_of("focused.md")
    usual = [row for row in ALL_LARGE if not row.get("rows_end")]
    alike = [row for row in ALL_LARGE if row.get("rows_end")]
    quarter = "by activations, quarter"
    others = ("focused, quarter", "even, quarter")
    gradient, even = (gap(other, quarter, "wikitext2", usual) for other in others)
    assert (
        f"ended {gradient:.3f} nats below one chosen by the gradient, significantly, and {even:.3f} below an even"
        in text
    )
    assert max(abs(gap(other, quarter, "gsm8k", alike)) for other in others) < 0.0015
    eighth, fourth = (
        gap(f"above {part}, half", f"LoRA, time above {part}", "wikitext2", usual)
        for part in ("an eighth", "a quarter")
    )
    assert f"though WikiText-2 was {eighth:.3f} above LoRA," in text
    solutions = gap("above a quarter, half", "LoRA, time above a quarter", "gsm8k", alike)
    assert f"was {fourth:.3f} above LoRA, and GSM8K {solutions:.3f} above, both" in text
    small = [row for row in trainings_of("focused-upper-small-h200.jsonl") if row.get("rows_end")]
    rates = (4e-3, 4e-3)
    better = gap("LoRA, time above an eighth", "above an eighth, half", "gsm8k", small, rates)
    assert f"small model's GSM8K was better by {better:.3f} nats" in text
    first = [row for row in trainings_of("focused-small-h200.jsonl") if row["task"] == "wikitext2"]
    losses = {
        name: [row["learning_rate"] for row in first if row["method"] == name and row["seed"] == 2]
        for name in ("LoRA", "even, half", "focused, half")
    }
    even_rate, lora_rate, half_rate = (losses[name][0] for name in ("even, half", "LoRA", "focused, half"))
    assert (
        f"by {-gap('even, half', 'LoRA', 'wikitext2', first, (even_rate, lora_rate)):.3f} nats better than LoRA" in text
    )
    worse = gap("focused, half", "LoRA", "wikitext2", first, (half_rate, lora_rate))
    assert f"where the default is {worse:.3f} worse, within chance" in text


def test_rates_of_the_half_are_those_of_its_curves() -> None:
    curves: dict[str, dict[float, float]] = {}
    for row in ALL_LARGE:
        if (row["study"], row["task"]) == ("scaling", "gsm8k"):
            curves.setdefault(row["method"], {})[row["learning_rate"]] = row["curve"][-1][2]
    best = {name: min(curve, key=curve.__getitem__) for name, curve in curves.items()}
    half, lora = best["half, sqrt"], best["all layers"]
    off = curves["half, sqrt"][lora] - curves["half, sqrt"][half]
    text = words_of("focused.md")
    assert (half, round(lora * 1e4, 1)) == (5e-4, 3.5)
    assert f"loss at 5e-4 and LoRA at 3.5e-4, where the half is {off:.3f} nats above its own best" in text


def test_times_of_focused_training_are_those_of_its_steps() -> None:
    rows = json.loads((STEPS / "focused-16x256-h200.json").read_text(encoding="utf-8"))["rows"]

    def to(name: str, other: str = "LoRA", figure: str = "step_ms") -> str:
        one, two = (median(rows[f"{row}, Liger, no dropout"][figure]) for row in (name, other))
        return f"{one / two:.2f}"

    def again(part: str, figure: str) -> str:
        one, two = (
            rows[f"{row}, Liger, no dropout{more}"][figure] for row, more in ((part, ", recomputed"), ("LoRA", ""))
        )
        return f"{median(one) / median(two):.2f}"

    eighth = to("focused half above an eighth", "LoRA in our step")
    half, fused, of_fused = to("focused half"), to("LoRA in our step"), to("focused half", "LoRA in our step")
    text = words_of("focused.md")
    assert f"a step takes {half} of the time of PEFT's LoRA" in text
    assert f'with `IST(selector="all")` takes {fused}' in text
    assert f"the step takes {of_fused} of LoRA's in the fused step" in text
    assert f"all above the lowest eighth, take {eighth} of LoRA's fused step" in text
    assert f"Above the lowest eighth of the depth the step takes {eighth}" in text
    peaks, times = (
        [again(f"focused {part}", name) for part in ("half", "quarter")] for name in ("peak_gib", "step_ms")
    )
    assert (
        f"the peak is {peaks[0]} of PEFT's for a half and {peaks[1]} for a quarter, at {times[0]} and {times[1]}"
        in text
    )
    assert f"in {half} of PEFT's time" in (ROOT / "README.md").read_text(encoding="utf-8")
    cost = words_of("cost.md")
    assert f"The fused step takes {fused} of PEFT's time with adapters in all layers, and {half} with" in cost
    spread = {name: max(row["step_ms"]) / min(row["step_ms"]) - 1 for name, row in rows.items()}
    first, second = (spread.pop(f"focused {part}, Liger, no dropout") for part in ("half", "all above a quarter"))
    rounds = sorted(round(ms) for ms in rows["focused half, Liger, no dropout"]["step_ms"])
    assert f"those of the half differ by {first:.0%} ({rounds[1]} and {rounds[0]} ms)" in cost
    assert f"above a quarter by {second:.0%}, those of the others by {max(spread.values()):.1%} at most" in cost


def test_times_of_few_tokens_are_those_of_their_steps() -> None:
    rows = json.loads((STEPS / "focused-1x1024-h200.json").read_text(encoding="utf-8"))["rows"]

    def to_peft(part: str) -> float:
        own, pefts = (f"{name}, bfloat16 adapters, no dropout" for name in (part, f"{part} in {PEFT}"))
        return median(rows[own]["step_ms"]) / median(rows[pefts]["step_ms"])

    found = sorted(to_peft(f"focused {part}") for part in ("half", "third", "quarter"))
    cost = words_of("cost.md")
    assert f"takes {found[0]:.2f} to {found[-1]:.2f} of the time of PEFT's step on the same layers" in cost
    assert round(max(max(row["step_ms"]) / min(row["step_ms"]) for row in rows.values()), 2) == 1.33
    assert "differs from itself by up to a third" in cost


def test_numbers_of_two_gpus_are_those_of_their_cells() -> None:
    """What the prose says of LLaMA-13B's shape; the tables show the rest."""
    file = ROOT / "benchmarks" / "distributed" / "results" / "node.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    short = {"size": "13b", "rows": 2, "tokens": 512, "late": 0.0}
    cells = {
        (row["cell"]["engine"], row["cell"]["method"]): row
        for row in rows
        if "error" not in row and row["cell"]["processes"] <= 2 and short.items() <= row["cell"].items()
    }
    assert len(cells) == 9
    step = {cell: median(row["step_seconds"]) for cell, row in cells.items()}
    peak = {cell: max(row["peak_bytes"]) / 2**30 for cell, row in cells.items()}
    text = words_of("from-one-card-to-a-node.md")

    lora = peak["none", "lora"]
    assert f"took {lora - peak['fsdp2', 'lora']:.1f} GiB off LoRA's peak of {lora:.1f} GiB" in text
    assert f"the step took {step['fsdp2', 'lora'] / step['none', 'lora']:.1f} times as long as on one GPU" in text
    assert (
        f"trained on {2048 / step['fsdp2', 'lora']:.0f} tokens/s, one alone on {1024 / step['none', 'lora']:.0f}."
        in text
    )
    assert (
        f"Sampled training's step took {step['fsdp2', 'sampled'] / step['none', 'sampled']:.1f} times as long" in text
    )
    longer = {method: f"{step['ddp', method] / step['none', method]:.2f}" for method in ("sampled", "lora", "focused")}
    assert (
        f"took {longer['sampled']} times as long for sampled training, {longer['lora']} for LoRA and "
        f"{longer['focused']} for focused training" in text
    )
    saved = [peak[engine, "lora"] - peak[engine, method] for engine, method in cells if method != "lora"]
    assert f"held {min(saved):.1f} to {max(saved):.1f} GiB less than LoRA" in text

    def mean_bytes(method: str, kind: str) -> float:
        steps = cells["fsdp2", method]["step_collectives"]
        return sum(step[kind] for step in steps) / len(steps)

    gathered = {method: mean_bytes(method, "gathered") for method in ("lora", "sampled", "focused")}
    less = [f"{1 - gathered[method] / gathered['lora']:.0%}" for method in ("sampled", "focused")]
    assert f"they gathered only {less[0]} and {less[1]} less" in text
    assert f"{gathered['lora'] / mean_bytes('lora', 'reduced'):.0f} times as many bytes of weights" in text

    of_lora = {engine: f"{step[engine, 'sampled'] / step[engine, 'lora']:.2f}" for engine in ("fsdp2", "none", "ddp")}
    times = {method: [round(1e3 * s) for s in cells["fsdp2", method]["step_seconds"]] for method in gathered}
    with_probes = step["fsdp2", "sampled"] + median(cells["fsdp2", "sampled"]["probe_seconds"]) / 10
    with_probes /= step["fsdp2", "lora"]
    low, high = ({method: end(own) for method, own in times.items()} for end in (min, max))
    assert (
        f"sampled training's step took {of_lora['fsdp2']} of LoRA's time** (five steps of {low['sampled']} to "
        f"{high['sampled']} ms against {low['lora']} to {high['lora']} ms), or {with_probes:.2f} with a measurement "
        f"every 10 steps. On one GPU and under DDP it took {of_lora['none']} and {of_lora['ddp']}." in text
    )
    slow, fast = times["focused"][:3], times["focused"][3:]
    assert min(slow) > max(fast)
    assert f"from {high['focused']} to {low['focused']} ms, the first three of five" in text
    assert f"median of {median(times['focused'])} ms may be" in text
    assert {len(row["step_seconds"]) for row in cells.values()} == {5}

    probe = {engine: median(cells[engine, "sampled"]["probe_seconds"]) for engine in ("none", "ddp", "fsdp2")}
    steps = [f"{probe[engine] / step[engine, 'sampled']:.1f}" for engine in ("ddp", "fsdp2")]
    shares = [f"{probe[engine] / (10 * step[engine, 'sampled'] + probe[engine]):.0%}" for engine in ("ddp", "fsdp2")]
    assert f"took {probe['ddp'] * 1e3:.0f} ms under DDP and {probe['fsdp2'] * 1e3:.0f} ms under FSDP2" in text
    assert f"{steps[0]} and {steps[1]} of its steps" in text
    assert f"that is {shares[0]} and {shares[1]} of the time" in text
    assert f"On one GPU it took {probe['none'] * 1e3:.0f} ms" in text
    assert all(len(set(row["digests"])) == 1 for row in cells.values())
    added = 1e3 * (step["fsdp2", "lora"] - step["none", "lora"]), 1e3 * (probe["fsdp2"] - probe["none"])
    by_probe = cells["fsdp2", "sampled"]["probe_collectives"]["gathered"]
    assert (
        f"adds {added[0]:.0f} ms to LoRA's step, which gathers {gathered['lora'] / 1e9:.2f} GB, and {added[1]:.0f} ms "
        f"to a measurement, which gathers {by_probe / 1e9:.2f} GB" in text
    )
    spread = {
        method: max(cells["none", method]["step_seconds"]) / min(cells["none", method]["step_seconds"]) - 1
        for method in ("lora", "sampled")
    }
    assert f"took {spread['lora']:.0%} longer than the fastest, of sampled training's {spread['sampled']:.0%}." in text
