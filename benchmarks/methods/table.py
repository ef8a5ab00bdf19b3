"""Make the tables of adapter kinds from the JSON files in `results`: all rows here, an overview in docs/methods.md."""

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
FULL_PAGE = HERE / "README.md"
NOTES = ROOT / ".matrix" / "methods" / "ddp.json"
"""What `make test-dist` found of each method under DDP."""
BEGIN = "<!-- methods: made by `make tables` from benchmarks/methods/results -->"
END = "<!-- end of methods -->"
TITLE = """# Every kind of adapter under IST

Made by `make tables` from `results/*.json`; [docs/methods.md](../../docs/methods.md) has the overview. Each row is a
tiny Llama in float64 with that adapter.

- *suppressed by*: the adapter's own scaling factor, where scaling it is exact; otherwise the module runs a second time
  without its adapter.
- *error*: the largest deviation from `m + β·a` at β = 0, 0.25, 0.5 and 1, relative to the response, over all modules.
  `m` comes from the model before it had an adapter (PiSSA and OLoRA change the weights: with the adapter switched off).
- *active layers only*: nothing else moved in eight steps of gradient descent with three importance updates; *AdamW*:
  the same with AdamW and weight decay 0.1 (LoRA-FA: with its own optimizer). *moved*: both on the GPU.
- *save, load*: loaded by PEFT alone (bottleneck adapters: with this library), the outputs are equal to the bit.
- *DDP*: the largest difference between five steps of two processes and of one process on the same rows, relative to the
  largest step."""
FACTOR, TWICE = "its scaling factor", "a second run without it: `base + β·(full − base)`"
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
    """A row for each kind that works."""
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
    return "\n".join(lines)


def overview(cpu: dict[str, Any], gpu: dict[str, Any] | None) -> str:
    """How each kind is suppressed, the largest errors, what failed, and what is refused, by reason."""
    worked = {name: found for name, found in cpu["rows"].items() if "refused" not in found and "not run" not in found}
    lines = ["| suppressed by | adapters | largest error, CPU | GPU |", "|---|---|---|---|"]
    for exact, way in ((True, FACTOR), (False, TWICE)):
        names = [name for name, found in worked.items() if bool(found["factor"]) is exact]
        on_gpu = [(gpu or {}).get("rows", {}).get(name, {}).get("forward_error") for name in names]
        errors = [value for value in on_gpu if isinstance(value, float)]
        largest = max((worked[name]["forward_error"] for name in names), default=0.0)
        lines.append(f"| {way} | {', '.join(names)} | {error(largest)} | {error(max(errors, default=0.0))} |")
    checks = ("only_active_moved", "adamw_weight_decay", "save_load")
    failed = [name for name, found in worked.items() if any(found[check] is not True for check in checks)]
    lines += [
        "",
        f"{len(worked) - len(failed)} of {len(worked)} kinds pass all checks: only the active layers' adapters move, "
        "with weight decay too, and a saved adapter gives equal outputs. "
        + (f"**Failed: {', '.join(failed)}.** " if failed else "")
        + f"CPU: {source(cpu)}.",
    ]
    reasons: dict[str, list[str]] = {}
    for name, found in cpu["rows"].items():
        if "refused" in found:
            reason = found["refused"].removeprefix(f"{name} ").split(". Use ")[0]
            reasons.setdefault(reason or "**is not refused**", []).append(name)
    lines += ["", "| refused | because it |", "|---|---|"]
    lines += [f"| {', '.join(names)} | {reason} |" for reason, names in reasons.items()]
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
    """Write both pages."""
    if NOTES.exists():
        gather(NOTES, HERE / "results" / "ddp.json")
    cpu = load("cpu")
    if cpu is None:
        raise SystemExit("No results/cpu.json: run `python benchmarks/methods/run.py cpu` first.")
    gpu = load("h100")
    FULL_PAGE.write_text(f"{TITLE}\n\n{table(cpu, gpu, load('ddp'))}\n", encoding="utf-8")
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    tail = rest.split(END)[1]
    PAGE.write_text(f"{head}{BEGIN}\n{overview(cpu, gpu)}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
