"""Measure every kind of adapter under IST, one JSON file for a device: python benchmarks/methods/run.py NAME [DEVICE].

The cases and the checks are those of the tests (`tests/tuner_types.py`); here their figures are kept.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from harness import header  # noqa: E402
from ist.adapters.layers import discover_layers  # noqa: E402
from ist.runs.files import write_json  # noqa: E402
from tests.helpers.tuner_types import (  # noqa: E402
    METHODS,
    REFUSALS,
    Method,
    Refusal,
    adapt,
    forward_error,
    is_available,
    make_base,
    moves_active_layers_only,
    saves_and_loads,
    uses_factor,
)

HERE = Path(__file__).parent


def attempt(check: Callable[[], Any]) -> Any:
    """The figure of a check, or the first line of its error."""
    try:
        return check()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def measure(entry: Method, device: str) -> dict[str, Any]:
    """A row: what was found of one method."""
    if not is_available(entry):
        return {"not run": f"needs {entry.needs}"}
    return {
        "factor": attempt(lambda: uses_factor(entry)),
        "forward_error": attempt(lambda: forward_error(entry, device)),
        "only_active_moved": attempt(lambda: moves_active_layers_only(entry, None, device)),
        "adamw_weight_decay": attempt(lambda: moves_active_layers_only(entry, 0.1, device)),
        "save_load": attempt(lambda: saves_and_loads(entry)),
    }


def refuse(entry: Refusal) -> dict[str, str]:
    """A row: with which words a method is refused."""
    model = adapt(entry, make_base())
    try:
        discover_layers(model)
    except ValueError as error:
        return {"refused": str(error)}
    return {"refused": ""}


def main(name: str, device: str = "cpu") -> Path:
    """Measure all methods on `device` and write `results/NAME.json`."""
    start = time.perf_counter()
    rows = {row: measure(entry, device) for row, entry in METHODS.items()}
    rows.update({row: refuse(entry) for row, entry in REFUSALS.items()})
    result = {
        **header(name, device),
        "seconds": round(time.perf_counter() - start, 1),
        "rows": rows,
    }
    file = HERE / "results" / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    write_json(file, result)
    return file


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
