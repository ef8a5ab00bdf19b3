"""Numbers in the prose of the pages are those of the result files; `make tables` makes the tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PEFT = "PEFT's step"
STEPS = ROOT / "benchmarks" / "step_time" / "results"


def words_of(page: str) -> str:
    """A page of the docs on one line."""
    return " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())


FOCUSED = f"{words_of('focused.md')} {words_of('focused-measurements.md')}"


def trainings_of(file: str) -> list[dict[str, Any]]:
    """The lines of a result file of benchmarks/quality."""
    text = (ROOT / "benchmarks" / "quality" / "results" / file).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


LARGE_FILES = ("focused", "focused-quarter", "focused-upper", "focused-more", "focused-proof")
LARGE_FILES += ("focused-gsm8k", "focused-lisa")
EVERY_LARGE = [row for name in LARGE_FILES for row in trainings_of(f"{name}-qwen-h200.jsonl")]
ALL_LARGE = [row for row in EVERY_LARGE if row["base_steps"] == 250]
"""Of the 0.5B model."""
LONGER = [row for row in EVERY_LARGE if row["base_steps"] == 750]
USUAL = [row for row in ALL_LARGE if not row.get("rows_end")]
"""Those with the model's own end of rows."""
SMALL_FILES = ("focused", "focused-upper", "focused-more", "focused-proof")
ALL_SMALL = [
    row for name in SMALL_FILES for row in trainings_of(f"{name}-small-h200.jsonl") if row["task"] != "commonsense"
]
"""Of SmolLM2."""
SMALL_LONGER = trainings_of("focused-long-small-h200.jsonl")
FIRST_RUN = [row for row in trainings_of("again/focused-gsm8k-h200.jsonl") if row["base_steps"] == 250]
"""The trainings of GSM8K that ran again."""


def test_numbers_of_focused_training_are_those_of_its_trainings() -> None:
    """Those that no table shows."""
    text = FOCUSED
    focused, others = (
        [row for row in rows if (row["method"], row["study"]) == ("focused, half", "focused")]
        for rows in (ALL_LARGE, ALL_SMALL)
    )
    looks, seconds = [row["focus"]["seconds"] for row in focused], [row["train_seconds"] for row in focused]
    assert f"It took {min(looks):.1f} to {max(looks):.1f} seconds before trainings" in text
    assert f"trainings of {min(seconds):.0f} to {max(seconds):.0f}, and with the small" in text
    looks, slower = [row["focus"]["seconds"] for row in others], [row["train_seconds"] for row in others]
    assert f"small model {min(looks):.1f} to {max(looks):.1f} before {min(slower):.0f} to {max(slower):.0f}," in text
    shares = [row["focus"]["seconds"] / row["train_seconds"] for row in (*focused, *others)]
    assert f"That is {min(shares):.0%} to {max(shares):.0%} of a training of 250 steps" in text
    assert {row["steps"] for row in (*focused, *others)} == {250}
    latest = {
        latest_steps(rows, task, "LoRA, time of half") for rows in (ALL_LARGE, SMALL_OWN) for task in (*LOSSES, *SHARES)
    }
    assert f"{latest.pop()} of 250." in text
    assert not latest
    norms, busy = (
        json.loads((STEPS / f"{name}-16x256-h200.json").read_text(encoding="utf-8"))["rows"]
        for name in ("norms", "busy")
    )
    names = "focused half, Liger, no dropout", "LoRA in our step, Liger, no dropout"
    later, own = median(norms[names[0]]["step_ms"]), busy[names[0]]["busy_ms"]
    by_later, by_own = 250 * later / median(norms[names[1]]["step_ms"]), 250 * own / busy[names[1]]["busy_ms"]
    fastest = 250 * min(norms[names[0]]["step_ms"]) / min(norms[names[1]]["step_ms"])
    assert f"a later run {by_later:.0f} ({fastest:.0f} by its fastest rounds)" in text
    assert f"and by [the GPU's own work](cost.md#time) {by_own:.0f}." in text
    assert f"step ({by_later / 250:.2f} in a later run, {by_own / 250:.2f} by the GPU's own work)" in text
    pefts = median(norms["LoRA, Liger, no dropout"]["step_ms"])
    both = [f"{median(norms[name]['step_ms']) / pefts:.2f}" for name in names]
    assert f"a later run gave {both[0]} and {both[1]}." in text
    rows = json.loads((STEPS / "focused-16x256-h200.json").read_text(encoding="utf-8"))["rows"]
    lora, half = (rows[f"{name}, Liger, no dropout"]["step_ms"] for name in ("LoRA in our step", "focused half"))
    assert f"the 239 rest on, one took {max(half) / min(half) - 1:.0%} longer" in text
    assert round(250 * median(half) / median(lora)) == 239
    assert f"by the faster ones it would be {round(250 * min(half) / min(lora))}," in text
    assert f"the steps save {1 - median(half) / median(lora):.0%} of LoRA's in the fused step" in text
    early = [row for row in ALL_LARGE if row["steps"] == 215]
    halves = [row for row in USUAL if row["method"] == "focused, half"]
    before = gap("focused, half", "LoRA, time of half", "gsm8k", halves + early)
    assert f"the half was {-before:.3f} nats better, within chance (three seeds)" in text


