"""Make the tables of step time from the JSON files in `results`: all here, some rows in docs/cost.md and the README."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from cases import UPPER  # noqa: E402
from norms_table import AGAIN, busy_table, norms_table  # noqa: E402
from product_table import product_section  # noqa: E402

from pages import load_results, markdown, source, write_section  # noqa: E402

RESULTS = HERE / "results"
EARLIER = RESULTS / "earlier"
PAGE = HERE / "README.md"
"""Every table."""
README = HERE.parents[1] / "README.md"
SHORT_LIST = {
    "LoRA": "LoRA, by PEFT",
    "IST": "IST",
    "LoRA, Liger": "LoRA, by PEFT, with Liger's kernels",
    "IST, Liger": "IST, with Liger's kernels",
    "IST, Liger, frozen layers recomputed": 'IST, with Liger\'s kernels and `recompute="frozen"`',
}
"""The cases that the README shows."""
COST_LIST = {
    "floor": "frozen base (lower bound)",
    "LoRA": "LoRA",
    "IST, PEFT's forward": "IST, `fused=False`",
    "IST": "IST",
    "IST, probes of 256 tokens": "IST, probes of 256 tokens",
    "IST, frozen layers recomputed": 'IST, `recompute="frozen"`',
    "LoRA, Liger": "LoRA, Liger",
    "IST, Liger": "IST, Liger",
    "LoRA, compiled by layer": "LoRA, compiled by layer",
    "IST, compiled by layer": "IST, compiled by layer",
    "IST, compiled by layer, probes of 256 tokens": "IST, compiled by layer, probes of 256 tokens",
}
"""The cases that docs/cost.md shows."""
LORA, FUSED = "LoRA on all layers, by PEFT", "LoRA on all layers, fused"
"""What focused training is compared with: PEFT's LoRA, and the library's own."""


def focused_list(setting: str, compiled: str = "") -> dict[str, str]:
    """The cases of focused training in one setting, by name, and how docs/cost.md calls them."""
    parts = ("half", "third", "quarter")
    return {
        f"LoRA, {setting}{compiled}": LORA + compiled,
        f"LoRA in our step, {setting}{compiled}": FUSED + compiled,
        **{
            f"focused {part} in PEFT's step, {setting}{compiled}": f"focused {part}, by PEFT{compiled}"
            for part in parts
        },
        **{f"focused {part}, {setting}{compiled}": f"focused {part}, fused{compiled}" for part in (*parts, *UPPER)},
        **{f"focused {part}, {setting}, recomputed": f"focused {part}, fused, recomputed" for part in parts},
    }


FLOOR = "frozen base (lower bound)"
FOCUSED_LIST = {
    "floor, Liger, no dropout": FLOOR,
    **focused_list("Liger, no dropout"),
    "focused quarter, Liger, no dropout, layers without adapters recomputed": "focused quarter, fused, recomputed",
    "floor, no dropout": FLOOR,
    **focused_list("bfloat16 adapters, no dropout"),
    "floor, no dropout, compiled by layer": f"{FLOOR}, compiled by layer",
    **focused_list("bfloat16 adapters, no dropout", ", compiled by layer"),
}
"""The cases of focused training that docs/cost.md shows."""
PAPER_13 = {"LoRA": (135, 184, 31.9), "LISA": (101, 225, 32.6), "LoRA + IST, PEFT's forward": (135, 150, 32.6)}
"""Table 13 of the paper, one RTX 4090: forward and backward in ms, seconds for 100 steps."""


def middle(row: dict[str, Any] | None, name: str) -> float | None:
    """The median over rounds, or None where nothing was measured."""
    return median(row[name]) if row and row.get(name) else None


def partner(rows: dict[str, Any], row: dict[str, Any], floor: bool) -> dict[str, Any] | None:
    """What a row is compared with: PEFT's LoRA on the same modules of all layers, with float32 adapters where the run
    has it and else with those of the row; or the frozen base with the same kernels.
    """
    case = row.get("case")
    if case is None:
        return None
    kernels = (case["liger"], case["compiled"]) if floor else (False, False)
    found: dict[str, dict[str, Any]] = {}
    for other in (other["case"] for other in rows.values() if "case" in other):
        if other["floor"] != floor or (other["liger"], other["compiled"]) != kernels:
            continue
        alike = floor or (
            other["options"] is None
            and list(other["modules"]) == list(case["modules"])
            and other["dropout"] == case["dropout"]
            and other.get("kept", 1.0) == 1.0
        )
        if alike:
            found.setdefault(other["precision"], rows[other["name"]])
    return found.get("float32") or found.get(case["precision"])


def ratio(row: dict[str, Any], other: dict[str, Any] | None, name: str) -> float | None:
    """Of two medians."""
    above, below = middle(row, name), middle(other, name)
    return above / below if above is not None and below else None


def number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def step_rows(rows: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """A line for each case."""
    for name, row in rows.items():
        if row.get("error") and not row.get("step_ms"):
            yield name, row["error"], *("–",) * 6
            continue
        lora, floor = partner(rows, row, floor=False), partner(rows, row, floor=True)
        yield (
            name.replace("floor", "frozen base"),
            number(middle(row, "step_ms"), ".1f"),
            number(ratio(row, lora, "step_ms"), ".2f"),
            number(ratio(row, floor, "step_ms"), ".2f"),
            number(share(row), ".1%") if row["case"]["options"] is not None else "–",
            number(middle(row, "activation_gib"), ".2f"),
            number(ratio(row, lora, "activation_gib"), ".2f"),
            number(middle(row, "peak_gib"), ".1f"),
        )


def share(row: dict[str, Any] | None) -> float | None:
    """The importance loop's part of a step."""
    probes, step = middle(row, "probe_ms"), middle(row, "step_ms")
    return probes / step if probes is not None and step else None


