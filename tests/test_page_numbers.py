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


Cells = dict[tuple[str, str, str, int, float], dict[str, Any]]
"""Results of benchmarks/distributed by shape, backend, method, rows of a batch, and seconds that a rank is late."""


def cells_of(*files: str) -> Cells:
    """The last measurement of each cell."""
    folder = ROOT / "benchmarks" / "distributed" / "results"
    lines = [line for file in files for line in (folder / file).read_text(encoding="utf-8").splitlines()]
    rows = sorted(map(json.loads, lines), key=lambda row: row["date"])
    assert all("error" not in row and row["cell"]["tokens"] == 512 for row in rows)
    return {tuple(row["cell"][name] for name in ("size", "engine", "method", "rows", "late")): row for row in rows}


TWO_GPUS = cells_of("node.jsonl", "two-gpus.jsonl")
METHODS = ("lora", "sampled", "focused")


def step_of(size: str, engine: str, method: str, rows: int = 2, late: float = 0.0, cells: Cells = TWO_GPUS) -> float:
    """Milliseconds of a step without a measurement of importance."""
    return 1e3 * median(cells[size, engine, method, rows, late]["step_seconds"])


def probe_of(size: str, engine: str, rows: int = 2, late: float = 0.0) -> float:
    """Milliseconds of a measurement of importance."""
    return 1e3 * median(TWO_GPUS[size, engine, "sampled", rows, late]["probe_seconds"])


def peak_of(size: str, engine: str, method: str) -> float:
    """GiB of the rank that held the most."""
    return max(TWO_GPUS[size, engine, method, 2, 0.0]["peak_bytes"]) / 2**30


def of_lora(size: str, engine: str, method: str, rows: int = 2, every: int = 0) -> str:
    """A step's time over LoRA's, with its share of a measurement if there is one every so many steps."""
    share = probe_of(size, engine, rows) / every if every else 0.0
    return f"{(step_of(size, engine, method, rows) + share) / step_of(size, engine, 'lora', rows):.2f}"


def mean_bytes(size: str, method: str, kind: str) -> float:
    """Of a step under FSDP2."""
    return mean(step[kind] for step in TWO_GPUS[size, "fsdp2", method, 2, 0.0]["step_collectives"])


def test_times_of_two_gpus_are_those_of_their_cells() -> None:
    text = words_of("from-one-card-to-a-node.md")
    assert (
        f"took {step_of('70b', 'fsdp2', 'lora'):.0f} ms for LoRA, and {of_lora('70b', 'fsdp2', 'sampled')} of" in text
    )
    assert of_lora("70b", "fsdp2", "sampled") == of_lora("70b", "fsdp2", "focused")
    received = mean_bytes("70b", "lora", "gathered") / 2 + mean_bytes("70b", "lora", "reduced") / 2
    rate = received / 1e6 / step_of("70b", "fsdp2", "lora")
    assert f"each GPU received {received / 1e9:.0f} GB, on average {rate:.0f} GB/s." in text
    with_probes = of_lora("70b", "fsdp2", "sampled", every=10)
    assert f"took {probe_of('70b', 'fsdp2'):.0f} ms: with one every 10 steps (the default), sampled" in text
    assert f"sampled training took {with_probes} of LoRA's time." in text

    longer = sorted(step_of("13b", "fsdp2", name) / step_of("13b", "none", name) for name in METHODS)
    speeds = [2048e3 / step_of("13b", "fsdp2", "lora"), 1024e3 / step_of("13b", "none", "lora")]
    assert f"steps took {longer[0]:.1f} to {longer[-1]:.1f} times as long as on one GPU" in text
    assert f"trained LoRA on {speeds[0]:.0f} tokens/s, one alone on {speeds[1]:.0f}." in text
    ddp = {name: f"{step_of('13b', 'ddp', name) / step_of('13b', 'none', name):.2f}" for name in METHODS}
    assert (
        f"took {ddp['sampled']} times as long for sampled training, {ddp['lora']} for LoRA and {ddp['focused']}" in text
    )
    pairs = {
        key: " and ".join(of_lora("13b", key[0], name, key[1]) for name in METHODS[1:])
        for key in (("fsdp2", 2), ("ddp", 2), ("none", 2), ("none", 4))
    }
    with_probes = of_lora("13b", "fsdp2", "sampled", every=10)
    assert (
        f"took {pairs['fsdp2', 2]} of LoRA's time under FSDP2 (sampled training {with_probes} with a measurement every "
        f"10 steps), {pairs['ddp', 2]} under DDP, {pairs['none', 2]} on one GPU, and {pairs['none', 4]} there with 4 × "
        "512 tokens" in text
    )


