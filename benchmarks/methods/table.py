"""Make the table of all kinds of adapters in docs/methods.md, from the JSON files in `results` alone."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from commit import commit  # noqa: E402

ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "methods.md"
NOTES = ROOT / ".matrix" / "methods" / "ddp.json"
"""What `make test-dist` found of each method under DDP."""
BEGIN = "<!-- methods: made by `make tables` from benchmarks/methods/results -->"
END = "<!-- end of methods -->"
HEADER = ("method", "suppressed by", "error", "active layers only", "AdamW", "save, load", "DDP", "GPU: error", "moved")
PROMISE = 1e-5
"""The largest error that is called exact."""


def mark(value: Any) -> str:
    """A check's outcome: yes, no, or what went wrong."""
    return {True: "✓", False: "**no**"}[value] if isinstance(value, bool) else f"**{value}**"


def error(value: Any) -> str:
    """An error relative to the response, bold where it breaks the promise."""
    if not isinstance(value, float):
        return f"**{value}**"
    shown = f"{value:.0e}" if value else "0"
    return shown if value < PROMISE else f"**{shown}**"


def row(name: str, cpu: dict[str, Any], gpu: dict[str, Any] | None, ddp: dict[str, Any]) -> tuple[str, ...]:
    """The cells of one method."""
    if "not run" in cpu:
        return name, cpu["not run"], *("–",) * (len(HEADER) - 2)
    on_gpu = ("–", "–")
    if gpu and "not run" not in gpu:
        both = gpu["only_active_moved"], gpu["adamw_weight_decay"]
        on_gpu = error(gpu["forward_error"]), mark(both[0] is True and both[1] is True)
    return (
        name,
        "its factor" if cpu["factor"] else "base + β·(full − base)",
        error(cpu["forward_error"]),
        mark(cpu["only_active_moved"]),
        mark(cpu["adamw_weight_decay"]),
        mark(cpu["save_load"]),
        error(ddp[name]) if name in ddp else "–",
        *on_gpu,
    )


def source(result: dict[str, Any]) -> str:
    """Where a column's figures come from."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items() if name != "ist")
    return f"{result['device']}, commit {result['commit']} ({versions})"


def table(cpu: dict[str, Any], gpu: dict[str, Any] | None, ddp: dict[str, Any] | None) -> str:
    """What works, and what is refused."""
    rows = cpu["rows"]
    lines = [f"| {' | '.join(HEADER)} |", "|---" * len(HEADER) + "|"]
    for name, found in rows.items():
        if "refused" not in found:
            cells = row(name, found, (gpu or {}).get("rows", {}).get(name), (ddp or {}).get("rows", {}))
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"CPU: {source(cpu)}."]
    if gpu:
        lines.append(f"GPU: {source(gpu)}.")
    if ddp:
        lines.append(f"DDP: {source(ddp)}.")
    lines += ["", "| refused | because it |", "|---|---|"]
    for name, found in rows.items():
        if "refused" in found:
            reason = found["refused"].removeprefix(f"{name} ").split(". Use ")[0]
            lines.append(f"| {name} | {reason or '**is not refused**'} |")
    return "\n".join(lines)


def load(name: str) -> dict[str, Any] | None:
    """A result by name, if it was run."""
    file = HERE / "results" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def gather(notes: Path, file: Path) -> None:
    """Keep what the distributed tests found, with the commit and the versions that were tested."""
    result = {
        "commit": commit(),
        "device": "2 processes on CPUs, gloo",
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "rows": json.loads(notes.read_text(encoding="utf-8")),
    }
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write the table into the page."""
    if NOTES.exists():
        gather(NOTES, HERE / "results" / "ddp.json")
    cpu = load("cpu")
    if cpu is None:
        raise SystemExit("No results/cpu.json: run `python benchmarks/methods/run.py cpu` first.")
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    tail = rest.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n{table(cpu, load('h100'), load('ddp'))}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