def step_table(result: dict[str, Any]) -> str:
    """Time and memory of every case of a run, with the ratios to its LoRA and to the frozen base."""
    config = result["config"]
    header = (
        f"{config['rows']} × {config['tokens']} tokens",
        "ms a step",
        "÷ LoRA",
        "÷ frozen base",
        "importance loop",
        "activations, GiB",
        "÷ LoRA",
        "peak, GiB",
    )
    rounds = f"{config['rounds']} round{'s' * (config['rounds'] != 1)} of 10 steps"
    note = f"{rounds}, probes of {config['probe_rows']} row(s). {source(result)}."
    return f"{markdown(header, step_rows(result['rows']))}\n\n{note}"


def short_table(result: dict[str, Any]) -> str:
    """A few cases of one run, for the README."""
    rows = {name: result["rows"][name] for name in SHORT_LIST if name in result["rows"]}
    lines = []
    for name, row in rows.items():
        lora = partner(rows, row, floor=False)
        cells = [
            f"{number(middle(row, figure), form)} ({number(ratio(row, lora, figure), '.2f')})"
            for figure, form in (("step_ms", ".0f"), ("activation_gib", ".1f"))
        ]
        lines.append((SHORT_LIST[name], *cells))
    origin = f"{source(result)}; in brackets, the ratio to LoRA by PEFT."
    return f"{markdown(('', 'ms a step', 'activations, GiB'), lines)}\n\n{origin}"


def cost_table(result: dict[str, Any]) -> str:
    """What docs/cost.md shows of a run: time, the importance loop's share, activations."""
    rows = result["rows"]
    lines = []
    for name, shown in COST_LIST.items():
        if not middle(row := rows.get(name), "step_ms"):
            continue
        lora = partner(rows, row, floor=False)
        lines.append(
            (
                shown,
                number(middle(row, "step_ms"), ".0f"),
                number(ratio(row, lora, "step_ms"), ".2f"),
                number(share(row), ".1%") if row["case"]["options"] is not None else "–",
                number(middle(row, "activation_gib"), ".1f"),
                number(ratio(row, lora, "activation_gib"), ".2f"),
            )
        )
    header = (f"{result['config']['rows']} × {result['config']['tokens']} tokens", "ms a step", "÷ LoRA")
    table = markdown((*header, "importance loop", "activations, GiB", "÷ LoRA"), lines)
    return f"{table}\n\n{source(result)}."


def focused_table(result: dict[str, Any]) -> str:
    """What docs/cost.md shows of focused training: time and peak memory, beside LoRA on all layers."""
    rows = result["rows"]
    named = {shown: rows[name] for name, shown in reversed(FOCUSED_LIST.items()) if name in rows}
    both = named.get(LORA), named.get(FUSED)
    lines = []
    for name, shown in FOCUSED_LIST.items():
        if not middle(row := rows.get(name), "step_ms"):
            continue
        times = [number(ratio(row, other, "step_ms"), ".2f") for other in both]
        peak = (number(middle(row, "peak_gib"), ".1f"), number(ratio(row, both[0], "peak_gib"), ".2f"))
        lines.append((shown, number(middle(row, "step_ms"), ".0f"), *times, *peak))
    header = (f"{result['config']['rows']} × {result['config']['tokens']} tokens", "ms a step", "÷ PEFT", "÷ fused")
    return f"{markdown((*header, 'peak, GiB', '÷ PEFT'), lines)}\n\n{source(result)}."


