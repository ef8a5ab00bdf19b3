"""Make the tables of memory, from the JSON files in `results` alone: in docs/cost.md, and all splits in this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from pages import load_results, markdown, source, write_section  # noqa: E402

GIB = 2**30
PARTS = ("weights", "activations", "gradients", "moments", "other")
MODELS = {"gpt2": "GPT-2 small", "tinyllama": "TinyLLaMA 1.1B", "7b": "LLaMA 7B", "13b": "LLaMA 13B"}
METHODS = {
    "Full": "full",
    "Series": "Series",
    "Parallel": "Parallel",
    "LoRA": "LoRA",
    "Series + IST": "Series + IST",
    "Parallel + IST": "Parallel + IST",
    "LoRA + IST, PEFT's forward": "LoRA + IST, `fused=False`",
    "LoRA + IST": "LoRA + IST",
    "LoRA + IST, frozen layers recomputed": 'LoRA + IST, `recompute="frozen"`',
}
PAPER = {
    "gpt2": (3.4, 2.5, 2.8, 2.9, 2.0, 2.1, 2.2),
    "tinyllama": (15.9, 9.6, 10.3, 10.5, 8.0, 8.3, 8.5),
    "7b": (60, 22, 23, 24, 19, 20, 20),
    "13b": (None, 38, 41, 42, 35, 36, 36),
}
"""Table 1 of the paper, GB: full, Series, Parallel, LoRA, and the three with IST. None is out of memory."""
PAPER_COLUMNS = ("Full", "Series", "Parallel", "LoRA", "Series + IST", "Parallel + IST", "LoRA + IST, PEFT's forward")
"""The paper's step of LoRA + IST is PEFT's forward with most layers frozen."""


INTRODUCTION = """Made by `make tables` from `results/*.json`; [docs/cost.md](../../docs/cost.md) has the summary.

One row of 1024 tokens, AdamW, no activation checkpointing, as in table 1 of the paper, whose numbers (in GB) are in
brackets. Its models hold the scores of their attention (`eager`); the second table does without (`sdpa`). Weights of
the model are in bfloat16, as are gradients and moments of full fine-tuning; PEFT makes adapters in float32. The total
is the highest peak of a few steps, the importance loop included. `fused=False` is the step as the paper has it: PEFT's
forward with most layers frozen.

- *weights*: of the model and the adapters.
- *activations*: what is allocated between the start and the end of the forward pass.
- *gradients*: of the weights that the step trains. With IST these are the active layers'.
- *moments*: of AdamW. With IST those of all layers count, as after many steps; `optimizer_state="reset"` or `"offload"`
  keep those of the active layers only.
- *other*: the rest of the peak. It is negative where the parts are not in memory at one time: gradients come while
  activations go."""


def split(row: dict[str, Any]) -> dict[str, float]:
    """GiB at the step with the highest peak: the total, and what it consists of.

    `other` is the rest of the peak. It is negative where the parts are not there at one time: gradients come while
    activations go.
    """
    step = max(row["steps"], key=lambda step: step["peak"])
    parts = {"weights": row["weights"], **{name: step[name] for name in PARTS[1:4]}}
    parts["other"] = step["peak"] - sum(parts.values())
    total = max(step["peak"], row["probe_peak"])
    return {"total": total / GIB, **{name: size / GIB for name, size in parts.items()}}


def merge(results: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Rows by model, method and attention, the latest of each."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for result in results:
        for name, row in result["rows"].items():
            model, method, attention = name.split(" | ")
            rows[model, method, attention] = row
    return rows


def total_cell(row: dict[str, Any] | None, paper: float | None, in_paper: bool) -> str:
    """GiB, and the paper's figure in brackets."""
    said = "" if not in_paper else f" ({'out of memory' if paper is None else f'{paper:g}'})"
    if row is None:
        return f"–{said}"
    return (row["error"].split(":")[0] if "error" in row else f"{split(row)['total']:.1f}") + said


def saved(rows: dict[tuple[str, str, str], dict[str, Any]], model: str, attention: str, method: str) -> str:
    """How much of LoRA's memory beyond the weights a method does without."""
    found = [rows.get((model, name, attention)) for name in ("LoRA", method)]
    if any(row is None or "error" in row for row in found):
        return "–"
    lora, ist = (split(row) for row in found if row)
    beyond = [parts["total"] - lora["weights"] for parts in (lora, ist)]
    return f"{1 - beyond[1] / beyond[0]:.0%}"


def totals_table(rows: dict[tuple[str, str, str], dict[str, Any]], attention: str) -> str:
    """A row for each method, a column for each model."""
    models = [model for model in MODELS if any(key[0] == model for key in rows)]
    lines = []
    for method, shown in METHODS.items():
        place = PAPER_COLUMNS.index(method) if method in PAPER_COLUMNS and attention == "eager" else None
        cells = [
            total_cell(rows.get((m, method, attention)), None if place is None else PAPER[m][place], place is not None)
            for m in models
        ]
        lines.append((shown, *cells))
    for method in ("LoRA + IST, PEFT's forward", "LoRA + IST"):
        share = [saved(rows, model, attention, method) for model in models]
        lines.append((f"saved of LoRA's beyond the weights: {METHODS[method]}", *share))
    return markdown([f"{attention} attention, GiB", *(MODELS[model] for model in models)], lines)


def split_rows(rows: dict[tuple[str, str, str], dict[str, Any]], model: str) -> Iterator[tuple[str, ...]]:
    """The parts of each method's peak."""
    for method, shown in METHODS.items():
        for attention in ("eager", "sdpa"):
            row = rows.get((model, method, attention))
            if row is None:
                continue
            if "error" in row:
                yield shown, attention, row["error"], *("–",) * len(PARTS)
            else:
                yield shown, attention, *(f"{size:.2f}" for size in split(row).values())


def split_table(rows: dict[tuple[str, str, str], dict[str, Any]], model: str) -> str:
    header = ("method", "attention", "total, GiB", *PARTS)
    return markdown([MODELS[model], *header[1:]], split_rows(rows, model))


def all_splits(results: list[dict[str, Any]], rows: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """The page of this folder."""
    tables = [totals_table(rows, attention) for attention in ("eager", "sdpa")] if rows else []
    tables += [split_table(rows, model) for model in MODELS if any(key[0] == model for key in rows)]
    sources = sorted({source(result) for result in results})
    return "\n\n".join(
        [
            "# Memory of a training step, in parts",
            INTRODUCTION,
            *(tables or ["Not measured yet."]),
            *(f"{line}." for line in sources),
        ]
    )


def main() -> None:
    results = load_results(HERE / "results")
    rows = merge(results)
    tables = [totals_table(rows, "sdpa")] if rows else []
    write_section("memory", [*tables, *sorted({f"{source(result)}." for result in results})])
    (HERE / "README.md").write_text(all_splits(results, rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