def test_one_batch_on_two_gpus_is_that_of_their_cells() -> None:
    def gain(engine: str, method: str) -> float:
        shares = [probe_of("13b", *place) / 5 if method == "sampled" else 0 for place in (("none", 4), (engine, 2))]
        return (step_of("13b", "none", method, 4) + shares[0]) / (step_of("13b", engine, method) + shares[1])

    text = words_of("from-one-card-to-a-node.md")
    ddp, sharded = ({name: gain(engine, name) for name in METHODS} for engine in ("ddp", "fsdp2"))
    assert f"{ddp['lora']:.2f} times the tokens/s for LoRA and {ddp['focused']:.2f} for focused training." in text
    low, high = min(sharded.values()), max(sharded.values())
    assert f"Sampled training ({ddp['sampled']:.2f}) and all three under FSDP2 ({low:.2f} to {high:.2f})" in text
    commits = {key: row["commit"] for key, row in TWO_GPUS.items() if key[0] == "13b" and not key[-1] and key[3] == 2}
    newest = {row["commit"] for key, row in TWO_GPUS.items() if key[0] == "70b" or key[3] == 4}
    assert {key[1:3] for key, commit in commits.items() if commit not in newest} == {
        *((engine, name) for engine in ("none", "ddp") for name in METHODS),
        ("fsdp2", "sampled"),
    }


def test_memory_and_bytes_of_two_gpus_are_those_of_their_cells() -> None:
    text = words_of("from-one-card-to-a-node.md")
    alone, large = peak_of("13b", "none", "lora"), peak_of("70b", "fsdp2", "lora")
    less = [large - peak_of("70b", "fsdp2", name) for name in METHODS[1:]]
    assert f"held {less[0]:.1f} GiB less than LoRA's {large:.1f} GiB, focused training {less[1]:.1f} GiB less." in text
    assert f"took {alone - peak_of('13b', 'fsdp2', 'lora'):.1f} GiB off LoRA's peak of {alone:.1f} GiB" in text
    engines = ("none", "ddp", "fsdp2")
    saved = [peak_of("13b", own, "lora") - peak_of("13b", own, name) for own in engines for name in METHODS[1:]]
    assert f"held {min(saved):.1f} to {max(saved):.1f} GiB less than LoRA" in text
    gathered = {name: mean_bytes("13b", name, "gathered") for name in METHODS}
    fewer = [f"{1 - gathered[name] / gathered['lora']:.0%}" for name in METHODS[1:]]
    assert f"gather only {fewer[0]} and {fewer[1]} less" in text
    assert f"{gathered['lora'] / mean_bytes('13b', 'lora', 'reduced'):.0f} times as many bytes of weights" in text


def test_measurements_on_two_gpus_are_those_of_their_cells() -> None:
    text = words_of("from-one-card-to-a-node.md")
    probe = {engine: probe_of("13b", engine) for engine in ("none", "ddp", "fsdp2")}
    shares = {own: f"{value / (10 * step_of('13b', own, 'sampled') + value):.0%}" for own, value in probe.items()}
    assert f"took {probe['ddp']:.0f} ms under DDP and {probe['fsdp2']:.0f} ms under FSDP2" in text
    assert f"with one every 10 steps, {shares['ddp']} and {shares['fsdp2']} of the time." in text
    late = [probe_of("13b", engine, late=2.0) for engine in ("ddp", "fsdp2")]
    assert f"2 s late it took {late[0]:.0f} and {late[1]:.0f} ms: the other rank waited" in text
    assert f"On one GPU it took {probe['none']:.0f} ms" in text
    assert all(len(set(row["digests"])) == 1 for row in TWO_GPUS.values())
    assert min(late) > 2000


def test_cells_that_were_measured_twice_are_those_of_the_page() -> None:
    text = words_of("from-one-card-to-a-node.md")
    first = cells_of("node.jsonl")

    def both(engine: str, method: str, late: float = 0.0) -> list[float]:
        return [step_of("13b", engine, method, cells=first), step_of("13b", engine, method, late=late)]

    lora, sampled, focused = both("fsdp2", "lora"), both("ddp", "sampled", 2.0), both("fsdp2", "focused")
    assert f"LoRA under FSDP2 {lora[0]:.0f} and {lora[1]:.0f} ms" in text
    assert f"sampled training under DDP {sampled[0]:.0f} and {sampled[1]:.0f} ms" in text
    assert f"focused training under FSDP2 {focused[0]:.0f} and {focused[1]:.0f} ms" in text
    for values in (lora, sampled, both("fsdp2", "sampled", 2.0)):
        assert max(values) / min(values) < 1.25
    key = "13b", "fsdp2", "focused", 2, 0.0
    slow, row = first[key]["step_seconds"], TWO_GPUS[key]
    steps = row["step_seconds"]
    assert f"was the median of five steps of {1e3 * min(slow):.0f} to {1e3 * max(slow):.0f} ms." in text
    assert (len(slow), len(row["warm_up_seconds"]), len(steps)) == (5, 20, 20)
    assert (
        f"20 took {1e3 * min(steps):.0f} to {1e3 * max(steps):.0f} ms, and PyTorch asked the driver for no memory"
        in text
    )
    assert not any(row["device_allocations"])
    assert f"took more than {1e3 * max(row['warm_up_seconds'][1:]):.0f} ms" in text