def iteration_table(result: dict[str, Any]) -> str:
    """Table 13 of the paper, with its figures in brackets where they are of the same shape."""
    header = ("", "forward, ms", "backward, ms", "100 steps, s", "of it importance loop", "steps timed", "peak, GiB")
    lines = []
    for name, row in result["rows"].items():
        shape, method = name.split(" | ")
        if "error" in row:
            lines.append((f"{shape}: {method}", row["error"], *("–",) * 5))
            continue
        hundred = 100 / row["steps"]
        measured = (
            f"{row['forward_ms']:.0f}",
            f"{row['backward_ms']:.0f}",
            f"{row['seconds'] * hundred:.1f}",
            f"{row['probe_seconds'] * hundred:.1f}",
            str(row["steps"]),
            f"{row['peak_gib']:.1f}",
        )
        paper = PAPER_13.get(method) if shape == "1x1024" else None
        said = [f" ({value:g})" for value in paper] if paper else [""] * 3
        cells = [f"{cell}{more}" for cell, more in zip(measured, [*said, "", "", ""], strict=True)]
        lines.append((f"{shape.replace('x', ' × ')}: {method}", *cells))
    return f"{markdown(header, lines)}\n\n{source(result)}."


def growth_tables(result: dict[str, Any]) -> list[str]:
    """One table for each thing that grows, then what the library itself does."""
    config = result["config"]
    names = ("tokens", "layers", "rows")
    middle_point = dict(zip(names, config["middle"], strict=True))
    tables = []
    for name in names:
        others = {other: middle_point[other] for other in names if other != name}
        rows = [row for row in result["rows"] if all(row[other] == value for other, value in others.items())]
        rows = sorted((row for row in rows if row[name] in config[name]), key=lambda row: row[name])
        if rows:
            setting = ", ".join(f"{value} {other if value > 1 else other[:-1]}" for other, value in others.items())
            header = (f"{name} ({setting})", "LoRA, ms", "IST, ms", "÷ LoRA", "LoRA, peak GiB", "IST, peak GiB")
            tables.append(markdown(header, map(lambda row, name=name: growth_row(row, name), rows)))
    tables.append(f"{config['size']} model, LoRA on five modules. {source(result)}.")
    return tables


def growth_row(row: dict[str, Any], name: str) -> tuple[str, ...]:
    times = [row[method].get("step_ms") for method in ("LoRA", "IST")]
    peaks = [row[method].get("peak_gib") for method in ("LoRA", "IST")]
    both = times[1] / times[0] if None not in times else None
    return (
        str(row[name]),
        *(number(value, ".1f") for value in times),
        number(both, ".2f"),
        *(number(value, ".2f") for value in peaks),
    )


def own_work_table(results: list[dict[str, Any]]) -> str:
    """What `begin_step` and `end_step` take of the host, by device."""
    header = ("device", "layers", "choice, toggling, history", "an update more, nothing computed", "commit")
    lines = []
    for result in results:
        work = result["own_work"]
        extra = work["update_ms"] - work["end_step_ms"]
        cells = (str(work["layers"]), f"{work['step_ms']:.2f} ms a step", f"{extra:.1f} ms each time")
        lines.append((result["device"], *cells, result["commit"]))
    return markdown(header, lines)


def main() -> None:
    steps = sorted(load_results(RESULTS, "step_time"), key=lambda result: -result["config"]["rows"])
    write_section("step time", [step_table(result) for result in steps], PAGE)
    sampled = [result for result in steps if "IST" in result["rows"]]
    norms = [result for result in steps if any(name.endswith(AGAIN) for name in result["rows"])]
    focused = [
        result for result in steps if result not in norms and any(name.startswith("focused") for name in result["rows"])
    ]
    write_section("step cost", [cost_table(result) for result in sampled])
    write_section("step focused", [focused_table(result) for result in focused])
    write_section("step norms", [norms_table(result, FOCUSED_LIST) for result in norms])
    write_section("step busy", [busy_table(result, FOCUSED_LIST) for result in load_results(RESULTS, "busy")])
    write_section("step", [short_table(result) for result in sampled[:1]], README)
    write_section("iterations", [iteration_table(result) for result in load_results(RESULTS, "iterations")], PAGE)
    products = [part for found in load_results(RESULTS, "products") for part in product_section(found, EARLIER)]
    write_section("products", products, PAGE)
    growth = load_results(RESULTS, "growth")
    grown = [table for result in growth if result["rows"] for table in growth_tables(result)]
    worked = [result for result in growth if "own_work" in result]
    write_section("growth", [*grown, *([own_work_table(worked)] if worked else [])], PAGE)


if __name__ == "__main__":
    main()
