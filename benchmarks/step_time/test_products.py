"""The table of an adapter's products, from results made up for the test."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from product_table import OPERATIONS, product_section  # noqa: E402


def result(way: str, microseconds: float, **more: Any) -> dict[str, Any]:
    found = {name: {way: microseconds, "PyTorch": 1.0} for name in OPERATIONS}
    return {
        "rows": {"float32 adapters, 4096 to 4096, rank 32": found},
        "config": {"rows": 4096},
        "device": "GPU",
        "commit": "abc",
        "versions": {"torch": "2"},
        **more,
    }


def test_what_the_library_takes_now_stands_beside_what_kernels_took(tmp_path: Path) -> None:
    (tmp_path / "products-gpu-old.json").write_text(json.dumps(result("kernels", 41.4, commit="old")))
    table, note = product_section(result("the library", 22.6), tmp_path)
    assert table.splitlines()[2] == "| float32, 4096 to 4096, rank 32 |" + " 23 / 41 |" * len(OPERATIONS)
    assert "(commit old, another run" in note
    assert note.endswith("GPU, commit abc (torch 2).")


def test_what_failed_or_was_not_measured_before_is_a_dash(tmp_path: Path) -> None:
    failed = result("the library", 3.0)
    failed["rows"]["float32 adapters, 4096 to 4096, rank 32"]["up"]["the library"] = "out of memory"
    table, _ = product_section(failed, tmp_path)
    assert table.splitlines()[2].split(" | ")[1:3] == ["3 / –", "– / –"]