def latest_steps(rows: list[dict[str, Any]], task: str, method: str) -> int:
    """The steps of a method's latest training."""
    return max((row for row in rows if (row["task"], row["method"]) == (task, method)), key=lambda r: r["date"])[
        "steps"
    ]


def gap(one: str, other: str, task: str, rows: list[dict[str, Any]] = ALL_LARGE, rates: Any = None) -> float:
    """The mean of `differences`."""
    return mean(differences(one, other, task, rows, rates))


def differences(
    one: str, other: str, task: str, rows: list[dict[str, Any]] = ALL_LARGE, rates: Any = None
) -> list[float]:
    """By how much a method's test is above another's, at its latest number of steps, for each seed that both have.

    Args:
        one: a method.
        other: another one.
        task: whose loss it is, of MAWPS and SST-2 the share that is right.
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
    return [both[0][seed] - both[1][seed] for seed in sorted(seeds)]


TESTS = {"gsm8k": ("solutions", "loss"), "wikitext2": ("text", "loss"), "mawps": ("exact answers", "accuracy")}
TESTS["sst2"] = ("sentiment", "accuracy")
STUDENT = {3: 4.303, 5: 2.776}
"""97.5% quantiles of Student's t, by the number of seeds."""
OWN_RATES = {"gsm8k": (5e-4, 5e-4), "wikitext2": (5e-4, 5e-4), "mawps": (2.5e-4, 2.5e-4), "sst2": (1.25e-4, 1.25e-4)}
TO_LORA = {**OWN_RATES, "mawps": (2.5e-4, 1.25e-4), "sst2": (1.25e-4, 2.5e-4)}
OF_IST = {**OWN_RATES, "sst2": (2.5e-4, 1.25e-4)}
SMALL_RATES = {"gsm8k": 4e-3, "wikitext2": 2e-3}
LISA_RATES = {"mawps": (2.5e-5, 2.5e-4), "sst2": (5e-5, 1.25e-4)}
ENDS = [row for row in ALL_LARGE if row.get("rows_end")]
SMALL_ENDS = [row for row in ALL_SMALL if row.get("rows_end")]
SMALL_OWN = [row for row in ALL_SMALL if not row.get("rows_end")]
OTHER_CHOICES = ("distance, half", "by weights, half", "first step, half", "warm start, half", "activation, half")
HALF, EVEN, QUARTER = "focused, half", "even, half", "by activations, quarter"
LOSSES, SHARES = ("gsm8k", "wikitext2"), ("mawps", "sst2")
SIGNIFICANT = [
    *((HALF, "LoRA", "gsm8k", rows, (5e-4, 5e-4)) for rows in (USUAL, FIRST_RUN)),
    (HALF, "LoRA, time of half", "gsm8k", FIRST_RUN, (5e-4, 5e-4)),
    (HALF, EVEN, "wikitext2", USUAL, (5e-4, 5e-4)),
    *((HALF, other, "gsm8k", SMALL_LONGER, (2e-3, 2e-3)) for other in ("LoRA", "LoRA, time of half")),
    ("top, half", HALF, "mawps", USUAL, (2.5e-4, 2.5e-4)),
    *(("IST, half", HALF, task, USUAL, (5e-4, 5e-4)) for task in LOSSES),
    *(("LISA", HALF, task, USUAL, (5e-5, 5e-4)) for task in LOSSES),
    ("IST in the focused half", QUARTER, "wikitext2", USUAL, (5e-4, 5e-4)),
    ("top, half", HALF, "gsm8k", [row for row in USUAL if row["method"] == "top, half"] + FIRST_RUN, (5e-4, 5e-4)),
    *((EVEN, "LoRA", task, SMALL_LONGER, (2e-3, rate)) for task, rate in (("gsm8k", 2e-3), ("wikitext2", 1e-3))),
    ("focused, third", "LoRA", "gsm8k", USUAL, (5e-4, 5e-4)),
    *((QUARTER, other, "wikitext2", USUAL, (5e-4, 5e-4)) for other in ("LoRA", "focused, quarter")),
    *(("above an eighth, half", "LoRA", task, USUAL, (5e-4, 5e-4)) for task in LOSSES),
    ("above a quarter, half", "LoRA, time above a quarter", "wikitext2", USUAL, (5e-4, 5e-4)),
    ("above a quarter, half", "LoRA, time above a quarter", "gsm8k", ENDS, (5e-4, 5e-4)),
    ("focused, third", "LoRA", "wikitext2", USUAL, (5e-4, 5e-4)),
    ("focused, third", "LoRA", "sst2", USUAL, (1.25e-4, 2.5e-4)),
    *((f"{name} in the focused half", HALF, "wikitext2", USUAL, (5e-4, 5e-4)) for name in ("IST", "random")),
    ("half, soon a quarter", HALF, "wikitext2", USUAL, (5e-4, 5e-4)),
    (HALF, "LoRA", "gsm8k", SMALL_OWN, (4e-3, 4e-3)),
    ("distance, half", HALF, "gsm8k", SMALL_OWN, (4e-3, 4e-3)),
    ("above an eighth, half", "LoRA, time above an eighth", "gsm8k", SMALL_ENDS, (4e-3, 4e-3)),
]
"""What docs/focused-measurements.md calls significant."""
WITHIN_CHANCE = [
    *(
        (HALF, other, task, USUAL, TO_LORA[task])
        for other in ("LoRA", "LoRA, time of half")
        for task in ("wikitext2", *SHARES)
    ),
    (HALF, "LoRA, time of half", "gsm8k", USUAL, (5e-4, 5e-4)),
    *((HALF, other, "wikitext2", SMALL_LONGER, (2e-3, 1e-3)) for other in ("LoRA", "LoRA, time of half")),
    *((HALF, EVEN, task, SMALL_LONGER, (2e-3, 2e-3)) for task in LOSSES),
    *(("LISA", HALF, task, USUAL, rates) for task, rates in LISA_RATES.items()),
    *((HALF, EVEN, task, USUAL, OWN_RATES[task]) for task in ("gsm8k", *SHARES)),
    *((HALF, "random fixed, half", task, USUAL, OWN_RATES[task]) for task in (*LOSSES, *SHARES)),
    *(("top, half", HALF, task, USUAL, (5e-4, 5e-4)) for task in LOSSES),
    *(("IST, half", HALF, task, USUAL, OF_IST[task]) for task in SHARES),
    *((name, HALF, task, USUAL, (5e-4, 5e-4)) for name in OTHER_CHOICES for task in LOSSES),
    *((name, HALF, "wikitext2", USUAL, (5e-4, 5e-4)) for name in ("half, then a quarter", "late choice, half")),
    *(
        (f"{name} in the focused half", "focused, quarter", "wikitext2", USUAL, (5e-4, 5e-4))
        for name in ("IST", "random")
    ),
    *((HALF, other, "gsm8k", LONGER, (2.5e-4, 2.5e-4)) for other in ("LoRA", "LoRA, time of half")),
    *((HALF, other, "wikitext2", LONGER, (5e-4, 2.5e-4)) for other in ("LoRA", "LoRA, time of half")),
    (HALF, EVEN, "wikitext2", LONGER, (5e-4, 5e-4)),
    (QUARTER, "even, quarter", "wikitext2", USUAL, (5e-4, 5e-4)),
    *(
        ("above an eighth, half", "LoRA, time above an eighth", task, USUAL, TO_LORA[task])
        for task in (*LOSSES, *SHARES)
    ),
    (HALF, "LoRA, time of half", "gsm8k", SMALL_OWN, (4e-3, 4e-3)),
    *((name, "LoRA", "wikitext2", SMALL_OWN, (2e-3, 1e-3)) for name in (HALF, EVEN)),
    (HALF, "LoRA, time of half", "wikitext2", SMALL_OWN, (2e-3, 1e-3)),
    *((HALF, other, "wikitext2", SMALL_OWN, (2e-3, 2e-3)) for other in (EVEN, "distance, half")),
    *((HALF, other, "sst2", SMALL_OWN, (1e-3, 5e-4)) for other in ("LoRA", "LoRA, time of half")),
    *((HALF, other, "mawps", SMALL_OWN, (2e-3, 2e-3)) for other in ("LoRA", "LoRA, time of half")),
]
"""What it says to be within chance, or to show no significant difference."""


