"""Make the table of probe batches, in this folder, from the JSON files in `results` alone."""

from __future__ import annotations

import sys
from pathlib import Path
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


def main() -> None:
    results = [result for result in load_results(HERE / "results") if "reference" in result]
    write_section("probes", [probe_table(result) for result in results], HERE / "README.md")


if __name__ == "__main__":
    main()
