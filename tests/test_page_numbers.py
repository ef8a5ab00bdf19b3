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
    upper = trainings_of("focused-upper-qwen-h200.jsonl")
    (old,), (new,) = (
        {row["steps"] for row in rows if row["method"] == "LoRA, time of half"} for rows in (large, small)
    )
    text_steps = {row["steps"] for row in upper if (row["task"], row["method"]) == ("wikitext2", "LoRA, time of half")}
    assert text_steps == {new}
    assert f"{new} of 250 for the small model and for WikiText-2 of the 0.5B model." in text
    assert f"For the other tasks of the 0.5B model it is {old}, by an older measurement" in text
    rows = json.loads((STEPS / "focused-16x256-h200.json").read_text(encoding="utf-8"))["rows"]
    lora, half = (
        median(rows[f"{name}, Liger, no dropout"]["step_ms"]) for name in ("LoRA in our step", "focused half")
    )
    text = words_of("results.md")
    assert f"{old} or {new} for a half, as it was measured when they were trained" in text
    assert f"the newest measurement would give {round(250 * half / lora)}" in text


def mean_of(method: str, task: str, metric: str, rows: list[dict[str, Any]], rate: float = 5e-4) -> float:
    """Over seeds, at the latest number of steps of a method."""
    own = [row for row in rows if (row["task"], row["method"], row["learning_rate"]) == (task, method, rate)]
    last = max(own, key=lambda row: row["date"])["steps"]
    losses = {row["seed"]: row["test"][metric]["loss"] for row in own if row["steps"] == last}
    assert set(losses) == {0, 1, 2}
    return mean(losses.values())


def test_losses_of_parts_of_the_layers_are_those_of_their_trainings() -> None:
    files = ("focused-qwen-h200.jsonl", "focused-quarter-qwen-h200.jsonl", "focused-upper-qwen-h200.jsonl")
    rows = [row for file in files for row in trainings_of(file)]
    alike = [row for row in rows if row.get("rows_end")]
    text = words_of("focused.md")

    def words(one: str, other: str) -> float:
        return mean_of(one, "wikitext2", "text", rows) - mean_of(other, "wikitext2", "text", rows)

    def solutions(one: str, other: str) -> float:
        return mean_of(one, "gsm8k", "solutions", alike) - mean_of(other, "gsm8k", "solutions", alike)

    random, top = words("random fixed, half", "focused, half"), words("top, half", "focused, half")
    assert f"ended {random:.3f} and {top:.3f} nats above the default" in text
    assert f"ended {words('IST, half', 'focused, half'):.3f} nats below the paper's rule" in text
    rate = 5e-5
    lisa = mean_of("LISA", "wikitext2", "text", rows, rate) - mean_of("focused, half", "wikitext2", "text", rows)
    assert f"and {lisa:.3f} below LISA" in text
    others = ("focused, quarter", "even, quarter")
    gradient, even = (words(other, "by activations, quarter") for other in others)
    assert (
        f"ended {gradient:.3f} nats below one chosen by the gradient, significantly, and {even:.3f} below an even"
        in text
    )
    assert max(abs(solutions(other, "by activations, quarter")) for other in others) < 0.0015
    assert "On GSM8K it was within 0.001 of both." in text
    eighth, quarter = (words(f"above {part}, half", f"LoRA, time above {part}") for part in ("an eighth", "a quarter"))
    assert f"was {eighth:.3f} above LoRA, within chance, with an eighth left out, and {quarter:.3f} above it" in text
    assert f"its GSM8K was {solutions('above a quarter, half', 'LoRA, time above a quarter'):.3f} above" in text
    small = trainings_of("focused-upper-small-h200.jsonl")
    methods = ("above an eighth, half", "LoRA, time above an eighth")
    better = [mean_of(method, "gsm8k", "solutions", small, 4e-3) for method in methods]
    assert f"GSM8K was better by {better[1] - better[0]:.3f} nats" in text


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
    others = [row["step_ms"] for name, row in rows.items() if "half above a quarter" not in name]
    assert max(max(values) / min(values) for values in others) < 1.0255
    assert "those of the others by 2.5% at most" in cost


def test_times_of_few_tokens_are_those_of_their_steps() -> None:
    rows = json.loads((STEPS / "few-rows-1x1024-h200.json").read_text(encoding="utf-8"))["rows"]

    def step(name: str) -> float:
        return median(rows[name]["step_ms"])

    def to_peft(way: str) -> list[str]:
        return sorted(f"{step(f'{part}, {way}') / step(part + ', ' + PEFT):.2f}" for part in ("quarter", "half", "all"))

    without, kernels = to_peft("function without kernels"), to_peft("function")
    cost = words_of("cost.md")
    assert f"took {without[0]} to {without[-1]} of the time of PEFT's step" in cost
    assert f"and the library's kernels {kernels[0]} to {kernels[-1]}, on a host" in cost


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