@pytest.mark.parametrize("significant", [True, False])
def test_what_is_significant_has_its_interval_on_one_side(significant: bool) -> None:
    for one, other, task, rows, rates in SIGNIFICANT if significant else WITHIN_CHANCE:
        found = differences(one, other, task, rows, rates)
        reach = STUDENT[len(found)] * stdev(found) / math.sqrt(len(found))
        assert (abs(mean(found)) > reach) == significant, (one, other, task)


def test_widest_intervals_of_the_small_model_are_named() -> None:
    reach = []
    for task, rates in (("wikitext2", (2e-3, 1e-3)), ("mawps", (2e-3, 2e-3))):
        found = differences(HALF, "LoRA, time of half", task, SMALL_OWN, rates)
        reach.append(abs(mean(found)) + STUDENT[len(found)] * stdev(found) / math.sqrt(len(found)))
    expected = (
        f"small model's intervals reach {reach[0]:.3f} nats on WikiText-2 and {100 * reach[1]:.0f} points on MAWPS"
    )
    assert expected in FOCUSED


def test_losses_of_sets_of_layers_are_those_of_their_trainings() -> None:
    text = FOCUSED
    usual, half = USUAL, "focused, half"

    def above(one: str, other: str, task: str) -> str:
        return f"{abs(gap(one, other, task, usual)):.3f}"

    assert f"GSM8K's loss {above(half, 'LoRA', 'gsm8k')} nats worse, three tasks" in text
    runs = [gap(half, "LoRA, time of half", "gsm8k", rows) for rows in (usual, FIRST_RUN)]
    assert f"in the first of two the half was {runs[1]:.4f} nats worse, significantly; in the second" in text
    assert f"which the tables have, {runs[0]:.4f}, within chance; in both averaged, just significantly" in text
    tops = [
        gap("top, half", half, "gsm8k", [row for row in usual if row["method"] == "top, half"] + rows)
        for rows in (FIRST_RUN, USUAL)
    ]
    assert f"were {tops[0]:.4f} nats worse than it, just significantly; with the second {tops[1]:.4f}" in text
    assert f"ended {runs[1]:.4f} nats above LoRA then, just significantly, and {runs[0]:.4f} above it in the" in text
    both = [
        mean(each)
        for each in zip(
            *(differences(half, "LoRA, time of half", "gsm8k", rows) for rows in (usual, FIRST_RUN)), strict=True
        )
    ]
    assert mean(both) > STUDENT[5] * stdev(both) / math.sqrt(5)  # as the pages say of both, averaged
    assert f"which measures nothing: {above(half, 'even, half', 'wikitext2')} nats lower, significantly" in text
    top = {task: above("top, half", half, task) for task in ("gsm8k", "wikitext2")}
    assert f"ended {top['gsm8k']} nats above the default and on WikiText-2 {top['wikitext2']}, both within" in text
    points = 100 * gap("top, half", half, "mawps", usual, (2.5e-4, 2.5e-4))
    assert f"answered {points:.1f} points more on MAWPS" in text
    assert f"twelve layers at random it was {above('random fixed, half', half, 'wikitext2')} lower" in text
    rule = {task: above("IST, half", half, task) for task in ("gsm8k", "wikitext2")}
    assert f"ended {rule['gsm8k']} nats below the paper's rule" in text
    assert f"and {rule['wikitext2']} below it on WikiText-2" in text
    lisa = gap("LISA", half, "wikitext2", usual, (5e-5, 5e-4))
    assert f"two whole layers at a time, ended {lisa:.3f} above the default" in text
    lisa = gap("LISA", half, "gsm8k", usual, (2.5e-5, 5e-4))
    twice = gap("LISA", half, "gsm8k", usual, (5e-5, 5e-4))
    assert f"On GSM8K it ended {twice:.3f} above it at twice its best rate (three seeds, significantly)" in text
    assert f"and {lisa:.3f} at that rate, the lowest of three (one seed)" in text
    for task in ("gsm8k", "wikitext2"):
        assert abs(gap("uneven, half", half, task, usual)) < 0.002
    start = [gap("gradient start, half", half, task, usual, (2.5e-4, 5e-4)) for task in ("gsm8k", "wikitext2")]
    assert f"(one seed: {start[0]:.3f} worse on GSM8K, {-start[1]:.3f} better" in text
    assert max(abs(gap(other, half, "gsm8k", usual)) for other in OTHER_CHOICES) < 0.00105
    on_text = [gap(other, half, "wikitext2", usual) for other in OTHER_CHOICES[:-1]]
    for task in LOSSES:
        chosen = {
            name: {tuple(row["focus"]["layers"]) for row in usual if (row["task"], row["method"]) == (task, name)}
            for name in (OTHER_CHOICES[-1], EVEN)
        }
        assert chosen[OTHER_CHOICES[-1]] == chosen[EVEN]
    assert f"and {min(on_text):.3f} to {max(on_text):.3f} above it on WikiText-2, within chance" in text
    apart = {task: gap("distance, half", half, task, SMALL_OWN, (rate, rate)) for task, rate in SMALL_RATES.items()}
    assert f"bounds on the gaps ended {-apart['gsm8k']:.3f} below the default on GSM8K, significantly" in text
    assert f"and {apart['wikitext2']:.3f} above it on WikiText-2, within chance" in text
    assert abs(gap("late choice, half", half, "wikitext2", usual)) < 0.001
    assert f"ended {gap('half, then a quarter', half, 'wikitext2', usual):.3f} above it, within chance" in text
    sampled = {f"{gap(f'{name} in the focused half', half, 'wikitext2', usual):.3f}" for name in ("IST", "random")}
    assert f"random, ended {sampled.pop()} above it, significantly" in text
    assert not sampled
    stays = gap("focused, quarter", half, "wikitext2", usual)
    assert f"not significantly above the gradient's quarter that stays ({stays:.3f})" in text
    rule_within = gap("IST in the focused half", QUARTER, "wikitext2", usual)
    assert f"was {rule_within:.3f} above the quarter by `relative_gradient`, significantly" in text
    soon = gap("half, soon a quarter", half, "wikitext2", usual)
    assert f"after a tenth of the steps {soon:.3f}, significantly" in text
    lost = [gap(half, "LoRA", "gsm8k", rows, (rate, rate)) for rows, rate in ((usual, 5e-4), (SMALL_OWN, 4e-3))]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").replace("\n>", "").split())
    assert f"were {lost[0]:.3f} and {lost[1]:.3f} nats behind LoRA on GSM8K" in readme
    assert f"five seeds | GSM8K's loss {lost[1]:.3f} nats worse, three" in text


