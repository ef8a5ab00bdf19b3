"""Whether focused training holds against LoRA on all layers: paired differences, and the rule that judges them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pages import markdown

from .cells import percent, show
from .figures import FIGURES, Comparison

__all__ = ["METRICS", "PAIRS", "Verdict", "focused_section", "judged", "summed_up"]

METRICS = {"gsm8k": "solutions loss", "wikitext2": "text loss", "mawps": "exact answers", "sst2": "sentiment"}
"""What each task is judged by."""
NATS, POINT = 0.005, 0.01
"""How far a mean may be on the wrong side: of a loss, of a share."""
Verdict = str
"""`better`, `not worse`, `open`, `worse`, or `one seed`."""
PAIRS = (
    ("half, equal steps", "focused, half", "LoRA"),
    ("half, equal time", "focused, half", "LoRA, time of half"),
    ("third, equal steps", "focused, third", "LoRA"),
    ("third, equal time", "focused, third", "LoRA, time of third"),
    ("half, against LoRA with its rank", "focused, half", "LoRA, rank 64"),
    ("half, against an even spread", "focused, half", "even, half"),
    ("third, against an even spread", "focused, third", "even, third"),
    ("half, against the top anywhere", "focused, half", "top, half"),
    ("half, against random layers that stay", "focused, half", "random fixed, half"),
    ("half, against the paper's IST", "focused, half", "IST, half"),
    ("half, against LISA", "focused, half", "LISA"),
    ("even half, equal time", "even, half", "LoRA, time of half"),
    ("a least distance, against parts", "distance, half", "focused, half"),
    ("warm start, against the gradient", "warm start, half", "focused, half"),
    ("first step of Adam, against the gradient", "first step, half", "focused, half"),
    ("activation norm, against the gradient", "activation, half", "focused, half"),
    ("gradient by weights, against the gradient", "by weights, half", "focused, half"),
    ("removal after a training, against the gradient", "removal, half", "focused, half"),
    ("quarter: even, against the gradient", "even, quarter", "focused, quarter"),
    ("quarter: a least distance, against parts", "distance, quarter", "focused, quarter"),
    ("quarter: gradient by weights, against the gradient", "by weights, quarter", "focused, quarter"),
    ("quarter: first step, against the gradient", "first step, quarter", "focused, quarter"),
    ("ranks by importance, against equal ones", "uneven, half", "focused, half"),
    ("third: gradient by activations, against the gradient", "by activations, third", "focused, third"),
    ("start from the gradient, against random", "gradient start, half", "focused, half"),
    ("half from the gradient, equal time", "gradient start, half", "LoRA, time of half"),
    ("all layers: start from the gradient, against random", "LoRA, gradient start", "LoRA"),
    ("half above the lowest eighth, equal steps", "above an eighth, half", "LoRA"),
    ("half above the lowest eighth, equal time", "above an eighth, half", "LoRA, time above an eighth"),
    ("half above the lowest quarter, equal steps", "above a quarter, half", "LoRA"),
    ("half above the lowest quarter, equal time", "above a quarter, half", "LoRA, time above a quarter"),
    ("all above the lowest quarter, equal steps", "above a quarter, all", "LoRA"),
    ("all above the lowest quarter, equal time", "above a quarter, all", "LoRA, time above a quarter"),
    ("all above the lowest quarter, against a half of them", "above a quarter, all", "above a quarter, half"),
    ("half above the lowest eighth, against all depth", "above an eighth, half", "focused, half"),
    ("half above the lowest quarter, against all depth", "above a quarter, half", "focused, half"),
    ("even half above the lowest quarter, against all depth", "even above a quarter, half", "focused, half"),
    ("quarter above the lowest half, against all depth", "above a half, quarter", "focused, quarter"),
    ("half, at the middle of the steps a quarter, against half", "half, then a quarter", "focused, half"),
    ("half, after a tenth of the steps a quarter, against a quarter", "half, soon a quarter", "focused, quarter"),
    ("all layers for half of the steps, against half", "late choice, half", "focused, half"),
    ("the paper's IST within the focused half", "IST in the focused half", "focused, half"),
    ("random layers within the focused half", "random in the focused half", "focused, half"),
    ("gradient by activations, against the gradient", "by activations, half", "focused, half"),
    ("last layer's score halved, against the gradient", "last halved, half", "focused, half"),
    ("quarter: gradient by activations, against the gradient", "by activations, quarter", "focused, quarter"),
    ("quarter: last layer's score halved, against the gradient", "last halved, quarter", "focused, quarter"),
    ("quarter: the same with a least distance", "last halved, distance, quarter", "focused, quarter"),
    ("our step, against PEFT's", "focused half in our step", "focused, half"),
)
"""What is asked, and the two methods: the first one is judged."""


def judged(difference: Mapping[str, Any], title: str) -> Verdict:
    """The rule: `better` where the whole 95% interval is on the right side, `worse` where it is on the wrong one; else
    `not worse` with a mean at most 0.005 nats or 1 point on the wrong side, and `open` beyond that.

    Args:
        difference: a method minus another, with `mean`, `low` and `high`.
        title: of the metric; of shares more is better, of losses less.
    """
    if difference["low"] is None:
        return "one seed"
    sign, margin = (1, POINT) if percent(title) else (-1, NATS)
    worst, best = sorted((sign * difference["low"], sign * difference["high"]))
    if worst > 0:
        return "better"
    if best < 0:
        return "worse"
    return "not worse" if sign * difference["mean"] >= -margin else "open"


def summed_up(verdicts: Sequence[Verdict]) -> str:
    """A row in words: on how many tasks it is what."""
    kinds = [f"{verdicts.count(kind)} {kind}" for kind in ("better", "not worse", "open", "worse") if kind in verdicts]
    return ", ".join(kinds) or "one seed"


def cell(difference: Mapping[str, Any], title: str) -> str:
    """A difference with its interval, the number of pairs and the verdict."""
    mean = show(difference["mean"], title, sign=True)
    if difference["low"] is None:
        return f"{mean} (one seed)"
    low, high = (show(difference[end], title, sign=True) for end in ("low", "high"))
    return f"{mean} [{low}, {high}], {difference['num_pairs']} seeds: {judged(difference, title)}"


def focused_section(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """A table for each model and length of the plans of focused training."""
    found: dict[tuple[str, int], dict[str, Comparison]] = {}
    for comparison in comparisons:
        if comparison.focused and comparison.task in METRICS:
            found.setdefault((comparison.named, comparison.base_steps), {})[comparison.task] = comparison
    for (model, steps), of_task in found.items():
        tasks = [task for task in METRICS if task in of_task]
        rows = []
        for text, one, other in PAIRS:
            differences = {task: of_task[task].difference(one, other, METRICS[task]) for task in tasks}
            own = {task: (d, FIGURES[task][METRICS[task]]) for task, d in differences.items() if d}
            if own:
                cells = [cell(*own[task]) if task in own else "–" for task in tasks]
                rows.append((text, f"{one} − {other}", *cells, summed_up([judged(*each) for each in own.values()])))
        if rows:
            yield f"**{model}, {steps} steps.** {lengths(of_task)}{origin(of_task)}"
            titles = [f"{task}: {FIGURES[task][METRICS[task]]}" for task in tasks]
            yield markdown(("question", "difference", *titles, "tasks"), rows)
            yield from layer_rows(of_task)


def lengths(of_task: Mapping[str, Comparison]) -> str:
    """How many steps LoRA gets at the time of others."""
    shares = sorted(
        {
            f"{line['method']}: {line['steps']} steps ({line['time_share']:.3f})"
            for comparison in of_task.values()
            for line in comparison.lines
            if "time_share" in line
        }
    )
    return f"{'; '.join(shares)}. " if shares else ""


def origin(of_task: Mapping[str, Comparison]) -> str:
    """Devices, commits and files."""
    lines = [line for comparison in of_task.values() for line in comparison.lines]
    return ", ".join(
        name for part in ("device", "commit", "file") for name in sorted({str(line[part]) for line in lines})
    )


def layer_rows(of_task: Mapping[str, Comparison]) -> Iterator[str]:
    """The layers that each method kept, by task, of the first seed."""
    rows = []
    for task, comparison in of_task.items():
        for method in comparison.methods():
            runs = [line for line in comparison.runs(method) if line.get("focus")]
            if runs:
                sets = {tuple(line["focus"]["layers"]) for line in runs}
                same = "all seeds" if len(sets) == 1 else f"the first of {len(sets)} sets"
                rows.append((task, method, f"{', '.join(map(str, runs[0]['focus']['layers']))} ({same})"))
    if rows:
        yield markdown(("task", "method", "layers"), rows)
