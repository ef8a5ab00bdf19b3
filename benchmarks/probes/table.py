"""Make the table of probe batches, in this folder, from the JSON files in `results` alone."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from pages import load_results, markdown, source, write_section  # noqa: E402


def cell(found: dict[str, Any], name: str) -> str:
    """A rank correlation, and its standard deviation over the repeats."""
    if name not in found:
        return "–"
    spread = found[name].get("spread")
    return f"{found[name]['tau']:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")


def probe_table(result: dict[str, Any]) -> str:
    """How well a probe batch of so many rows orders sets and layers, and what the importance loop learns from it."""
    config = result["config"]
    learned = [f"learned {number}" for number in config["updates"]]
    header = (
        "rows of a probe batch",
        f"{config['sets']} sets, by loss",
        "layers, by all of these losses",
        *(f"layers, learned in {number} updates" for number in config["updates"]),
    )
    lines = [
        (size, *(cell(found, name) for name in ("sets", "layers", *learned))) for size, found in result["rows"].items()
    ]
    reference = result["reference"]
    note = (
        f"Kendall's tau with the order that {config['rows'] // 2} held-out rows give, mean ± standard deviation of "
        f"{config['repeats']} repeats. SmolLM2-135M, LoRA after {config['train_steps']} steps; loss of the sets "
        f"{reference['loss']:.3f} nats a token, standard deviation {reference['spread']:.3f}. {source(result)}."
    )
    return f"{markdown(header, lines)}\n\n{note}"


FOCUS_TARGETS = "Targets: memory at most 1.0, at most 4 training batches read, correlation at least 0.8."


def focus_row(result: dict[str, Any]) -> tuple[str, ...]:
    """What the look of focused training costs on one model, and how sure it is."""
    config, found = result["config"], result["rows"]
    correlations = found["correlations"]
    shape = f", {config['rows']} × {config['tokens']}" if found["shape"] else ""
    return (
        f"{found['model']}{shape}",
        f"{config['batches']} of {config['rows']}",
        f"{found['probe_bytes'] / 2**20:,.0f}",
        f"{found['training_bytes'] / 2**20:,.0f}",
        f"{found['probe_bytes'] / found['training_bytes']:.2f}",
        f"{mean(found['seconds']):.1f}",
        f"{mean(correlations):.2f} ({min(correlations):.2f})",
        f"{mean(found['in_common']):.0%}",
        result["device"],
        result["commit"],
    )


def focus_table(results: list[dict[str, Any]]) -> str:
    """A row for each model and task."""
    header = (
        "model and data",
        "batches of rows",
        "probe, MiB",
        "training, MiB",
        "ratio",
        "probe, s",
        "correlation, mean (lowest)",
        "layers in common",
        "device",
        "commit",
    )
    return f"{markdown(header, map(focus_row, results))}\n\n{FOCUS_TARGETS}"


def main() -> None:
    results = load_results(HERE / "results")
    sampled = [probe_table(result) for result in results if "reference" in result]
    focused = [result for result in results if result.get("kind") == "focus-probe"]
    write_section("probes", sampled, HERE / "README.md")
    write_section("focus probe", [focus_table(focused)] if focused else [], HERE / "README.md")


if __name__ == "__main__":
    main()