def test_losses_of_longer_trainings_are_those_of_their_files() -> None:
    text = FOCUSED
    rates = {"gsm8k": (2.5e-4, 2.5e-4), "wikitext2": (5e-4, 2.5e-4)}
    found = {
        (other, task): differences(HALF, other, task, LONGER, rates[task])
        for other in ("LoRA", "LoRA, time of half")
        for task in LOSSES
    }
    one, two, three, four = (mean(each) for each in found.values())
    assert f"the half ended {one:.3f} nats above LoRA on GSM8K and {two:.3f} on WikiText-2" in text
    assert f"at equal time (717 steps) {three:.3f} above it and {-four:.3f} below" in text
    reach = [abs(mean(each)) + STUDENT[3] * stdev(each) / math.sqrt(3) for each in found.values()]
    assert f"no interval reaches {max(reach):.3f}" in text
    assert latest_steps(LONGER, "gsm8k", "LoRA, time of half") == 717
    even = gap(EVEN, HALF, "wikitext2", LONGER)
    assert f"In 750 steps the even half ended {even:.3f} above the default on WikiText-2, within chance" in text


def test_losses_of_the_small_model_in_longer_trainings_are_those_of_their_files() -> None:
    steps, time = (gap(HALF, f"LoRA{of}", "gsm8k", SMALL_LONGER, (2e-3, 2e-3)) for of in ("", ", time of half"))
    assert f"{steps:.3f} nats at equal steps and {time:.3f} at equal time, both significantly" in FOCUSED
    assert f"ends {steps:.3f} nats above LoRA on GSM8K at equal steps and {time:.3f} at equal time, both" in FOCUSED
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"(the smaller {steps:.3f} after 750)" in readme
    steps, time = (gap(HALF, f"LoRA{of}", "wikitext2", SMALL_LONGER, (2e-3, 1e-3)) for of in ("", ", time of half"))
    assert f"On WikiText-2 it ended {steps:.3f} and {time:.3f} above LoRA" in FOCUSED
    even = {f"{gap(HALF, EVEN, task, SMALL_LONGER, (2e-3, 2e-3)):.3f}" for task in LOSSES}
    assert f"the even half {even.pop()} below the chosen one on both tasks, all within chance" in FOCUSED
    assert not even
    worse = [
        gap(EVEN, "LoRA", task, SMALL_LONGER, (2e-3, rate)) for task, rate in (("gsm8k", 2e-3), ("wikitext2", 1e-3))
    ]
    assert f"by {worse[0]:.3f} on GSM8K and {worse[1]:.3f} on WikiText-2 at equal steps, both significantly" in FOCUSED
    steps, time = (gap(HALF, f"LoRA{of}", "gsm8k", SMALL_LONGER, (2e-3, 2e-3)) for of in ("", ", time of half"))
    results = words_of("results.md")
    assert f"is {steps:.3f} nats worse on GSM8K, and {time:.3f} at equal time, both significantly" in results
    assert f"that of the small model is {time:.3f} nats worse after 750 steps" in FOCUSED


