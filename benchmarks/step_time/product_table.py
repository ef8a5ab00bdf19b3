"""The table of an adapter's products: what the library takes for each now, and what kernels alone took."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pages import markdown, source

__all__ = ["product_section"]

OPERATIONS = {
    "down": "`h = x Aᵀ`",
    "up": "`y += h Bᵀ`",
    "grad_of_h": "`dh = dy B`",
    "grad_of_b": "`dB = dyᵀ h`",
    "grad_of_a": "`dA = dhᵀ x`",
}
KERNELS = ("kernels", "the library")
"""What the library's own way is called, in the files of when that was kernels alone and in those since."""


def product_section(result: dict[str, Any], earlier: Path) -> Iterator[str]:
    """Microseconds on the GPU, a row for each size, rank and precision.

    Args:
        result: of `products.py`.
        earlier: a folder with results of when the library computed every product in a kernel.
    """
    before: dict[str, Any] = {}
    commits = []
    for file in sorted(earlier.glob("products-*.json")):
        known = json.loads(file.read_text(encoding="utf-8"))
        before.update(known["rows"])
        commits.append(known["commit"])
    rows = []
    for row, found in result["rows"].items():
        cells = [f"{own(found[name])} / {own(before.get(row, {}).get(name, {}))}" for name in OPERATIONS]
        rows.append((row.replace(" adapters", ""), *cells))
    yield markdown(("adapters, columns, rank", *OPERATIONS.values()), rows)
    yield (
        f"{result['config']['rows']} rows, bfloat16 activations; µs now / in kernels alone (commit "
        f"{', '.join(sorted(set(commits)))}, another run on the same kind of GPU). {source(result)}."
    )


def own(ways: Mapping[str, Any]) -> str:
    """The time of the library's way."""
    for name in KERNELS:
        if isinstance(ways.get(name), float):
            return f"{ways[name]:.0f}"
    return "–"