def test_losses_of_parts_of_the_depth_are_those_of_their_trainings() -> None:
    text, usual = FOCUSED, USUAL
    alike = [row for row in ALL_LARGE if row.get("rows_end")]
    quarter = "by activations, quarter"
    others = ("focused, quarter", "even, quarter")
    gradient, even = (gap(other, quarter, "wikitext2", usual) for other in others)
    assert (
        f"by the gradient ended {gradient:.3f} higher than that, significantly, and an even one {even:.3f}, within"
        in text
    )
    pairs = ((quarter, others[0]), (quarter, others[1]), others)
    assert max(abs(gap(*pair, "gsm8k", alike)) for pair in pairs) < 0.002
    assert f"ended {gap(quarter, 'LoRA', 'wikitext2', usual):.3f} above LoRA on WikiText-2, significantly" in text
    third = [gap("focused, third", "LoRA", task, usual) for task in ("gsm8k", "wikitext2")]
    assert f"A third (five seeds) ended {third[0]:.3f} nats above LoRA on GSM8K and {third[1]:.3f} on" in text
    right = 100 * gap("focused, third", "LoRA", "sst2", usual, (1.25e-4, 2.5e-4))
    assert f"answered {-right:.1f} points less of SST-2" in text
    steps = [gap("above an eighth, half", "LoRA", task, usual) for task in ("gsm8k", "wikitext2")]
    assert f"they ended {steps[0]:.3f} nats above LoRA on GSM8K and {steps[1]:.3f} on WikiText-2, both" in text
    eighth, fourth = (
        gap(f"above {part}, half", f"LoRA, time above {part}", "wikitext2", usual)
        for part in ("an eighth", "a quarter")
    )
    assert f"though WikiText-2 was {eighth:.3f} above LoRA," in text
    solutions = gap("above a quarter, half", "LoRA, time above a quarter", "gsm8k", alike)
    assert f"was {fourth:.3f} above LoRA, and GSM8K, with another end of rows, {solutions:.3f} above, both" in text
    small = [row for row in trainings_of("focused-upper-small-h200.jsonl") if row.get("rows_end")]
    rates = (4e-3, 4e-3)
    better = gap("LoRA, time above an eighth", "above an eighth, half", "gsm8k", small, rates)
    assert f"small model's GSM8K was better by {better:.3f} nats" in text
    between = gap(HALF, EVEN, "wikitext2", SMALL_OWN, (2e-3, 2e-3))
    below = -gap(EVEN, "LoRA", "wikitext2", SMALL_OWN, (2e-3, 1e-3))
    assert f"the even half ended {between:.3f} nats below the default, and {below:.3f} below LoRA, both" in text


def test_wikitext_has_no_ends_of_rows() -> None:
    """The first seed is the same with either tokenizer, as docs/results.md says."""
    assert "SmolLM2's first seed ended at the same loss with either, to the bit" in words_of("results.md")
    losses: dict[tuple[str, float], set[float]] = {}
    for row in ALL_SMALL:
        if row["task"] == "wikitext2" and row["seed"] == 0 and row["method"] in ("LoRA", "focused, half", "even, half"):
            losses.setdefault((row["method"], row["learning_rate"]), set()).add(row["test"]["text"]["loss"])
    assert len(losses) >= 3
    assert all(len(found) == 1 for found in losses.values())


def test_commonsense_of_focused_training_is_that_of_its_trainings() -> None:
    rows = trainings_of("commonsense-focused-h200.jsonl")
    means = {
        (row["method"], row["seed"]): mean(task["accuracy"] for name, task in row["test"].items() if name != "average")
        for row in rows
    }
    gaps = [means["focused, half", seed] - means["LoRA, time of half", seed] for seed in (0, 1)]
    own = [row for row in trainings_of("focused-proof-small-h200.jsonl") if row["task"] == "commonsense"]
    half, lora = (
        mean(task["accuracy"] for row in own if row["method"] == name for task in row["test"].values())
        for name in ("focused, half", "LoRA, time of half")
    )
    text = FOCUSED
    equal = [row for row in trainings_of("commonsense-long-h200.jsonl") if (row["method"], row["seed"]) == ("LoRA", 0)]
    best = min(equal, key=lambda row: row["curve"][-1][2])
    assert best["learning_rate"] == max(row["learning_rate"] for row in equal) == 2e-3
    steps = mean(task["accuracy"] for name, task in best["test"].items() if name != "average")
    expected = (
        f"{100 * (lora - half):.1f} points below LoRA at equal time and {100 * (steps - half):.1f} at equal steps"
    )
    assert f"the highest that was tried, was {expected} (one seed)" in text
    assert f"and {-100 * mean(gaps):.1f} points at equal time with [another token at the end of rows]" in text


def test_rates_of_the_half_are_those_of_its_curves() -> None:
    text = FOCUSED
    curves: dict[str, dict[str, dict[float, float]]] = {task: {} for task in LOSSES}
    for row in ALL_LARGE:
        if row["study"] == "scaling" and not row.get("rows_end"):
            curves[row["task"]].setdefault(row["method"], {})[row["learning_rate"]] = row["curve"][-1][2]
    best = {
        task: {name: min(curve, key=curve.__getitem__) for name, curve in found.items()}
        for task, found in curves.items()
    }
    shown = {(task, name): f"{rate * 1e4:.1f}" for task, found in best.items() for name, rate in found.items()}
    assert {shown[task, "half, sqrt"] for task in LOSSES} == {"5.0"}
    assert [shown[task, "all layers"] for task in LOSSES] == ["3.5", "5.0"]
    half = curves["gsm8k"]["half, sqrt"]
    off = half[best["gsm8k"]["all layers"]] - min(half.values())
    assert f"where the half is {off:.3f} nats above its own best, and at 5e-4 on WikiText-2" in text
    lowest = {name: min(curve.values()) for name, curve in curves["wikitext2"].items()}
    assert shown["wikitext2", "half, linear"] == "5.0"
    assert abs(lowest["half, linear"] - lowest["half, sqrt"]) < 0.0005
    kept = lowest["half, kept"] - lowest["half, sqrt"]
    assert f"kept, it is {kept:.3f} higher, at {shown['wikitext2', 'half, kept']}e-4" in text


def test_what_norms_made_again_keep_and_how_busy_a_gpu_is_are_those_of_their_runs() -> None:
    rows, busy = (
        json.loads((STEPS / f"{name}-16x256-h200.json").read_text(encoding="utf-8"))["rows"]
        for name in ("norms", "busy")
    )
    lora, half, quarter = (
        f"{name}, Liger, no dropout" for name in ("LoRA in our step", "focused half", "focused quarter")
    )
    shares = {name: row["busy_ms"] / row["step_ms"] for name, row in busy.items()}
    others = min(share for name, share in shares.items() if name not in (lora, half))
    text = words_of("cost.md")
    assert f"had work for {shares[lora]:.2f} of the fused step of LoRA on all layers" in text
    assert f"for {shares[half]:.2f} of that of a focused half, and for at least {others:.2f} of the others" in text
    own = [f"{busy[name]['busy_ms'] / busy[lora]['busy_ms']:.2f}" for name in (half, quarter)]
    assert f"a focused half takes {own[0]} of LoRA on all layers in the fused step, and a quarter {own[1]}" in text
    spans = [f"{min(rows[name]['step_ms']):.0f} to {max(rows[name]['step_ms']):.0f}" for name in (lora, half)]
    assert f"The same steps took {spans[0]} and {spans[1]} ms in another run" in text
    gib = {name: median(row["activation_gib"]) for name, row in rows.items()}
    assert gib[f"{quarter}, norms recomputed"] / gib["LoRA"] <= 0.36 < gib[quarter] / gib["LoRA"]
    assert "a focused quarter meets the target of 0.36" in text
    assert f"the frozen base ({gib['floor, Liger, no dropout']:.2f} GiB)" in text
    for name in (lora, half, quarter):  # "it took no more time than keeping them"
        assert median(rows[f"{name}, norms recomputed"]["step_ms"]) < 1.005 * median(rows[name]["step_ms"])


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
    text = FOCUSED
    assert f"a step takes {half} of the time of PEFT's LoRA" in text
    assert f'with `IST(selector="all")` takes {fused}' in text
    assert f"The step takes {of_fused} of LoRA's in the fused step" in text
    assert f"all above the lowest eighth, take {eighth} of LoRA's fused step" in text
    assert f"Above the lowest eighth of the depth the step takes {eighth}" in text
    quarter = to("focused half above a quarter", "LoRA in our step")
    assert f"(by the present times it would be {250 * float(quarter):.0f})" in text
    shown = words_of("results.md")
    assert f"A step takes {half} of the time of PEFT's LoRA, and {of_fused} of [LoRA's in the fused step]" in shown
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
